import itertools

import pytest

from salad_lightning.training.schedule import WarmupStableDecay


def test_warmup_stable_decay():
    schedule = WarmupStableDecay(warmup_steps=10, decay_fraction=0.2)
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10:80] == [1.0] * 70
    assert factors[81] == pytest.approx(19 / 20)
    assert factors[99] == pytest.approx(1 / 20)
    assert factors[100] == 0.0
    assert schedule.decay_start(100) == 80
    assert all(a <= b for a, b in itertools.pairwise(factors[:11]))


def test_stage_two_is_linear_to_zero():
    schedule = WarmupStableDecay(warmup_steps=0, decay_fraction=1.0)
    assert [schedule.factor(step, 4) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("wrong", [{"warmup_steps": -1}, {"decay_fraction": 1.5}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        WarmupStableDecay(**wrong)
