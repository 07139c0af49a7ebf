"""What ``prepare`` leaves out, and the reasons it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from salad_lightning.corpus.limits import check_limits, check_positive

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BROKEN", "Rejection", "Rules"]

BROKEN = ("broken row", "no text", "unreadable audio", "bad word times", "duplicate key")
"""Reasons that count towards the budget of broken rows; the others are the user's own rules."""


class Rejection(NamedTuple):
    """A row, or a segment of one, that is left out.

    Attributes:
        where: File and line.
        key: The sample's key.
        reason: One of `BROKEN`, or a rule's.
        detail: What exactly.
        cure: What to do about it.
    """

    where: str
    key: str
    reason: str
    detail: str
    cure: str = ""


@dataclass(frozen=True)
class Rules:
    """Limits of what is kept; None sets none.

    Attributes:
        min_seconds: Shortest sample.
        max_seconds: Longest sample; longer recordings with word times are cut in pauses.
        min_level_dbfs: Lowest root mean square.
        max_clipped: Largest share of samples at full scale, 0 to 1.
        min_chars_per_second: Slowest speech; fewer characters hint at missing text.
        max_chars_per_second: Fastest speech; more characters hint at missing audio.
    """

    min_seconds: float | None = None
    max_seconds: float | None = None
    min_level_dbfs: float | None = None
    max_clipped: float | None = None
    min_chars_per_second: float | None = None
    max_chars_per_second: float | None = None

    def check(self) -> None:
        """Refuse limits that no sample, or every one, would break.

        Raises:
            UserError: With the option and its range.
        """
        check_limits("--min-seconds", self.min_seconds, 0, unit="s")
        check_positive("--max-seconds", self.max_seconds, "s")
        check_limits("--min-level", self.min_level_dbfs, -120, 0, "dBFS")
        check_limits("--max-clipped", self.max_clipped, 0, 1)
        check_limits("--min-chars-per-second", self.min_chars_per_second, 0)
        check_positive("--max-chars-per-second", self.max_chars_per_second)

    def broken_by(self, audio: NDArray[np.float32], sample_rate_hz: int, text: str) -> tuple[str, str] | None:
        """Reason and detail of the first rule that a sample breaks, or None.

        Args:
            audio: ``[L]``.
            sample_rate_hz: Of the audio.
            text: Transcript.
        """
        from salad_lightning.corpus.sound import clipped_share, level_dbfs  # here: `prepare --help` needs no numpy

        seconds = len(audio) / sample_rate_hz
        pace = len(text) / seconds
        if _below(seconds, self.min_seconds):
            return "too short", f"{seconds:.2f} s"
        if _below(self.max_seconds, seconds):
            return "too long", f"{seconds:.2f} s"
        if self.min_level_dbfs is not None and _below(level := level_dbfs(audio), self.min_level_dbfs):
            return "too quiet", f"{level:.1f} dBFS"
        if self.max_clipped is not None and _below(self.max_clipped, share := clipped_share(audio)):
            return "clipped", f"{100 * share:.2f} % of the samples"
        if _below(pace, self.min_chars_per_second) or _below(self.max_chars_per_second, pace):
            return "characters per second", f"{pace:.1f}"
        return None


def _below(value: Any, limit: Any) -> bool:
    """Whether ``value < limit``, where both are set."""
    return value is not None and limit is not None and bool(value < limit)
