"""What ``prepare`` does to audio: where speech begins and ends, how loud it is, how much of it is clipped."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["active_range", "clipped_share", "first_pause", "level_dbfs", "with_level"]

_FRAME_S = 0.01
_QUIET_DB = -40.0  # below the loudest frame: speech spans about 30 dB, rooms are quieter than that
_MARGIN_S = 0.1
_PAUSE_S = 0.1  # the closure of a plosive inside a word is shorter
_CLIPPED_AT = 0.999


def active_range(audio: NDArray[np.float32], sample_rate_hz: int) -> tuple[int, int]:
    """Samples ``[first, last)`` between leading and trailing silence, with 0.1 s of it left at either end.

    Silence is what lies 40 dB below the loudest 10 ms; audio that is all zero is left as it is.

    Args:
        audio: ``[L]``.
        sample_rate_hz: Of the audio.
    """
    active = np.flatnonzero(_is_active(audio, sample_rate_hz))
    if not len(active):
        return 0, len(audio)
    frame = _frame(sample_rate_hz)
    margin = round(_MARGIN_S * sample_rate_hz)
    return max(int(active[0]) * frame - margin, 0), min((int(active[-1]) + 1) * frame + margin, len(audio))


def first_pause(audio: NDArray[np.float32], sample_rate_hz: int, spans: Sequence[tuple[float, float]]) -> list[float]:
    """When the first pause of 0.1 s or more begins in each of the spans ``(start_s, end_s)``; its end where none does.

    Args:
        audio: ``[L]``; silence as in `active_range`.
        sample_rate_hz: Of the audio.
        spans: Seconds; a pause may reach beyond their ends.
    """
    quiet = ~_is_active(audio, sample_rate_hz)
    frame_s = _frame(sample_rate_hz) / sample_rate_hz
    pause = max(round(_PAUSE_S / frame_s), 1)
    # starts[i]: frames i to i + pause are all quiet; behind the end all is.
    padded = np.concatenate([quiet, np.ones(pause, dtype=bool)])
    starts = np.convolve(padded, np.ones(pause), mode="valid") > pause - 0.5
    found = []
    for start_s, end_s in spans:
        first, last = int(start_s / frame_s), int(end_s / frame_s)
        at = np.flatnonzero(starts[first:last])
        found.append(max((first + int(at[0])) * frame_s, start_s) if len(at) else end_s)
    return found


def level_dbfs(audio: NDArray[np.float32]) -> float:
    """Root mean square in dB below full scale; -inf for digital silence."""
    power = float(np.square(audio, dtype=np.float64).mean())
    return 10 * math.log10(power) if power > 0 else -math.inf


def clipped_share(audio: NDArray[np.float32]) -> float:
    """Share of samples at full scale, 0 to 1."""
    return float((np.abs(audio) >= _CLIPPED_AT).mean())


def with_level(audio: NDArray[np.float32], target_dbfs: float) -> NDArray[np.float32]:
    """The audio at a root mean square of ``target_dbfs``, or quieter where its peaks would exceed full scale."""
    level = level_dbfs(audio)
    if level == -math.inf:
        return audio
    gain = min(10 ** ((target_dbfs - level) / 20), _CLIPPED_AT / float(np.abs(audio).max()))
    return (audio * np.float32(gain)).astype(np.float32)


def _frame(sample_rate_hz: int) -> int:
    return max(round(_FRAME_S * sample_rate_hz), 1)


def _is_active(audio: NDArray[np.float32], sample_rate_hz: int) -> NDArray[np.bool_]:
    """Of every 10 ms, whether it is louder than silence."""
    frame = _frame(sample_rate_hz)
    padded = np.pad(audio, (0, -len(audio) % frame)).reshape(-1, frame)
    power = np.square(padded, dtype=np.float64).mean(axis=1)
    active: NDArray[np.bool_] = power > power.max() * 10 ** (_QUIET_DB / 10)
    return active
