"""How far a mean over test items could be off: bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Interval", "bootstrap_interval"]


class Interval(NamedTuple):
    """A range that holds the true value with a stated probability.

    Attributes:
        low: Lower end.
        high: Upper end.
    """

    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of a mean over items (B. Efron, "Bootstrap methods", Annals of Statistics 7, 1979).

    For a difference of two accuracies over the same items, give the differences item by item: their resamples are
    then drawn together.

    Args:
        values: One an item, such as 1 where it was answered rightly and 0 elsewhere.
        level: Probability.
        resamples: Samples drawn.
        seed: Of the draws.

    Raises:
        ValueError: If there is no value.
    """
    if not len(values):
        raise ValueError("there are no items")
    # Values are few (0 and 1, or −1, 0 and 1): how often each is drawn is all a mean depends on.
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    total = int(counts.sum())
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=resamples)
    low, high = np.quantile(drawn @ distinct / total, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
