"""Objectives × data regimes: misalignment on broad held-out speech against training tokens.

Run by: python -m benchmarks.scaling --budget-minutes 60

{NLL, KL} × {narrow speech: most of it about four of ten domains, broad: all alike}. One run at a constant learning rate
gives all budgets: M is taken on the way, on questions about all domains by unseen voices. Fit: M = E + B · D^−β
(arXiv 2510.13632, section 3). The regimes differ in the natural speech alone: all arms begin with a connector that was
warmed up on the narrow speech, and read the same plain text.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from scipy.optimize import curve_fit

from benchmarks.grid import HERE, RECIPES, RESULTS, ROOT, STAGE1_RECIPES, Run, run_all
from salad_lightning.demo.arms import Arm, arm_steps, base_steps, cli, learning_curve
from salad_lightning.demo.build import NUM_SPOKEN_DOCUMENTS
from salad_lightning.demo.pipeline import Step
from salad_lightning.demo.speech import natural_speech, speak_all
from salad_lightning.demo.world import build_world

STUDY = "scaling"
OBJECTIVES = {"kl": "ForwardKLObjective", "nll": "NLLObjective"}
REGIMES = ("narrow", "broad")
STEPS = 1_600
BUDGETS = (100, 200, 400, 800, 1_200, 1_600)
"""Steps at which M is read."""
FIRST_STEP = 200
"""The fit leaves out what comes before: the learning rate rises, and the connector says nothing yet."""
_RESAMPLES = 200


def runs(seeds: int, worlds: Sequence[int]) -> list[Run]:
    """All arms of a world and a seed before the next ones."""
    found = []
    for seed in range(seeds):
        for world in worlds:
            base = [*base_steps(RECIPES, ROOT, world_seed=world), *_broad_steps(world)]
            for regime in REGIMES:
                for name, objective in OBJECTIVES.items():
                    arm = Arm(f"scaling-{name}-{regime}", _options(objective, regime), seed)
                    steps = [_after_broad(step, arm) for step in arm_steps(arm, RECIPES, ROOT)]
                    found.append(Run(arm, [*base, *steps], world))
    return found


def _options(objective: str, regime: str) -> tuple[str, ...]:
    shards = {"narrow": "speech_train_encoded", "broad": "speech_broad_encoded"}[regime]
    spans = {"class_path": "InterleaveDocuments", "init_args": {"text_words": [2, 6], "speech_words": [3, 8]}}
    sources = [
        {"name": "speech", "shards": str(ROOT / "shards" / shards), "weight": 0.6667, "documents": spans},
        {"name": "text", "shards": str(ROOT / "shards" / "text_mix"), "weight": 0.3333,
         "documents": {"class_path": "InterleaveDocuments"}},
    ]  # fmt: skip
    return (
        f"--model.init_args.objective={objective}",
        f"--data.init_args.train={json.dumps(sources)}",
        "--model.init_args.schedule.decay_fraction=0",
        f"--trainer.max_steps={STEPS}",
    )


def _broad_steps(world: int) -> list[Step]:
    build = [sys.executable, "-m", "benchmarks.scaling", "--build-broad", str(ROOT), "--worlds", str(world)]
    shards, mini = ROOT / "shards", RECIPES / "scale" / "mini.yaml"
    manifest = str(ROOT / "speech" / "broad" / "manifest.jsonl")
    encode = [*cli("encode"), str(shards / "speech_broad"), "--output", str(shards / "speech_broad_encoded")]
    return [
        Step("speech-broad", build, weight=4),
        Step(
            "prepare-speech_broad",
            [*cli("prepare"), "--manifest", manifest, "--output", str(shards / "speech_broad"), "--overwrite"],
            ("speech-broad",),
        ),
        Step(
            "encode-speech_broad",
            [*encode, "--config", str(mini), "--overwrite"],
            ("encoder", "prepare-speech_broad"),
            (mini,),
        ),
    ]


def _after_broad(step: Step, arm: Arm) -> Step:
    if step.name != f"{arm.name}-{arm.seed}":
        return step
    return Step(step.name, step.command, (*step.after, "encode-speech_broad"), step.reads, step.weight)


def build_broad(root: Path, world_seed: int) -> None:
    """As much speech as the natural one, with the domains alike."""
    world = build_world(world_seed)
    shares = {domain.name: 1 / len(world.domains) for domain in world.domains}
    speak_all(natural_speech(world, NUM_SPOKEN_DOCUMENTS, seed=world.seed, shares=shares), root / "speech" / "broad")


def figures(run: Run, root: Path) -> dict[str, Any]:
    """The curve: (positions seen, M) at every validation."""
    points = learning_curve(run.arm, root, "val/questions/misalignment")
    return {"curve": [[round(x), round(y, 4)] for x, y in points]}


def law(tokens: Any, floor: float, scale: float, beta: float) -> Any:
    """M = E + B · (D / 1e5)^−β."""
    return floor + scale * (tokens / 1e5) ** -beta


def solve(x: Any, y: Any) -> Any:
    """E, B and β by least squares, E and β not below 0."""
    bounds = ([0, -20, 0.01], [20, 20, 5])
    return curve_fit(law, x, y, p0=(float(y.min()) / 2, 1.0, 0.5), bounds=bounds, maxfev=20_000)[0]


def fit(points: Sequence[tuple[float, float]]) -> dict[str, tuple[float, float, float]]:
    """The law's constants, each with its 95 % interval by residual bootstrap.

    Not by the curvature at the optimum, which says nothing where a constant lies at its bound or trades with another.
    """
    x, y = np.array(points).T
    found = solve(x, y)
    residuals, rng = y - law(x, *found), np.random.default_rng(0)
    again = [solve(x, law(x, *found) + rng.choice(residuals, len(residuals))) for _ in range(_RESAMPLES)]
    low, high = np.percentile(again, [2.5, 97.5], axis=0)
    return {name: (float(v), float(a), float(b)) for name, v, a, b in zip("EBβ", found, low, high, strict=True)}


def table(rows: list[dict[str, Any]]) -> str:
    """M at each budget, mean ± standard deviation over runs, and the fit of all runs' points with 95 % intervals."""
    head = "".join(f"{budget} steps | " for budget in BUDGETS)
    lines = [f"| arm | runs | {head}E | B | β |", "|---" * (len(BUDGETS) + 5) + "|"]
    for name in sorted({row["name"] for row in rows}):
        curves = [row["curve"] for row in rows if row["name"] == name]
        cells = []
        for budget in BUDGETS:
            values = [_at(curve, budget) for curve in curves]
            cells.append(f"{fmean(values):.2f} ± {stdev(values) if len(values) > 1 else 0:.2f}")
        constants = fit([point for curve in curves for point in _late(curve)])
        cells += [f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in constants.values()]
        lines.append(f"| {name} | {len(curves)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _at(curve: list[list[float]], step: int) -> float:
    return float(curve[min(round(step / STEPS * len(curve)), len(curve)) - 1][1])


def _late(curve: list[list[float]]) -> list[tuple[float, float]]:
    return [(x, y) for number, (x, y) in enumerate(curve, 1) if number * STEPS / len(curve) >= FIRST_STEP]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """M against positions seen, each run thin, the fit thick."""
    matplotlib.use("Agg")
    figure, panel = plt.subplots(figsize=(7, 4.5))
    for number, name in enumerate(sorted({row["name"] for row in rows})):
        curves = [row["curve"] for row in rows if row["name"] == name]
        for curve in curves:
            panel.plot(*zip(*curve, strict=True), color=f"C{number}", alpha=0.35, linewidth=0.8)
        tokens, values = np.array([point for curve in curves for point in _late(curve)]).T
        x = np.geomspace(tokens.min(), tokens.max(), 50)
        y = law(x, *solve(tokens, values))
        panel.plot(x, y, color=f"C{number}", linewidth=2, label=name.removeprefix("scaling-"))
    panel.set(xscale="log", yscale="log", xlabel="positions seen", ylabel="M on all domains, nats per token")
    panel.grid(alpha=0.3, which="both")
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run, print the table, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-minutes", type=float, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--worlds", type=int, nargs="*", default=(1,))
    parser.add_argument("--build-broad", type=Path, metavar="ROOT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build_broad:
        build_broad(args.build_broad, args.worlds[0])
        return
    # The steps run in the world's folder and import this module from here.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    rows = run_all(
        STUDY,
        runs(args.seeds, args.worlds),
        recipes=STAGE1_RECIPES,
        budget_minutes=args.budget_minutes,
        batch=4,
        figures=figures,
    )
    if rows:
        print(table(rows))
        plot(rows, RESULTS / f"{STUDY}.png")


if __name__ == "__main__":
    main()
