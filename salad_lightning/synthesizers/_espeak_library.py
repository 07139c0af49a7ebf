"""espeak-ng through ctypes: one utterance in, samples and events out."""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import espeakng_loader
import numpy as np
from numpy.typing import NDArray

__all__ = ["PHONEME", "SAMPLE_RATE_HZ", "WORD", "Event", "Voice", "languages", "synthesize", "variants"]

SAMPLE_RATE_HZ = 22050
WORD, PHONEME = 1, 7

_SYNCHRONOUS = 2
_PHONEME_EVENTS, _DO_NOT_EXIT = 0x0001, 0x8000
_RATE, _PITCH = 1, 3
_UTF8 = 1


class Event(NamedTuple):
    """What the engine says about a moment of the audio.

    Attributes:
        kind: ``WORD`` or ``PHONEME``; others are dropped.
        character: Index into the text.
        sample: Where in the audio it begins.
        phoneme: espeak's ASCII name of the phoneme, stress marks included; "" for words.
    """

    kind: int
    character: int
    sample: int
    phoneme: str


class Voice(NamedTuple):
    """How to speak: language file (``gmw/en-US``), variant (``m3``, "" for none), words a minute, pitch 0 to 99."""

    language: str
    variant: str
    rate_wpm: int
    pitch: int


class _Id(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    """``espeak_EVENT`` of speak_lib.h (https://github.com/espeak-ng/espeak-ng)."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
_lock = threading.Lock()
_folders: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


@functools.cache
def languages() -> dict[str, str]:
    """Names a language answers to (``en-us``, ``gmw/en-US``) → its file below ``lang/``."""
    root = Path(espeakng_loader.get_data_path()) / "lang"
    names: dict[str, str] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        file = path.relative_to(root).as_posix()
        names[file.lower()] = file
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("language "):
                names.setdefault(line.split()[1].lower(), file)
    return names


@functools.cache
def variants() -> frozenset[str]:
    """Names of the voice variants (``m1``, ``f3``, ``klatt`` …)."""
    return frozenset(path.name for path in (Path(espeakng_loader.get_data_path()) / "voices" / "!v").iterdir())


def synthesize(text: str, voice: Voice) -> tuple[NDArray[np.int16], list[Event]]:
    """Speak ``text``; the same arguments always give the same samples.

    Args:
        text: What to say.
        voice: How to say it.

    Returns:
        ``[L]`` samples at ``SAMPLE_RATE_HZ`` and the word and phoneme events in order.

    Raises:
        RuntimeError: If the engine fails.
    """
    chunks: list[NDArray[np.int16]] = []
    events: list[Event] = []

    def receive(samples: Any, num_samples: int, first_event: Any) -> int:
        if samples and num_samples > 0:
            chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        index = 0
        while (event := first_event[index]).type != 0:
            if event.type in (WORD, PHONEME):
                name = bytes(event.id.string).decode("utf-8", "replace") if event.type == PHONEME else ""
                events.append(Event(event.type, event.text_position - 1, event.sample, name))
            index += 1
        return 0

    callback = _Callback(receive)
    with _lock:
        _speak(text, voice, callback)
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int16), events


def _speak(text: str, voice: Voice, callback: Any) -> None:
    folder = _private_folder(voice.language)
    # The engine keeps state from one utterance to the next (flutter, formants, echo) that no call resets. Loading the
    # library afresh costs 2 ms and makes an utterance depend on nothing but its arguments.
    library = ctypes.CDLL(str(folder / "libespeak-ng"))
    try:
        data = str(folder / "espeak-ng-data").encode()
        if library.espeak_Initialize(_SYNCHRONOUS, 0, data, _PHONEME_EVENTS | _DO_NOT_EXIT) != SAMPLE_RATE_HZ:
            raise RuntimeError("espeak-ng does not start")
        library.espeak_SetSynthCallback(callback)
        name = f"{voice.language}+{voice.variant}" if voice.variant else voice.language
        failed = library.espeak_SetVoiceByName(name.encode())
        library.espeak_SetParameter(_RATE, voice.rate_wpm, 0)
        library.espeak_SetParameter(_PITCH, voice.pitch, 0)
        encoded = text.encode("utf-8")
        size = ctypes.c_size_t(len(encoded) + 1)
        failed = failed or library.espeak_Synth(encoded, size, 0, 1, 0, _UTF8, None, None)
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)
    if failed:
        raise RuntimeError(f"espeak-ng fails with error {failed}")


@functools.cache
def _private_folder(language: str) -> Path:
    """The library and the data of one language.

    A copy of the library, so that nobody else in the process holds it open when it is to be loaded afresh; and one
    language alone, because the engine reads all of them whenever it starts.
    """
    # shutil.rmtree at exit belongs to TemporaryDirectory; a forked worker leaves it to its parent.
    holder = tempfile.TemporaryDirectory(prefix="salad-espeak-")
    _folders.append(holder)
    folder, source = Path(holder.name), Path(espeakng_loader.get_data_path())
    data = folder / "espeak-ng-data"
    (data / "voices" / "!v").mkdir(parents=True)
    shutil.copyfile(espeakng_loader.get_library_path(), folder / "libespeak-ng")
    for path in source.iterdir():
        if path.name not in ("voices", "lang"):
            (data / path.name).symlink_to(path)
    (data / "lang" / language).parent.mkdir(parents=True)
    (data / "lang" / language).symlink_to(source / "lang" / language)
    for path in (source / "voices" / "!v").iterdir():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        # Breath is made of noise that differs from call to call.
        kept = [line for line in lines if not line.startswith("breath")]
        (data / "voices" / "!v" / path.name).write_text("\n".join(kept) + "\n", encoding="utf-8")
    return folder
