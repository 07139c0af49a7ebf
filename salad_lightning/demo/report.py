"""The miniature's result: ``report.json``, a table, and plots a person can read."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from salad_lightning.demo.arms import Arm, arm_row, learning_curve
from salad_lightning.demo.stage2 import STAGE2_ARMS, selection_of

__all__ = ["environment", "plot_selection", "write_report"]

_SHORT = {
    "stage1_kl": "I: KL",
    "stage1_nll": "I: NLL",
    "stage2_active": "II: active",
    "stage2_uniform": "II: uniform",
    "stage1_more": "more of I",
}
_SELECTIONS = {arm.name: arm.selection.name for arm in STAGE2_ARMS if arm.selection}
_DECAY_FRACTION = 0.2  # of recipes/stage1.yaml
_PACKAGES = ("torch", "torchaudio", "lightning", "transformers", "webdataset", "jsonargparse", "salad-lightning")
_LABELS = {
    "stage1_kl": "Stage I, KL (SALAD)",
    "stage1_nll": "Stage I, NLL",
    "stage2_active": "Stage II, active (SALAD)",
    "stage2_uniform": "Stage II, uniform",
    "stage1_more": "more of Stage I",
}


def environment() -> dict[str, Any]:
    """Versions and machine, for every result that is written down."""
    cpus = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "machine": {"cpu": cpus[0] if cpus else platform.processor(), "cores": len(cpus), "system": platform.system()},
    }


def write_report(arms: list[Arm], root: Path) -> dict[str, Any]:
    """Collect the arms' figures, write ``report.json`` and the plots into ``root``, and print the table.

    Args:
        arms: Tested arms.
        root: The demo's folder.

    Returns:
        The report.
    """
    report = {"arms": [_row(arm, root) for arm in arms], **environment()}
    aside = root / "report.json.part"
    aside.write_text(json.dumps(report, indent=1))
    aside.replace(root / "report.json")
    matplotlib.use("Agg")
    order = [json.loads(line)["name"] for line in _lines(root / "world" / "domains.jsonl")]
    shares = {row["name"]: row["speech_share"] for row in map(json.loads, _lines(root / "world" / "domains.jsonl"))}
    _plot_gap(report["arms"], order, shares, root / "gap_by_domain.png")
    _plot_causes(report["arms"], order, root / "misalignment_and_forgetting.png")
    _plot_curves(arms, root, root / "learning_curves.png")
    if any("selection" in row for row in report["arms"]):
        plot_selection(root, order, root / "selection.png")
    _print_table(report["arms"])
    return report


def _row(arm: Arm, root: Path) -> dict[str, Any]:
    row = arm_row(arm, root)
    return row | {"selection": selection_of(_SELECTIONS[arm.name], root)} if arm.name in _SELECTIONS else row


def _plot_gap(rows: list[dict[str, Any]], order: list[str], shares: dict[str, float], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 4))
    width = 0.8 / (len(rows) + 1)
    base = rows[0]["base_text_accuracy"]["domains"]
    axes.bar(range(len(order)), [base[name] for name in order], width, label="original LLM, text", color="0.7")
    for number, row in enumerate(rows, 1):
        heights = [row["speech_accuracy"]["domains"][name] for name in order]
        axes.bar([x + number * width for x in range(len(order))], heights, width, label=_label(row) + ", speech")
    axes.axhline(0.25, color="0.3", linestyle=":", label="chance")
    ticks = [f"{name}\n{shares[name]:.1%}" for name in order]
    axes.set_xticks([x + width * len(rows) / 2 for x in range(len(order))], ticks, fontsize=8)
    axes.set(ylim=(0, 1.25), ylabel="accuracy", xlabel="domain, and its share of the natural speech heard in training")
    axes.set_title("Answering questions: text against speech (sentences and voices not heard in training)")
    axes.legend(fontsize=8, ncols=4, loc="upper center")
    _save(figure, path)


def _plot_causes(rows: list[dict[str, Any]], order: list[str], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(11, 4))
    width = 0.8 / len(rows)
    for panel, name, title in (
        (panels[0], "misalignment", "M: same model, text against speech context"),
        (panels[1], "forgetting", "F: original against adapted model, on text"),
    ):
        for number, row in enumerate(rows):
            heights = [row[name]["domains"][domain] for domain in order]
            panel.bar([x + number * width for x in range(len(order))], heights, width, label=_label(row))
        panel.set_xticks([x + 0.4 for x in range(len(order))], order, rotation=40, ha="right", fontsize=8)
        panel.set(title=title, ylabel="nats per token")
        panel.legend(fontsize=8)
    _save(figure, path)


def _plot_curves(arms: list[Arm], root: Path, path: Path) -> None:
    columns = {
        "val/questions/kl": "KL( original on text ‖ adapted on speech )",
        "val/questions/misalignment": "misalignment M",
        "val/questions/forgetting": "forgetting F",
    }
    figure, panels = plt.subplots(1, len(columns), figsize=(12, 3.6))
    for panel, (column, title) in zip(panels, columns.items(), strict=True):
        for arm in arms:
            points = learning_curve(arm, root, column)
            label = _LABELS.get(arm.name, arm.name)
            begin = _tokens_before(arm, arms, root)
            panel.plot([(begin + x) / 1e3 for x, _ in points], [y for _, y in points], marker=".", label=label)
        panel.set(title=title, xlabel="positions seen, thousands", ylabel="nats per token, validation", yscale="log")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    _save(figure, path)


def _tokens_before(arm: Arm, arms: list[Arm], root: Path) -> float:
    """Tokens that an arm's first checkpoint had seen: what goes on from Stage I begins where its decay began."""
    if arm.name not in {other.name for other in STAGE2_ARMS}:
        return 0.0
    first = root / f"{arms[0].name}-{arms[0].seed}"
    fit = json.loads((first / "fit.json").read_text())
    return float(fit["tokens"]) * (1 - _DECAY_FRACTION)


