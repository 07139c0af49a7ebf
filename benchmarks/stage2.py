"""Active selection against its controls: γ × budget of synthetic speech × seed, on worlds that no setting was tried on.

Run by: python -m benchmarks.stage2 --budget-minutes 60

All arms of a seed go on from one pre-decay checkpoint of Stage I, for as many steps, at the same learning rates. A seed
decides connector, warm-up, the order of the data and what is drawn; clusters and probes are made with one seed. The
metric was fixed before the runs: mean speech accuracy and mean M over the thinly heard and unheard domains, on unseen
sentences and voices.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from scipy.stats import spearmanr

from benchmarks.grid import RECIPES, RESULTS, ROOT, STAGE2_RECIPES, Run, markdown, run_all, summarise, work_folder
from salad_lightning.demo.arms import Arm, arm_steps, base_steps
from salad_lightning.demo.stage2 import Selection, Stage2Arm, selection_of, stage2_steps
from salad_lightning.demo.world import words_of

STUDY = "stage2"
# World 0 is the demo's, on which the settings were chosen.
WORLDS = (1, 2)
STAGE1 = "stage1_kl"
CONTROLS = (Stage2Arm("stage1_more", weights=(2.0, 1.0)), Stage2Arm("text_more", weights=(1.0, 2.0)))
# (γ, share of the natural speech); what comes first is the smallest grid that counts.
FIRST = tuple((gamma, share) for share in (0.1, 0.03) for gamma in (0.0, 5.0, 1.0))
THEN = ((0.0, 0.01), (5.0, 0.01), (2.0, 0.1), (2.0, 0.03), (0.0, 0.3), (5.0, 0.3), (1.0, 0.01), (2.0, 0.01))
FIGURES = {
    "speech, heard": lambda row: row["speech_accuracy"]["heard"],
    "speech, unheard": lambda row: row["speech_accuracy"]["unheard"],
    "text, unheard": lambda row: row["text_accuracy"]["unheard"],
    "M, heard": lambda row: row["misalignment"]["heard"],
    "M, unheard": lambda row: row["misalignment"]["unheard"],
    "F, heard": lambda row: row["forgetting"]["heard"],
    "F, unheard": lambda row: row["forgetting"]["unheard"],
    "synthetic minutes": lambda row: row.get("synthetic_seconds", 0.0) / 60,
}


def arm_name(gamma: float, share: float) -> str:
    """As in the table and the folders."""
    return f"{f'active-{gamma:g}' if gamma else 'uniform'}-{100 * share:g}pct"


def stage2_arm(gamma: float, share: float, seed: int) -> Stage2Arm:
    """One with synthetic speech."""
    name = arm_name(gamma, share)
    return Stage2Arm(name, Selection(f"{name}-{seed}", (f"--draw.gamma={gamma}", f"--draw.share={share}")))


def runs(seeds: int, worlds: Sequence[int], grid: Sequence[tuple[float, float]], *, text_more: bool) -> list[Run]:
    """All arms of a world and a seed before the next ones."""
    found = []
    for seed in range(seeds):
        for world in worlds:
            stage1 = Arm(STAGE1, seed=seed)
            base = [*base_steps(RECIPES, ROOT, world_seed=world), *arm_steps(stage1, RECIPES, ROOT)]
            # The first selection makes what the others' draws share, whichever arms are run in one sitting.
            first = stage2_arm(*FIRST[0], seed)
            arms = [*CONTROLS[: 1 + text_more], *(stage2_arm(gamma, share, seed) for gamma, share in grid)]
            found.append(Run(stage1, base, world))
            for arm in arms:
                other = arm.selection is not None and arm != first
                steps = stage2_steps(RECIPES, ROOT, stage1, [first, arm] if other else [arm], world_seed=world)
                if other:  # only the scores of the first are needed
                    its = [step for step in steps if step.name.endswith(f"{first.name}-{seed}")]
                    steps = [step for step in steps if step not in its or step.name.startswith("select")]
                found.append(Run(Arm(arm.name, seed=seed), [*base, *steps], world))
    return found


def figures(run: Run, root: Path) -> dict[str, Any]:
    """Of the selection: each cluster's shares, M and seconds."""
    for gamma, share in (*FIRST, *THEN):
        arm = stage2_arm(gamma, share, run.arm.seed)
        if arm.name == run.arm.name and arm.selection is not None:
            clusters = selection_of(arm.selection.name, root)
            seconds = sum(cluster["seconds"] for cluster in clusters.values())
            return {"gamma": gamma, "share": share, "synthetic_seconds": round(seconds, 1), "selection": clusters}
    return {}


