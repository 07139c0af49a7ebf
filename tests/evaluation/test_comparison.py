"""The table's means and bars, on answers by hand."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from salad_lightning.evaluation.comparison import BASE, CASCADE, SPEECH, TEXT, compare, draw

NAMES = ("base_text_accuracy", "text_accuracy", "speech_accuracy")


def answers(*flags):
    return {name: dict(zip("abcd", flags, strict=True)) for name in NAMES}


def test_controls_are_no_tasks_of_the_mean():
    right = {
        "arc": answers(True, True, True, False),
        "arc, muted": answers(False, False, False, False),
        "arc (cascade)": answers(True, False, False, False),
    }
    content = compare(right, {name: {} for name in right}, {"arc": "arc (cascade)"}, {"arc, muted"})
    assert set(content["tasks"]) == {"arc", "arc, muted"}
    assert {label: mean["accuracy"] for label, mean in content["mean"].items()} == {
        BASE: 0.75,
        TEXT: 0.75,
        SPEECH: 0.75,
        CASCADE: 0.25,
    }
    assert compare(right, {name: {} for name in right}, {}, set(right))["mean"] == {}


def test_the_cascade_is_counted_over_the_items_of_the_base():
    heard = answers(True, True, False, False)
    del heard["base_text_accuracy"]["d"]  # its audio cannot be decoded, and the source allows that
    right = {"arc": heard, "arc (cascade)": answers(True, False, False, True)}
    rows = compare(right, {name: {} for name in right}, {"arc": "arc (cascade)"})["tasks"]["arc"]["rows"]
    assert rows[CASCADE]["accuracy"] == pytest.approx(1 / 3)
    assert rows[CASCADE]["gap"] == pytest.approx(rows[BASE]["accuracy"] - rows[CASCADE]["accuracy"])


def test_every_row_is_in_the_legend(tmp_path, monkeypatch):
    right = {
        "muted": answers(False, False, False, False),
        "arc": answers(True, True, True, False),
        "arc (cascade)": answers(True, False, False, False),
    }
    content = compare(right, {name: {} for name in right}, {"arc": "arc (cascade)"})
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    draw(content, tmp_path / "figure.png")
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [BASE, TEXT, SPEECH, CASCADE]


def test_only_what_every_row_has_is_compared():
    """A run of a part of the sets hears other items than it reads."""
    read = {name: {"a": True, "b": False, "c": True} for name in NAMES}
    heard = {name: {"b": True, "c": False, "d": True} for name in NAMES}
    right = {"arc": read, "arc (cascade)": heard, "other": answers(True, True, True, True), "other (cascade)": {}}
    right["other (cascade)"] = {name: {} for name in NAMES}
    cascades = {name: f"{name} (cascade)" for name in ("arc", "other")}
    tasks = compare(right, {name: {} for name in right}, cascades)["tasks"]
    assert list(tasks) == ["arc"]
    assert tasks["arc"]["items"] == 2
    assert [tasks["arc"]["rows"][label]["accuracy"] for label in (BASE, CASCADE)] == [0.5, 0.5]
