"""Kokoro-82M (https://huggingface.co/hexgrad/Kokoro-82M), with word times from its own durations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from kokoro import KModel
from torch import Tensor

from salad_lightning.errors import UserError
from salad_lightning.interfaces import Speech, Synthesizer, TimedWord

__all__ = ["KokoroSynthesizer"]

_FRAMES_PER_SECOND = 40  # of the predicted durations: 600 samples at 24 kHz
_REPOSITORY = "hexgrad/Kokoro-82M"


class _Word(NamedTuple):
    text: str
    phonemes: str


class KokoroSynthesizer(Synthesizer):
    """Speaks with Kokoro-82M.

    A word lasts as long as the model's predicted durations of its phonemes; the silence of a space between two words
    belongs to neither. Texts longer than the model's context are spoken in parts, cut between words, at a sentence's
    end where there is one.

    Args:
        path: Folder with ``config.json``, a ``.pth`` file and ``voices/{voice}.pt``; or the name on the hub.
        voice: One of the model's; American where it begins with ``a``, British where with ``b``.
        speed: Above 1 is faster.
        phonemizer: ``misaki`` is the model's own and needs spaCy's ``en_core_web_sm``; ``espeak`` needs nothing more,
            and takes words one at a time.
        device: Where the model runs; the GPU if there is one.

    Raises:
        UserError: If model, voice or phonemizer cannot be loaded.
    """

    sample_rate_hz = 24_000

    def __init__(
        self,
        path: str = _REPOSITORY,
        voice: str = "af_heart",
        speed: float = 1.0,
        phonemizer: Literal["misaki", "espeak"] = "misaki",
        device: str | None = None,
    ) -> None:
        if not speed > 0:
            raise ValueError(f"speed must be above 0, not {speed}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _model(path, device)
        pack: Tensor = torch.load(_file(path, f"voices/{voice}.pt"), map_location=device, weights_only=True)
        self._styles, self._speed = pack, speed
        make = {"misaki": _misaki, "espeak": _espeak}.get(phonemizer)
        if make is None:
            raise ValueError(f"phonemizer must be misaki or espeak, not {phonemizer}")
        self._words = make(voice.startswith("b"))

    def speak(self, text: str, *, seed: int = 0) -> Speech:
        """Say ``text``.

        Args:
            text: English.
            seed: Of the noise in the vocoder's source.

        Raises:
            UserError: If nothing in ``text`` can be spoken.
        """
        words = [word._replace(phonemes=self._known(word.phonemes)) for word in self._words(text)]
        if not any(word.phonemes for word in words):
            raise UserError("nothing to say", where=f"text {text[:60]!r}", cure="give a text with words in it")
        parts: list[np.ndarray[Any, np.dtype[np.float32]]] = []
        timed: list[TimedWord] = []
        offset_s = 0.0
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for part in _parts(_joined(words), self._model.context_length - 2):
                audio, times = self._speak_part(part)
                timed += [
                    TimedWord(word.text, offset_s + a, offset_s + b) for word, (a, b) in zip(part, times, strict=True)
                ]
                offset_s += len(audio) / self.sample_rate_hz
                parts.append(audio)
        return Speech(np.concatenate(parts), timed)

    def _known(self, phonemes: str) -> str:
        return "".join(char for char in phonemes if char in self._model.vocab)

    def _speak_part(
        self, words: list[_Word]
    ) -> tuple[np.ndarray[Any, np.dtype[np.float32]], list[tuple[float, float]]]:
        phonemes = " ".join(word.phonemes for word in words)
        output = self._model(phonemes, self._styles[len(phonemes) - 1], self._speed, return_output=True)
        audio = output.audio.float().clamp(-1, 1).numpy()
        # Frames before each symbol: the first is a mark of the beginning, the last of the end.
        ends_s = (torch.cumsum(output.pred_dur, 0) / _FRAMES_PER_SECOND).tolist()
        times, at = [], 0
        for word in words:
            times.append((ends_s[at], min(ends_s[at + len(word.phonemes)], len(audio) / self.sample_rate_hz)))
            at += len(word.phonemes) + 1
        return audio, times


def _joined(words: list[_Word]) -> list[_Word]:
    """Words without a sound of their own ("–") become part of the one before, or of the first that has one."""
    units: list[_Word] = []
    for word in words:
        if units and (not word.phonemes or not units[-1].phonemes):
            units[-1] = _Word(f"{units[-1].text} {word.text}", units[-1].phonemes + word.phonemes)
        else:
            units.append(word)
    return units


def _parts(words: list[_Word], limit: int) -> list[list[_Word]]:
    """Runs of words whose phonemes and the spaces between them are at most ``limit``."""
    rest, parts = list(words), []
    while rest:
        used, count, sentence = -1, 0, 0
        while count < len(rest) and used + 1 + len(rest[count].phonemes) <= limit:
            used += 1 + len(rest[count].phonemes)
            count += 1
            if rest[count - 1].text[-1] in ".!?;:":
                sentence = count
        if count == 0:
            raise UserError("a word is too long to be spoken", where=rest[0].text[:60], cure="leave it out")
        count = count if count == len(rest) else sentence or count
        parts.append(rest[:count])
        rest = rest[count:]
    return parts


@functools.lru_cache(maxsize=2)
def _model(path: str, device: str) -> KModel:
    """One model for all voices of a process."""
    weights = sorted(Path(path).glob("*.pth"))
    if Path(path).is_dir() and not weights:
        raise UserError("the folder holds no .pth file", where=path, cure="copy kokoro-v1_0.pth into it")
    file = str(weights[0]) if weights else _file(path, KModel.MODEL_NAMES.get(path, "kokoro-v1_0.pth"))
    model = KModel(repo_id=path, config=_file(path, "config.json"), model=file)
    return model.to(device).eval()


def _file(path: str, name: str) -> str:
    if Path(path).is_dir():
        if not (Path(path) / name).is_file():
            known = ", ".join(sorted(file.stem for file in Path(path).glob("voices/*.pt")))
            raise UserError(f"there is no {name}", where=path, cure=f"its voices are: {known}")
        return str(Path(path) / name)
    try:
        return str(hf_hub_download(repo_id=path, filename=name))
    except Exception as error:  # no network, no such repository, no such file: each another class
        first = str(error).partition("\n")[0]
        raise UserError(f"{name} cannot be had ({first})", where=path, cure="give `path` a local folder") from error


def _misaki(british: bool) -> Callable[[str], list[_Word]]:
    # Here, not above: it needs spaCy's model, which `espeak` does not.
    import spacy
    from misaki import en, espeak

    if not spacy.util.is_package("en_core_web_sm"):
        cure = "python -m spacy download en_core_web_sm, or phonemizer: espeak"
        raise UserError("spaCy's en_core_web_sm is not installed", where="phonemizer: misaki", cure=cure)
    to_tokens = en.G2P(trf=False, british=british, fallback=espeak.EspeakFallback(british=british), unk="")

    def words(text: str) -> list[_Word]:
        text = " ".join(text.split())
        found, graphemes, phonemes = [], "", ""
        for token in to_tokens(text)[1]:
            graphemes, phonemes = graphemes + token.text, phonemes + (token.phonemes or "")
            if token.whitespace:
                found.append(_Word(graphemes, phonemes))
                graphemes = phonemes = ""
        found += [_Word(graphemes, phonemes)] if graphemes else []
        if " ".join(word.text for word in found) != text:
            raise UserError("the phonemizer changed the text", where=f"text {text[:60]!r}", cure="leave markup out")
        return found

    return words


def _espeak(british: bool) -> Callable[[str], list[_Word]]:
    from misaki import espeak  # as above: it loads the espeak-ng library

    fallback = espeak.EspeakFallback(british=british)

    def words(text: str) -> list[_Word]:
        return [_Word(word, (fallback(SimpleNamespace(text=word))[0] or "").replace(" ", "")) for word in text.split()]

    return words
