"""The studies over seeds: what they would run hangs together, and their arithmetic is right."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import scaling, stage2, trap
from benchmarks.garbled import GarbledSynthesizer
from benchmarks.grid import Run
from salad_lightning.demo.arms import Arm
from salad_lightning.synthesizers.espeak import EspeakSynthesizer


@pytest.mark.parametrize(
    "runs",
    [
        stage2.runs(2, (1, 2), (*stage2.FIRST, *stage2.THEN), text_more=True),
        trap.runs(2, (1,)),
        scaling.runs(2, (1,)),
    ],
    ids=["stage2", "trap", "scaling"],
)
def test_steps_have_what_they_stand_on_and_one_meaning(runs):
    worlds: dict[int, dict[str, object]] = {}
    for run in runs:
        names = {step.name for step in run.steps}
        assert {f"{run.arm.name}-{run.arm.seed}", f"test-{run.arm.name}-{run.arm.seed}"} <= names
        known = worlds.setdefault(run.world, {})
        for step in run.steps:
            assert set(step.after) <= names, step.name
            assert known.setdefault(step.name, step) == step, "two different steps of one name"
            assert all(path.is_file() for path in step.reads)
    assert len({(run.arm, run.world) for run in runs}) == len(runs)


def test_equal_seconds_and_steps_in_every_arm_of_a_budget():
    runs = {run.arm.name: run for run in stage2.runs(1, (1,), stage2.FIRST, text_more=True)}
    for name, other in (("active-5-10pct", "uniform-10pct"), ("active-1-3pct", "uniform-3pct")):
        commands = [
            {word.partition("=")[0]: word for word in _step(runs[which], f"select-{which}-0").command}
            for which in (name, other)
        ]
        different = {key for key in commands[0] | commands[1] if commands[0].get(key) != commands[1].get(key)}
        assert different == {"--draw.gamma", "--output"}


def _step(run: Run, name: str):
    (found,) = (step for step in run.steps if step.name == name)
    return found


def test_pairs_are_of_one_world_and_seed():
    rows = [
        {"name": name, "world": world, "seed": 0, "speech_accuracy": {"heard": 1.0, "unheard": value},
         "misalignment": {"heard": 1.0, "unheard": -value}}
        for name, world, value in (("a", 1, 0.5), ("b", 1, 0.4), ("a", 2, 0.9), ("b", 2, 0.6), ("a", 3, 0.0))
    ]  # fmt: skip
    found = stage2.paired(rows, "a", "b", "speech_accuracy", "unheard")
    assert found == pytest.approx([0.1, 0.3])
    assert "| a − b | 2 | +0.200 ± 0.141 (2 of 2 better) |" in stage2.pairs_table(rows, [("a", "b")])


def test_the_law_is_found_again():
    tokens = np.geomspace(5e4, 2e6, 20)
    noise = np.random.default_rng(0).normal(0, 0.01, 20)
    found = scaling.fit(list(zip(tokens, 0.5 + 2 * (tokens / 1e5) ** -0.7 + noise, strict=True)))
    for name, true in (("E", 0.5), ("B", 2.0), ("β", 0.7)):
        value, low, high = found[name]
        assert low <= value <= high
        assert low - 0.05 < true < high + 0.05
        assert high - low < 0.4


def test_only_listed_texts_are_garbled(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps({"text": "a broken one"}) + "\n")
    garbled, clear = GarbledSynthesizer(str(path)), EspeakSynthesizer()
    assert np.array_equal(garbled.speak("a good one").audio, clear.speak("a good one").audio)
    broken, whole = garbled.speak("a broken one"), clear.speak("a broken one")
    assert not np.array_equal(broken.audio, whole.audio)
    assert np.array_equal(np.sort(broken.audio), np.sort(whole.audio))
    assert broken.words == whole.words


def test_the_arms_of_the_trap_differ_in_filter_and_sharpness():
    uniform, uniform_filtered, open_, filtered = trap.arms(0)
    assert set(uniform.selection.overrides) - set(uniform_filtered.selection.overrides) == {
        "--score.intelligibility=false"
    }
    assert "--draw.gamma=0" in uniform.selection.overrides
    assert uniform.selection.scored == open_.selection.scored
    assert set(open_.selection.overrides) - set(filtered.selection.overrides) == {"--score.intelligibility=false"}
    assert Arm(open_.name) != Arm(filtered.name)
