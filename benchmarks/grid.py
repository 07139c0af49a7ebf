"""The grid runner of all studies: resumable, within a time budget, one row a run.

Rows accumulate in ``benchmarks/results/STUDY.jsonl`` over sittings. A row is known by study, arm, seed and the recipes
it was run with, so a changed recipe makes new rows and never mixes with old ones.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from salad_lightning.demo.arms import Arm, arm_row, arm_steps, base_steps
from salad_lightning.demo.pipeline import run_steps
from salad_lightning.demo.report import environment

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
RESULTS = HERE / "results"
ROOT = Path("outputs/demo")  # as the recipes name it, inside a working folder of the grid's own


def run_grid(study: str, arms: Sequence[Arm], *, budget_minutes: float, lanes: int = 2) -> list[dict[str, Any]]:
    """Run the arms that have no row yet, in order, until the budget is spent; an arm that has begun is finished.

    Args:
        study: Name of the results file.
        arms: All arms of the grid; put the whole grid of a seed before the next seed.
        budget_minutes: Wall-clock minutes for this sitting.
        lanes: Arms at a time, one thread each.

    Returns:
        The rows of these arms that exist now.
    """
    deadline = time.monotonic() + 60 * budget_minutes
    work = HERE.parent / "outputs" / "bench"
    work.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{study}.jsonl"
    path.parent.mkdir(exist_ok=True)
    fingerprint = recipe_fingerprint()
    todo = [arm for arm in arms if _find(read_rows(study), arm, fingerprint) is None]
    base = base_steps(RECIPES, ROOT)
    while todo and time.monotonic() < deadline:
        now, todo = todo[:lanes], todo[lanes:]
        steps = {step.name: step for step in base}
        for arm in now:
            steps |= {step.name: step for step in arm_steps(arm, RECIPES, ROOT)}
        run_steps(list(steps.values()), work, lanes=lanes)
        with path.open("a") as file:
            for arm in now:
                row = {"study": study, **arm_row(arm, work / ROOT), **provenance(), "recipes": fingerprint}
                file.write(json.dumps(row | {"overrides": list(arm.overrides)}) + "\n")
    if todo:
        print(f"{study}: {len(todo)} of {len(arms)} runs are left for another sitting")
    found = (_find(read_rows(study), arm, fingerprint) for arm in arms)
    return [row for row in found if row is not None]


def read_rows(study: str) -> list[dict[str, Any]]:
    """All rows of a study, of every sitting."""
    path = RESULTS / f"{study}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def recipe_fingerprint() -> str:
    """Of the recipes that decide a run of the grid."""
    names = ("stage1.yaml", "text_lm.yaml", "scale/mini.yaml", "scale/warmup.yaml")
    return hashlib.sha256(b"\0".join((RECIPES / name).read_bytes() for name in names)).hexdigest()[:12]


def provenance() -> dict[str, Any]:
    """Commit, time, versions and machine of a row."""
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": commit, "when": datetime.now(timezone.utc).isoformat(timespec="minutes"), **environment()}


def summarise(
    rows: Iterable[dict[str, Any]], figures: dict[str, Callable[[dict[str, Any]], float]]
) -> dict[str, dict[str, tuple[float, float, int]]]:
    """Arm name → figure → mean, sample standard deviation (0 for one seed) and number of seeds."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["name"]].append(row)
    table: dict[str, dict[str, tuple[float, float, int]]] = {}
    for name, members in groups.items():
        table[name] = {}
        for figure, get in figures.items():
            values = [get(row) for row in members]
            table[name][figure] = (fmean(values), stdev(values) if len(values) > 1 else 0.0, len(values))
    return table


def markdown(table: dict[str, dict[str, tuple[float, float, int]]]) -> str:
    """The summary as a Markdown table: mean ± standard deviation over seeds."""
    columns = list(next(iter(table.values()), {}))
    lines = ["| arm | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, figures in table.items():
        seeds = next(iter(figures.values()))[2]
        cells = [f"{mean:.3f} ± {spread:.3f}" for mean, spread, _ in figures.values()]
        lines.append(f"| {name} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _find(rows: list[dict[str, Any]], arm: Arm, fingerprint: str) -> dict[str, Any] | None:
    for row in rows:
        if (row["name"], row["seed"], row["recipes"]) == (arm.name, arm.seed, fingerprint):
            return row
    return None
