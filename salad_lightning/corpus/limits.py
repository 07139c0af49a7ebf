"""Numbers on the command line, checked before anything is read or written."""

from __future__ import annotations

import math

from salad_lightning.errors import UserError

__all__ = ["check_limits", "check_positive", "check_sizes"]


def check_limits(option: str, value: float | None, low: float, high: float = math.inf, unit: str = "") -> None:
    """Refuse a number outside of ``[low, high]``, or that is none.

    Args:
        option: Where the user typed it.
        value: None where it was not given.
        low: Smallest.
        high: Largest; infinity where any finite one will do.
        unit: Of all three.

    Raises:
        UserError: With the range.
    """
    if value is None or (math.isfinite(value) and low <= value <= high):
        return
    allowed = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
    raise UserError(f"{value} is out of range", where=option, cure=f"give {allowed} {unit}".rstrip())


def check_positive(option: str, value: float | None, unit: str = "") -> None:
    """Refuse what is not above 0; arguments and errors as in `check_limits`."""
    if value is not None and not 0 < value < math.inf:
        raise UserError(f"{value} is out of range", where=option, cure=f"give more than 0 {unit}".rstrip())


def check_sizes(samples_per_shard: int, workers: int, sample_rate_hz: int | None, max_bad_fraction: float) -> None:
    """What ``prepare`` and ``synthesize`` both take.

    Raises:
        UserError: For the first that is out of range.
    """
    check_limits("--samples-per-shard", samples_per_shard, 1)
    check_limits("--workers", workers, 1)
    check_limits("--sample-rate", sample_rate_hz, 1000, 192_000, "Hz")
    check_limits("--max-bad-fraction", max_bad_fraction, 0, 1)