def paired(rows: Iterable[dict[str, Any]], one: str, other: str, figure: str, group: str) -> list[float]:
    """Differences of two arms on the same world and seed."""
    values: dict[str, dict[tuple[int, int], float]] = {one: {}, other: {}}
    for row in rows:
        if row["name"] in values:
            values[row["name"]][row["world"], row["seed"]] = row[figure][group]
    return [value - values[other][place] for place, value in values[one].items() if place in values[other]]


def pairs_table(rows: list[dict[str, Any]], pairs: Sequence[tuple[str, str]]) -> str:
    """Paired differences, their mean and standard deviation, and how many favour the first."""
    lines = ["| pair | runs | speech, unheard | M, unheard | speech, heard |", "|---|---|---|---|---|"]
    for one, other in pairs:
        cells = []
        for figure, group, better in (
            ("speech_accuracy", "unheard", 1),
            ("misalignment", "unheard", -1),
            ("speech_accuracy", "heard", 1),
        ):
            found = paired(rows, one, other, figure, group)
            if not found:
                break
            spread = stdev(found) if len(found) > 1 else 0.0
            wins = sum(better * difference > 0 for difference in found)
            cells.append(f"{fmean(found):+.3f} ± {spread:.3f} ({wins} of {len(found)} better)")
        if cells:
            lines.append(f"| {one} − {other} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rank_correlation(rows: Iterable[dict[str, Any]]) -> tuple[float, int, list[tuple[float, float]]]:
    """Spearman's ρ of M and speech accuracy over all runs and domains, their number, and the points."""
    points = [
        (float(value), float(row["speech_accuracy"]["domains"][domain]))
        for row in rows
        for domain, value in row["misalignment"]["domains"].items()
    ]
    return float(spearmanr(*zip(*points, strict=True)).statistic), len(points), points


def plot_correlation(rows: list[dict[str, Any]], path: Path) -> None:
    """Speech accuracy against M, a point for each run and domain."""
    matplotlib.use("Agg")
    rho, number, points = rank_correlation(rows)
    figure, panel = plt.subplots(figsize=(6, 4))
    panel.scatter(*zip(*points, strict=True), s=8, alpha=0.4)
    panel.axhline(0.25, color="0.4", linestyle=":", label="chance")
    panel.set(xscale="log", xlabel="M, nats per token", ylabel="speech accuracy")
    panel.set_title(f"Spearman ρ = {rho:.2f} over {number} runs × domains")
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def hearings(manifest: Path, domains: Path) -> dict[str, float]:
    """How often a word of the pool's under-covered domains is heard in a selection, on average over its words."""
    thin = {row["name"] for row in map(json.loads, domains.read_text().splitlines()) if not row["heard"]}
    pool = [json.loads(line) for line in domains.with_name("pool.jsonl").read_text().splitlines()]
    words = {word for row in pool if row["domain"] in thin for word in words_of(row["text"])}
    # Those that the well covered domains do not share: the others are heard in natural speech.
    words -= {word for row in pool if row["domain"] not in thin for word in words_of(row["text"])}
    chosen = [words_of(json.loads(line)["text"]) for line in manifest.read_text().splitlines()]
    said = Counter(word for text in chosen for word in text if word in words)
    return {"words": len(words), "hearings": said.total() / len(words), "never": 1 - len(said) / len(words)}


def hearings_table(worlds: Sequence[int], seeds: int) -> str:
    """Of every selection that has been made: texts, and hearings of the under-covered domains' own words."""
    lines = ["| selection | texts | hearings a word | words never heard |", "|---|---|---|---|"]
    for gamma, share in (*FIRST, *THEN):
        found = []
        for world in worlds:
            for seed in range(seeds):
                folder = work_folder(world) / ROOT
                manifest = folder / f"selection_{arm_name(gamma, share)}-{seed}" / "manifest.jsonl"
                if manifest.exists():
                    texts = len(manifest.read_text().splitlines())
                    found.append({"texts": texts, **hearings(manifest, folder / "world" / "domains.jsonl")})
        if found:
            mean = {name: fmean(row[name] for row in found) for name in found[0]}
            cells = f"{mean['texts']:.0f} | {mean['hearings']:.1f} | {mean['never']:.0%}"
            lines.append(f"| {arm_name(gamma, share)} | {cells} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy and M against minutes of synthetic speech, one line a γ, by coverage of the domains."""
    matplotlib.use("Agg")
    minutes = {row["share"]: row["synthetic_seconds"] / 60 for row in rows if "share" in row}
    figure, panels = plt.subplots(2, 2, figsize=(11, 7), sharex=True)
    for line, (name, label) in zip(
        panels, (("speech_accuracy", "speech accuracy"), ("misalignment", "M, nats per token")), strict=True
    ):
        for panel, group in zip(line, ("heard", "unheard"), strict=True):
            for gamma in (0.0, 1.0, 2.0, 5.0):
                points = []
                for share in sorted({row["share"] for row in rows if row.get("gamma") == gamma}):
                    members = [row for row in rows if (row.get("gamma"), row.get("share")) == (gamma, share)]
                    values = [row[name][group] for row in members]
                    spread = stdev(values) if len(values) > 1 else 0.0
                    points.append((fmean(row["synthetic_seconds"] for row in members) / 60, fmean(values), spread))
                if points:
                    label_of = f"γ = {gamma:g}" if gamma else "uniform"
                    panel.errorbar(*zip(*points, strict=True), marker="o", capsize=2, label=label_of)
            for control, style in ((STAGE1, ":"), ("stage1_more", "--"), ("text_more", "-.")):
                values = [row[name][group] for row in rows if row["name"] == control]
                if values:
                    panel.axhline(fmean(values), color="0.4", linestyle=style, label=control.replace("_", " "))
            panel.set(ylabel=label, title=f"{'well covered' if group == 'heard' else 'under-covered'} domains")
            panel.grid(alpha=0.3)
            panel.set_xscale("log")
            panel.set_xticks(list(minutes.values()), [f"{value:.1f}" for value in minutes.values()])
            panel.minorticks_off()
            panel.legend(fontsize=7)
    for panel in panels[1]:
        panel.set_xlabel("minutes of synthetic speech")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run, print the tables, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-minutes", type=float, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--worlds", type=int, nargs="*", default=WORLDS)
    settings = (*FIRST, *THEN)
    parser.add_argument(
        "--settings", type=int, default=len(FIRST), help=f"of γ and budget, in order, up to {len(settings)}"
    )
    parser.add_argument("--text-more", action="store_true", help="the arm with more text in the place of speech, too")
    args = parser.parse_args()
    grid = settings[: args.settings]
    rows = run_all(
        STUDY,
        runs(args.seeds, args.worlds, grid, text_more=args.text_more),
        recipes=STAGE2_RECIPES,
        budget_minutes=args.budget_minutes,
        batch=8,
        figures=figures,
    )
    for world in sorted({row["world"] for row in rows}):  # they differ more than seeds do
        print(
            f"World {world}\n\n" + markdown(summarise([row for row in rows if row["world"] == world], FIGURES)) + "\n"
        )
    shares = sorted({row["share"] for row in rows if "share" in row}, reverse=True)
    print(
        pairs_table(
            rows,
            [(arm_name(5.0, share), arm_name(0.0, share)) for share in shares]
            + [(arm_name(1.0, share), arm_name(0.0, share)) for share in shares]
            + [(arm_name(5.0, share), "stage1_more") for share in shares],
        )
    )
    if rows:
        print("\n" + hearings_table(args.worlds, args.seeds))
        rho, number, _ = rank_correlation(rows)
        print(f"\nSpearman's ρ of M and speech accuracy over {number} runs × domains: {rho:.3f}")
        plot(rows, RESULTS / f"{STUDY}.png")
        plot_correlation(rows, RESULTS / f"{STUDY}_correlation.png")


if __name__ == "__main__":
    main()