def plot_selection(root: Path, order: list[str], path: Path) -> None:
    """What was chosen and why: M, web and target share of each cluster; seconds of each domain, active and uniform."""
    clusters = sorted(
        (c for c in selection_of("active", root).values() if c["misalignment"] is not None),
        key=lambda c: -float(c["misalignment"]),
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    at = range(len(clusters))
    left.bar([x - 0.2 for x in at], [c["web"] for c in clusters], 0.4, color="0.7", label="share of the text pool")
    left.bar([x + 0.2 for x in at], [c["target"] for c in clusters], 0.4, label="share of what is spoken, γ = 5")
    left.set(xlabel="clusters, the worst understood first", ylabel="share", xticks=[])
    second = left.twinx()
    second.plot(at, [c["misalignment"] for c in clusters], color="tab:red", marker=".", label="M(c)")
    second.set_ylabel("M(c), nats per token", color="tab:red")
    left.legend(fontsize=8, loc="upper center")
    for number, (name, selection) in enumerate(_SELECTIONS.items()):
        seconds = dict.fromkeys(order, 0.0)
        for row in map(json.loads, _lines(root / f"selection_{selection}" / "manifest.jsonl")):
            seconds[row["domain"]] += row["estimated_seconds"]
        right.bar([x + 0.4 * number for x in range(len(order))], seconds.values(), 0.4, label=_LABELS[name])
    right.set_xticks([x + 0.2 for x in range(len(order))], order, rotation=40, ha="right", fontsize=8)
    right.set(ylabel="seconds of synthetic speech", title="what is spoken for Stage II")
    right.legend(fontsize=8)
    _save(figure, path)


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title="The miniature: sentences and voices not heard in training; chance is 0.25")
    table.add_column("stage and arm")
    for row in rows:
        table.add_column(_SHORT.get(row["name"], row["name"]), justify="right")

    def add(label: str, figure: str, group: str) -> None:
        table.add_row(label, *(f"{row[figure][group]:.3f}" for row in rows))

    for group in ("heard", "unheard"):
        add(f"speech accuracy, {group} domains", "speech_accuracy", group)
        add(f"text accuracy, {group} domains", "text_accuracy", group)
        add(f"original LLM, {group} domains", "base_text_accuracy", group)
        table.add_row(
            f"gap, {group} domains",
            *(f"{row['base_text_accuracy'][group] - row['speech_accuracy'][group]:.3f}" for row in rows),
        )
        add(f"M, {group} domains (nats/token)", "misalignment", group)
        add(f"F, {group} domains (nats/token)", "forgetting", group)
        table.add_section()
    for control in ("muted", "shuffled"):
        values = (fmean(row[f"{control}_speech_accuracy"]["domains"].values()) for row in rows)
        table.add_row(f"control: {control} audio", *(f"{value:.3f}" for value in values))
    table.add_row("training time (s)", *(f"{row['train_seconds']:.0f}" for row in rows))
    Console().print(table)


def _label(row: dict[str, Any]) -> str:
    return _LABELS.get(row["name"], str(row["name"]))


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _lines(path: str | Path) -> list[str]:
    path = Path(path)
    return path.read_text().splitlines() if path.exists() else []
