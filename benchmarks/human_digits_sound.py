"""How training items of the benchmark are made unlike each other, so that few speakers sound like many."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["SAMPLE_RATE_HZ", "Voicing", "record", "vary"]

SAMPLE_RATE_HZ = 16_000

_BANDS_HZ = np.array([0, 100, 200, 300, 450, 600, 800, 1000, 1300, 1600, 2000, 2500, 3000, 3500, 3900, 8000.0])


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
