"""The table of a spoken evaluation: base LLM, adapted model and cascade on the same items, task by task."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from rich.table import Table

from salad_lightning.evaluation.bootstrap import bootstrap_interval

__all__ = ["BASE", "CASCADE", "SPEECH", "TEXT", "compare", "draw", "rich_table", "to_markdown"]

BASE, TEXT, SPEECH, CASCADE = "base LLM, text", "adapted, text", "adapted, speech", "cascade, speech"
_CAUSES = ("misalignment", "forgetting", "kl", "nll")

Right = Mapping[str, bool]


def compare(
    right: Mapping[str, Mapping[str, Right]],
    figures: Mapping[str, Mapping[str, Any]],
    cascades: Mapping[str, str],
    controls: Collection[str] = (),
) -> dict[str, Any]:
    """Accuracies, gaps and their intervals.

    Args:
        right: Task → accuracy's name → item → whether it was answered rightly, as `GapReport.right`.
        figures: Task → figure → value, as `GapReport.overall`.
        cascades: Task → the set of its transcripts, whose ``base_text_accuracy`` is the cascade's.
        controls: Tasks whose speech is muted or another item's; they are left out of the mean.

    Returns:
        ``{"tasks": {name: {"items", "rows": {label: {"accuracy", "interval", "gap", "gap_interval"}}, causes …}},
        "mean": {label: {"accuracy", "gap"}}}``. A gap is the base LLM's accuracy on text − the row's.
    """
    tasks: dict[str, Any] = {}
    for name, flags in right.items():
        if name in cascades.values() or not flags:
            continue
        rows = {BASE: flags["base_text_accuracy"], TEXT: flags["text_accuracy"], SPEECH: flags["speech_accuracy"]}
        if name in cascades:
            rows[CASCADE] = right[cascades[name]]["base_text_accuracy"]
        # A run of a part of the sets (`limit_test_batches`) may have heard other items than it has read.
        common = set.intersection(*(set(row) for row in rows.values()))
        if not common:
            continue
        rows = {label: {item: row[item] for item in sorted(common)} for label, row in rows.items()}
        causes = {cause: figures[name][cause] for cause in _CAUSES if cause in figures[name]}
        tasks[name] = {
            "items": len(rows[BASE]),
            "rows": {label: _row(mine, rows[BASE]) for label, mine in rows.items()},
            **causes,
        }
    counted = [task["rows"] for name, task in tasks.items() if name not in controls]
    mean = {
        label: {key: fmean(rows[label][key] for rows in counted) for key in ("accuracy", "gap")}
        for label in (BASE, TEXT, SPEECH, CASCADE)
        if counted and all(label in rows for rows in counted)
    }
    return {"tasks": tasks, "mean": mean}


def _row(mine: Right, base: Right) -> dict[str, Any]:
    gaps = [float(base[key]) - float(mine[key]) for key in base]
    values = [float(mine[key]) for key in base]
    return {
        "accuracy": fmean(values),
        "interval": bootstrap_interval(values),
        "gap": fmean(gaps),
        "gap_interval": bootstrap_interval(gaps),
    }


_HEAD = ("task", "model, input", "accuracy", "95 % interval", "gap", "95 % interval", "M", "F", "WER")


def _cells(content: Mapping[str, Any]) -> Sequence[tuple[str, ...]]:
    cells = []
    for name, task in content["tasks"].items():
        for label, row in task["rows"].items():
            gap = ("", "") if label == BASE else (f"{row['gap']:.3f}", _range(row["gap_interval"]))
            cause = {SPEECH: task.get("misalignment"), TEXT: None}.get(label), {TEXT: task.get("forgetting")}.get(label)
            wer = task.get("transcription", {}).get("wer") if label == CASCADE else None
            shown = ("" if value is None else f"{value:.3f}" for value in (*cause, wer))
            title = f"{name} ({task['items']})" if label == BASE else ""
            cells.append((title, label, f"{row['accuracy']:.3f}", _range(row["interval"]), *gap, *shown))
    for label, row in content["mean"].items():
        mean_gap = "" if label == BASE else f"{row['gap']:.3f}"
        title = "mean of tasks" if label == BASE else ""
        cells.append((title, label, f"{row['accuracy']:.3f}", "", mean_gap, "", "", "", ""))
    return cells


def _range(interval: Sequence[float]) -> str:
    return f"{interval[0]:.3f} – {interval[1]:.3f}"


def to_markdown(content: Mapping[str, Any]) -> str:
    """The table, what is in it, and what it is of."""
    lines = ["# Spoken evaluation", "", "| " + " | ".join(_HEAD) + " |", "|---" * len(_HEAD) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in _cells(content)]
    lines += [
        "",
        "The option with the highest mean log-probability per token wins. Gap: accuracy of the base LLM on text − the "
        "row's, over the same items. M (misalignment) and F (forgetting): nats per token of the right options. "
        "Intervals: percentile bootstrap over items; those of gaps over pairs. The mean leaves controls out.",
        "",
    ]
    for key in ("model", "recognizer"):
        if content.get(key):
            lines.append(f"{key}: {content[key]}  ")
    lines += ["", "| task | items | audio | template | examples |", "|---|---|---|---|---|"]
    for name, task in content["tasks"].items():
        made = task.get("fingerprint", {})
        shown = (made.get(key, "–") for key in ("items", "audio", "template", "shots"))
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", "![accuracy and gap](evaluation.png)"]) + "\n"


def rich_table(content: Mapping[str, Any]) -> Table:
    """The table for a terminal of 80 columns; each task has a line of its own above its rows."""
    table = Table(title="Spoken evaluation, with 95 % intervals", box=None, padding=(0, 1, 0, 0), header_style="bold")
    for number, column in enumerate(("model, input", "accuracy", "gap", "M", "F", "WER")):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for task, label, accuracy, interval, gap, gap_interval, *causes in _cells(content):
        if task:
            table.add_row()
            table.add_row(f"[bold]{task}[/bold]")
        ranges = (
            f"{value} ({range_})" if range_ else value for value, range_ in ((accuracy, interval), (gap, gap_interval))
        )
        table.add_row(label, *(text.replace(" – ", "–") for text in ranges), *causes)
    return table


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Accuracies with their intervals, a group of bars a task."""
    matplotlib.use("Agg")  # no display is needed
    tasks = content["tasks"]
    labels = [label for label in (BASE, TEXT, SPEECH, CASCADE) if any(label in t["rows"] for t in tasks.values())]
    figure, axes = plt.subplots(figsize=(2.5 + 1.6 * len(tasks), 4), constrained_layout=True)
    for number, label in enumerate(labels):
        rows = {at: task["rows"][label] for at, task in enumerate(tasks.values()) if label in task["rows"]}
        heights = [row["accuracy"] for row in rows.values()]
        errors = [[max(row["accuracy"] - row["interval"][0], 0) for row in rows.values()],
                  [max(row["interval"][1] - row["accuracy"], 0) for row in rows.values()]]  # fmt: skip
        places = [at + 0.2 * number for at in rows]
        axes.bar(places, heights, 0.2, yerr=errors, capsize=2, color=f"C{number}", label=label)
    axes.set_xticks([at + 0.1 * (len(labels) - 1) for at in range(len(tasks))], list(tasks))
    axes.set(ylim=(0, 1), ylabel="accuracy, with 95 % interval")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
