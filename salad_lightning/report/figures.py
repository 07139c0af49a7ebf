"""The plots of the page."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from salad_lightning.report.run_folder import RunFolder

__all__ = ["causes_figure", "gap_figure", "loss_figure", "selection_figure", "speed_figure"]

_DASHES = ("-", "--", ":", "-.")


def loss_figure(runs: Sequence[RunFolder]) -> Figure | None:
    """Training loss over tokens."""
    return _curves(runs, [("loss", "loss, nats per token")])


def causes_figure(runs: Sequence[RunFolder]) -> Figure | None:
    """Misalignment and forgetting over tokens, as measured in training and on each validation set."""
    return _curves(
        runs,
        [("misalignment", "misalignment M, nats per token"), ("forgetting", "forgetting F, nats per token")],
        log=True,
    )


def speed_figure(runs: Sequence[RunFolder]) -> Figure | None:
    """Throughput over tokens."""
    return _curves(
        runs,
        [("tokens_per_second", "tokens a second"), ("audio_seconds_per_second", "seconds of speech a second")],
    )


def gap_figure(runs: Sequence[RunFolder]) -> Figure | None:
    """Gap of every task, with its 95 % interval, a bar a run."""
    found = {run.name: run.gaps() for run in runs}
    tasks = list(dict.fromkeys(task for gaps in found.values() for task in gaps))
    if not tasks:
        return None
    shown = [name for name, gaps in found.items() if gaps]
    figure, axes = _panels(1, width=max(5.0, 2 + 0.9 * len(tasks) * len(shown)))
    wide = 0.8 / len(shown)
    for number, name in enumerate(shown):
        at = [index + wide * number for index, task in enumerate(tasks) if task in found[name]]
        gaps = [found[name][task] for task in tasks if task in found[name]]
        errors = [[max(gap - low, 0) for gap, low, _ in gaps], [max(high - gap, 0) for gap, _, high in gaps]]
        known = any(map(any, errors))
        axes[0].bar(at, [gap for gap, *_ in gaps], wide, yerr=errors if known else None, capsize=2, label=name)
    axes[0].axhline(0, color="black", linewidth=0.8)
    axes[0].set_xticks([index + wide * (len(shown) - 1) / 2 for index in range(len(tasks))], tasks)
    axes[0].tick_params("x", labelrotation=30 if len(tasks) > 4 else 0)
    axes[0].set(ylabel="accuracy of the base LLM on text\n− of the adapted model on speech")
    axes[0].legend(fontsize=8)
    return figure


def selection_figure(run: RunFolder) -> Figure | None:
    """Share of the web text and of what was chosen, clusters in the order of their misalignment; seconds chosen."""
    kept = [row for row in run.selection.values() if row.get("misalignment") is not None]
    if not kept:
        return None
    kept.sort(key=lambda row: -row["misalignment"])
    ranks = range(len(kept))
    figure, axes = _panels(2)
    axes[0].bar(ranks, [row["target"] for row in kept], label="chosen")
    axes[0].step(ranks, [row["web"] for row in kept], where="mid", color="black", label="web text")
    axes[0].set(xlabel="cluster, highest misalignment first", ylabel="share of texts")
    axes[0].legend(fontsize=8)
    axes[1].stem([row["misalignment"] for row in kept], [row["seconds"] / 60 for row in kept], basefmt="k-")
    axes[1].set(xlabel="misalignment M of the cluster, nats per token", ylabel="minutes of speech chosen")
    return figure


def _curves(runs: Sequence[RunFolder], endings: Sequence[tuple[str, str]], log: bool = False) -> Figure | None:
    logged = [(ending, title) for ending, title in endings if any(run.columns(ending) for run in runs)]
    if not logged:
        return None
    # One axis for all: tokens where every run that is drawn has counted them.
    over_tokens = all(run.counts_tokens for run in runs if any(run.columns(ending) for ending, _ in logged))
    figure, panels = _panels(len(logged))
    for axes, (ending, title) in zip(panels, logged, strict=True):
        values: list[float] = []
        for number, run in enumerate(runs):
            for style, column in enumerate(run.columns(ending)):
                points = run.curve(column, over_tokens)
                values += [y for _, y in points]
                part = column.removesuffix(f"/{ending}")
                axes.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    _DASHES[style % len(_DASHES)],
                    color=f"C{number % 10}",
                    marker="." if len(points) < 30 else "",
                    linewidth=1.2,
                    label=run.name if part == "train" else f"{run.name}, {part}",
                )
        axes.set(xlabel="tokens trained on" if over_tokens else "optimizer steps")
        axes.set_yscale("log" if log and max(values) > 10 * min(values) > 0 else "linear")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def _panels(count: int, width: float | None = None) -> tuple[Figure, Sequence[Axes]]:
    matplotlib.use("Agg")  # no display is needed
    figure, axes = plt.subplots(1, count, figsize=(width or 5.4 * count, 3.6), constrained_layout=True, squeeze=False)
    return figure, list(axes[0])
