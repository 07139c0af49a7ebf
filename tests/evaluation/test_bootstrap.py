"""Intervals against scipy's bootstrap, the exact distribution, and coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from salad_lightning.evaluation.bootstrap import bootstrap_interval


def draws(kind, count):
    rng = np.random.default_rng(7)
    right = rng.random((2, count)) < np.array([[0.8], [0.6]])
    return {"accuracy": right[0] * 1.0, "gap": right[0] * 1.0 - right[1], "any": rng.gamma(2, size=count)}[kind]


@pytest.mark.parametrize("kind", ["accuracy", "gap", "any"])
def test_scipys_bootstrap(kind):
    values = draws(kind, 300)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    ours = bootstrap_interval(values)
    # A tenth of the mean's standard error, or the step between two possible means.
    near = max(0.1 * values.std() / np.sqrt(len(values)), 0 if kind == "any" else 1.01 / len(values))
    assert ours == pytest.approx((theirs.low, theirs.high), abs=near)
    assert ours.low < values.mean() < ours.high


def test_other_levels_and_seeds():
    values = draws("accuracy", 200)
    wide, narrow = bootstrap_interval(values, level=0.99), bootstrap_interval(values, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values[::-1]) == bootstrap_interval(values)


def test_a_mean_of_zeros_and_ones_is_binomial():
    values = [1.0] * 70 + [0.0] * 30
    exact = [stats.binom.ppf(q, 100, 0.7) / 100 for q in (0.025, 0.975)]
    assert bootstrap_interval(values) == pytest.approx(exact, abs=0.0101)


def test_it_covers_the_true_value_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = bootstrap_interval(rng.random(150) < 0.7, resamples=1000)
        covered += low <= 0.7 <= high
    assert 0.91 < covered / 400 < 0.98


def test_nothing_has_no_interval():
    with pytest.raises(ValueError, match="no items"):
        bootstrap_interval([])
