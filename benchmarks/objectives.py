"""KL against NLL, fairly: alpha × LLM learning rate × seed, equal effort, sentences and voices not heard in training.

Run by: python -m benchmarks.objectives --budget-minutes 60

The front of (low forgetting F, high speech accuracy) says which objective is better where.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

from benchmarks.grid import RESULTS, markdown, run_grid, summarise
from salad_lightning.demo.arms import Arm

STUDY = "objectives"
ALPHAS = (1.0, 0.5, 0.0)
LLM_RATES = (1e-4, 3e-4, 1e-3)
_NAMES = {1.0: " (KL: SALAD)", 0.0: " (NLL)"}
FIGURES = {
    "speech, heard": lambda row: row["speech_accuracy"]["heard"],
    "speech, unheard": lambda row: row["speech_accuracy"]["unheard"],
    "text, heard": lambda row: row["text_accuracy"]["heard"],
    "text, unheard": lambda row: row["text_accuracy"]["unheard"],
    "M, heard": lambda row: row["misalignment"]["heard"],
    "M, unheard": lambda row: row["misalignment"]["unheard"],
    "F, heard": lambda row: row["forgetting"]["heard"],
    "F, unheard": lambda row: row["forgetting"]["unheard"],
}


def arms(seeds: int) -> list[Arm]:
    """The whole grid of a seed before the next seed."""
    return [
        Arm(
            f"alpha-{alpha:g}-lr-{rate:g}",
            (
                "--model.init_args.objective=MixtureObjective",
                f"--model.init_args.objective.init_args.alpha={alpha}",
                f"--model.init_args.llm_lr={rate}",
            ),
            seed,
        )
        for seed, rate, alpha in product(range(seeds), (LLM_RATES[1], LLM_RATES[0], LLM_RATES[2]), ALPHAS)
    ]


def plot(table: dict[str, dict[str, tuple[float, float, int]]], path: Path) -> None:
    """F against speech accuracy, one line an alpha over learning rates."""
    matplotlib.use("Agg")
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    for panel, group in zip(panels, ("heard", "unheard"), strict=True):
        for alpha in ALPHAS:
            names = [f"alpha-{alpha:g}-lr-{rate:g}" for rate in LLM_RATES]
            found = [table[name] for name in names if name in table]
            x, y = ([row[f"{figure_name}, {group}"] for row in found] for figure_name in ("F", "speech"))
            panel.errorbar(
                [mean for mean, _, _ in x], [mean for mean, _, _ in y],
                xerr=[spread for _, spread, _ in x], yerr=[spread for _, spread, _ in y],
                marker="o", capsize=2, label=f"α = {alpha:g}{_NAMES.get(alpha, '')}",
            )  # fmt: skip
            for rate, (fx, _, _), (fy, _, _) in zip(LLM_RATES, x, y, strict=False):
                panel.annotate(f"{rate:g}", (fx, fy), fontsize=7, textcoords="offset points", xytext=(4, 4))
        panel.set(xscale="log", xlabel="forgetting F (nats per token)", ylabel="speech accuracy")
        panel.set_title(f"{group} domains")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.suptitle("Up and to the left is better; labels are LLM learning rates")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run, print the table, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-minutes", type=float, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    table = summarise(run_grid(STUDY, arms(args.seeds), budget_minutes=args.budget_minutes), FIGURES)
    print(markdown(table))
    if table:
        plot(table, RESULTS / f"{STUDY}.png")


if __name__ == "__main__":
    main()
