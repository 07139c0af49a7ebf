"""Audio files in memory: to mono samples at a rate, and to FLAC."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import soundfile
import torch
import torchaudio
from numpy.typing import NDArray

from salad_lightning.batch import INT16_SCALE
from salad_lightning.errors import UserError

__all__ = [
    "MAX_SECONDS",
    "Clip",
    "Recording",
    "Stretch",
    "as_float",
    "check_length",
    "decode_audio",
    "decoded",
    "encode_flac",
    "open_audio",
    "resample",
]

MAX_SECONDS = 7200.0
"""Longer recordings are refused before they are decoded: a few bytes of FLAC can claim days of silence."""

_MAX_VALUES = 500_000_000  # samples times channels: 2 GB

_MAX_KERNEL = 10_000_000  # of rates without a common divisor, the resampler's filter would fill gigabytes
_BLOCK = 32_768  # samples; longer clips are resampled at multiples of it


@overload
def decode_audio(
    content: bytes, sample_rate_hz: int | None, where: str, *, keep_int16: Literal[False] = False
) -> tuple[NDArray[np.float32], int]: ...


@overload
def decode_audio(
    content: bytes, sample_rate_hz: int | None, where: str, *, keep_int16: bool
) -> tuple[NDArray[Any], int]: ...


def decode_audio(
    content: bytes, sample_rate_hz: int | None, where: str, *, keep_int16: bool = False
) -> tuple[NDArray[Any], int]:
    """An audio file's content as mono samples.

    Args:
        content: Any format soundfile reads.
        sample_rate_hz: Rate to resample to; None keeps the file's own.
        where: File or shard and key, for messages.
        keep_int16: Give 16-bit audio that needs neither mixing nor resampling as it is stored, which takes half the
            memory: see `as_float`.

    Returns:
        ``[L]``, and their rate.

    Raises:
        UserError: If it cannot be decoded or holds no sample.
    """
    with _open(content, where) as file, _refusing(where):
        rate = int(file.samplerate)
        as_stored = keep_int16 and _is_stored_as(file, sample_rate_hz)
        audio = file.read(dtype="int16" if as_stored else "float32", always_2d=True)
    if audio.shape[0] == 0:
        raise UserError("the audio is empty", where=where)
    if audio.dtype == np.float32 and not _is_finite(audio):
        raise UserError("the audio holds NaN or infinite values", where=where, cure="record or convert it again")
    mono: NDArray[Any] = audio[:, 0] if audio.shape[1] == 1 else audio.mean(axis=1)
    if sample_rate_hz is None or rate == sample_rate_hz:
        return np.ascontiguousarray(mono), rate
    return resample(as_float(mono), rate, sample_rate_hz, where), sample_rate_hz


class Recording:
    """A file of 16-bit mono audio, ``[L]``, of which stretches are cut before anything is decoded.

    It is decoded when the first of them is wanted, from its start to where the last one ends, and no further.

    Args:
        file: At its start; closed with the recording.
        where: File or shard and key, for messages.
    """

    def __init__(self, file: soundfile.SoundFile, where: str) -> None:
        self._file, self._where, self._needed = file, where, 0
        self._audio: NDArray[np.int16] = np.zeros(0, dtype=np.int16)

    def __len__(self) -> int:
        return int(self._file.frames)

    def cut(self, start: int, stop: int) -> Stretch:
        """Samples ``[start, stop)``, or as far as the recording goes."""
        stop = min(stop, len(self))
        self._needed = max(self._needed, stop)
        return Stretch(self, min(start, stop), stop)

    def until(self, stop: int) -> NDArray[np.int16]:
        """Its first samples.

        Args:
            stop: How many, at most its length.

        Raises:
            UserError: If they cannot be decoded.
        """
        if len(self._audio) < stop:
            self._needed = max(self._needed, stop)
            with _refusing(self._where):
                if self._file.tell():  # seeking takes time even where nothing has been read
                    self._file.seek(0)
                self._audio = self._file.read(frames=self._needed, dtype="int16", always_2d=True)[:, 0]
            if len(self._audio) < self._needed:
                raise UserError("the audio is shorter than its header says", where=self._where)
        return self._audio[:stop]


class Stretch:
    """Samples ``[start, stop)`` of a `Recording`."""

    def __init__(self, recording: Recording, start: int, stop: int) -> None:
        self._recording, self._start, self._stop = recording, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    @functools.cached_property
    def audio(self) -> NDArray[np.int16]:
        """``[L]``, the same array every time.

        Raises:
            UserError: If it cannot be decoded.
        """
        return self._recording.until(self._stop)[self._start :]


Clip: TypeAlias = NDArray[Any] | Stretch
"""Samples, or what an encoder stored of them, or samples that are not decoded yet."""


def open_audio(content: bytes, sample_rate_hz: int, where: str) -> NDArray[Any] | Recording:
    """As `decode_audio` with ``keep_int16``, but left undecoded where nothing needs mixing or resampling.

    Args:
        content: Any format soundfile reads.
        sample_rate_hz: Rate wanted.
        where: File or shard and key, for messages.

    Raises:
        UserError: As there; what is left undecoded may still be refused when it is decoded.
    """
    file = _open(content, where)
    if _is_stored_as(file, sample_rate_hz) and file.frames:
        return Recording(file, where)
    file.close()
    return decode_audio(content, sample_rate_hz, where, keep_int16=True)[0]


def decoded(clip: Clip) -> NDArray[Any]:
    """A clip as an array.

    Raises:
        UserError: If it cannot be decoded.
    """
    return clip.audio if isinstance(clip, Stretch) else clip


def as_float(audio: NDArray[Any]) -> NDArray[np.float32]:
    """Audio ``[L]``, float or int16 as stored, in [-1, 1]."""
    if audio.dtype == np.int16:
        return audio.astype(np.float32) / np.float32(INT16_SCALE)
    return audio.astype(np.float32, copy=False)


def check_length(num_samples: int, num_channels: int, sample_rate_hz: int, where: str) -> None:
    """Refuse to decode more than memory holds, before any of it is asked for.

    Raises:
        UserError: If it is longer than `MAX_SECONDS`, or has as many values.
    """
    if num_samples > MAX_SECONDS * sample_rate_hz or num_samples * num_channels > _MAX_VALUES:
        raise UserError(
            f"the audio claims {num_samples / sample_rate_hz:.0f} s of {num_channels} channels",
            where=where,
            cure=f"cut it into pieces of at most {MAX_SECONDS:.0f} s",
        )


def resample(audio: NDArray[np.float32], from_hz: int, to_hz: int, where: str = "") -> NDArray[np.float32]:
    """Audio ``[L]`` at another rate, ``[L']`` (sinc interpolation of torchaudio).

    Args:
        audio: ``[L]``.
        from_hz: Its rate.
        to_hz: The rate wanted.
        where: For messages.

    Raises:
        UserError: If the rates have next to nothing in common.
    """
    if from_hz * to_hz > _MAX_KERNEL * math.gcd(from_hz, to_hz) ** 2:
        raise UserError(
            f"{from_hz} Hz or {to_hz} Hz is no usual sample rate", where=where, cure="use a usual one, such as 16000"
        )
    if from_hz == to_hz:
        return np.ascontiguousarray(audio)
    # A convolution is prepared anew for every other length, which takes longer than the convolution: so few lengths.
    # Short clips are convolved by other code, and silence must not make them long.
    padded = np.pad(audio, (0, -len(audio) % _BLOCK if len(audio) > _BLOCK else 0))
    resampled = _resampler(from_hz, to_hz)(torch.from_numpy(padded))
    num_samples = math.ceil(np.float32(to_hz * len(audio) / from_hz))  # torchaudio's own rounding
    return np.ascontiguousarray(resampled[:num_samples].numpy())


def encode_flac(audio: NDArray[np.float32], sample_rate_hz: int) -> bytes:
    """Mono audio ``[L]`` in [-1, 1] as 16-bit FLAC.

    Raises:
        ValueError: If ``audio`` is empty or has more than one axis.
    """
    if audio.ndim != 1 or audio.size == 0:
        raise ValueError(f"expected audio of shape [L] with L ≥ 1, got {audio.shape}")
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, sample_rate_hz, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _open(content: bytes, where: str) -> soundfile.SoundFile:
    with _refusing(where):
        file = soundfile.SoundFile(io.BytesIO(content))
    check_length(file.frames, file.channels, int(file.samplerate), where)
    return file


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    try:
        yield
    except (soundfile.SoundFileError, RuntimeError) as error:
        # Its own text names the buffer in memory, at another address in every run.
        reason = getattr(error, "error_string", None) or str(error)
        raise UserError(f"the audio cannot be decoded ({reason})", where=where) from error


def _is_stored_as(file: soundfile.SoundFile, sample_rate_hz: int | None) -> bool:
    """Whether the 16 bits of the file are what is wanted, neither mixed nor resampled."""
    return file.subtype == "PCM_16" and file.channels == 1 and sample_rate_hz in (None, int(file.samplerate))


def _is_finite(audio: NDArray[np.float32]) -> bool:
    # Of all values at once, without a mask of them; finite ones of full scale stay far from the largest float.
    with np.errstate(all="ignore"):
        return math.isfinite(float(audio.sum()))


@functools.lru_cache(maxsize=16)
def _resampler(from_hz: int, to_hz: int) -> torchaudio.transforms.Resample:
    # Its filter kernel costs more than resampling one clip.
    return torchaudio.transforms.Resample(from_hz, to_hz)
