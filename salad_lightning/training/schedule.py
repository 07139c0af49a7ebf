"""Warm-up, stable, decay: the learning-rate schedule of both stages (arXiv 2510.13632, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["WarmupStableDecay"]


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up, a stable stretch, and a linear decay to zero (WSD, arXiv 2404.06395).

    Args:
        warmup_steps: Optimizer steps from 0 to the full rate.
        decay_fraction: Share of all steps at the end over which the rate falls to 0. 0.2 is Stage I; 1.0 with no
            warm-up is Stage II, linear from the stable rate to 0.
    """

    warmup_steps: int = 500
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of range.
        """
        if self.warmup_steps < 0 or not 0.0 <= self.decay_fraction <= 1.0:
            raise ValueError(f"warmup_steps must be ≥ 0 and decay_fraction in [0, 1], not {self}")

    def decay_start(self, total_steps: int) -> int:
        """The step at which the decay begins, and the pre-decay checkpoint is taken."""
        return total_steps - round(self.decay_fraction * total_steps)

    def factor(self, step: int, total_steps: int) -> float:
        """What to multiply the full rate with at ``step`` (counted from 0); in (0, 1] before ``total_steps``."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        start = self.decay_start(total_steps)
        decay = 1.0 if step < start else max(0.0, (total_steps - step) / max(total_steps - start, 1))
        return min(warmup, decay)
