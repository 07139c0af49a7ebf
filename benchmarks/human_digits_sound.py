"""How the benchmark's recordings are made alike, and how training items are made unlike each other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray

__all__ = ["SAMPLE_RATE_HZ", "Voicing", "average_spectrum", "equalise", "narrow", "record", "vary"]

SAMPLE_RATE_HZ = 16_000
_RECORDED_HZ = 8_000
_RMS = 0.06

_BANDS_HZ = np.array([0, 100, 200, 300, 450, 600, 800, 1000, 1300, 1600, 2000, 2500, 3000, 3500, 3900, 8000.0])
_TARGET_DB = -6 * np.log2(np.maximum(_BANDS_HZ, 300) / 300)
"""6 dB less each octave: about the long-term spectrum of speech."""

_MAX_BOOST_DB = 25.0  # more would bring up nothing but noise
_WINDOW = 512


class Voicing(NamedTuple):
    """How a training item is changed, so that few speakers sound like many.

    Attributes:
        speed: Resampling factor; above 1 is faster, higher, and spoken by a shorter vocal tract.
        bands_db: Gain at each of the bands: another microphone, another room. None leaves them.
        gain: Factor.
        noise: Amplitude of white noise.
    """

    speed: float = 1.0
    bands_db: tuple[float, ...] | None = None
    gain: float = 1.0
    noise: float = 0.0

    @classmethod
    def draw(cls, rng: random.Random) -> Voicing:
        """One at random."""
        # Half of the time none: the recordings of the test get none either.
        noise = 10 ** rng.uniform(-4.5, -2.3) if rng.random() < 0.5 else 0.0
        slope = rng.uniform(-8.0, 8.0)
        bands = tuple(rng.gauss(slope * (hz / 4000 - 0.5), 4.0) for hz in _BANDS_HZ)
        return cls(rng.uniform(0.82, 1.22), bands, 10 ** rng.uniform(-0.2, 0.2), noise)


def average_spectrum(clips: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Mean power at each band in dB, relative to 300 Hz, each clip ``[L]`` weighing the same."""
    power = np.zeros(_WINDOW // 2 + 1)
    for clip in clips:
        frames = np.pad(clip, (0, -len(clip) % _WINDOW)).reshape(-1, _WINDOW) * np.hanning(_WINDOW)
        power += (np.abs(np.fft.rfft(frames)) ** 2).sum(0) / max(float((clip**2).sum()), 1e-9)
    grid = np.log(np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE_HZ) + 80)
    weights = np.exp(-0.5 * ((grid - np.log(_BANDS_HZ[:, None] + 80)) / 0.12) ** 2)
    level: NDArray[np.float64] = 10 * np.log10(weights @ power / weights.sum(1) + 1e-9)
    return np.asarray(level - level[3])


def equalise(clip: NDArray[np.float32], spectrum: NDArray[np.float64]) -> NDArray[np.float32]:
    """One microphone's recording as any other's: a fixed average spectrum and a fixed loudness.

    Args:
        clip: ``[L]``.
        spectrum: `average_spectrum` of all that the microphone recorded; needs no transcript.
    """
    gains = np.minimum(_TARGET_DB - spectrum, _MAX_BOOST_DB)
    gains[-1] = gains[-2]  # nothing was recorded up there
    flat = _filter(clip, gains)
    return np.asarray(flat * (_RMS / np.sqrt(np.mean(flat**2) + 1e-9)), dtype=np.float32)


def narrow(audio: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same audio without what an 8 kHz recording cannot hold."""
    low = torchaudio.functional.resample(torch.from_numpy(audio), SAMPLE_RATE_HZ, _RECORDED_HZ)
    wide = torchaudio.functional.resample(low, _RECORDED_HZ, SAMPLE_RATE_HZ)
    return np.asarray(wide[: len(audio)].numpy(), dtype=np.float32)


def vary(clip: NDArray[np.float32], voicing: Voicing) -> NDArray[np.float32]:
    """Apply speed and bands."""
    if voicing.bands_db is not None:
        clip = _filter(clip, np.array(voicing.bands_db))
    if voicing.speed == 1.0:
        return clip
    # Linear interpolation will do: the recordings hold nothing above a quarter of this rate.
    at = np.arange(0, len(clip) - 1, voicing.speed)
    return np.asarray(np.interp(at, np.arange(len(clip)), clip), dtype=np.float32)


def record(audio: NDArray[np.float32], voicing: Voicing, rng: random.Random) -> NDArray[np.float32]:
    """Apply gain and noise."""
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(audio), dtype=np.float32)
    return np.asarray(np.clip(audio * voicing.gain + noise * voicing.noise, -1.0, 1.0), dtype=np.float32)


def _filter(clip: NDArray[np.float32], gains_db: NDArray[np.float64]) -> NDArray[np.float32]:
    frequencies = np.fft.rfftfreq(len(clip), 1 / SAMPLE_RATE_HZ)
    gains = 10 ** (np.interp(frequencies, _BANDS_HZ, gains_db) / 20)
    return np.asarray(np.fft.irfft(np.fft.rfft(clip) * gains, len(clip)), dtype=np.float32)
