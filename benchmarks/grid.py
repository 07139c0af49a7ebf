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
from typing import Any, NamedTuple

from salad_lightning.demo.arms import Arm, arm_row, arm_steps, base_steps
from salad_lightning.demo.pipeline import Step, run_steps
from salad_lightning.demo.report import environment

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
RESULTS = HERE / "results"
STAGE1_RECIPES = ("stage1.yaml", "text_lm.yaml", "scale/mini.yaml", "scale/warmup.yaml")
STAGE2_RECIPES = (*STAGE1_RECIPES, "stage2.yaml", "scale/mini_stage2.yaml", "scale/mini_select.yaml")
ROOT = Path("outputs/demo")  # as the recipes name it, inside a working folder of the grid's own


class Run(NamedTuple):
    """A row that a study wants.

    Attributes:
        arm: Name and seed of the row, and where its result lies.
        steps: All that has to be done, of which other runs may have done some.
        world: Seed of the miniature world, which has a working folder of its own.
    """

    arm: Arm
    steps: list[Step]
    world: int = 0


def run_grid(study: str, arms: Sequence[Arm], *, budget_minutes: float, lanes: int = 2) -> list[dict[str, Any]]:
    """Run Stage I arms on the demo's world; see `run_all`."""
    base = base_steps(RECIPES, ROOT)
    runs = [Run(arm, [*base, *arm_steps(arm, RECIPES, ROOT)]) for arm in arms]
    return run_all(study, runs, recipes=STAGE1_RECIPES, budget_minutes=budget_minutes, lanes=lanes)


def run_all(
    study: str,
    runs: Sequence[Run],
    *,
    recipes: Sequence[str],
    budget_minutes: float,
    lanes: int = 2,
    batch: int | None = None,
    figures: Callable[[Run, Path], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Do the runs that have no row yet, in order, until the budget is spent; a run that has begun is finished.

    Args:
        study: Name of the results file.
        runs: The whole grid; put all arms of a seed before the next seed.
        recipes: Those that decide a run; a change of one makes new rows.
        budget_minutes: Wall-clock minutes for this sitting.
        lanes: Commands at a time, one thread each.
        batch: Runs of one world begun together; ``lanes`` by default.
        figures: What a row tells beside `arm_row`, of a run and its world's folder.

    Returns:
        The rows of these runs that exist now.
    """
    deadline = time.monotonic() + 60 * budget_minutes
    path = RESULTS / f"{study}.jsonl"
    path.parent.mkdir(exist_ok=True)
    fingerprint = recipe_fingerprint(recipes)
    todo = [run for run in runs if _find(read_rows(study), run, fingerprint) is None]
    while todo and time.monotonic() < deadline:
        now = [run for run in todo if run.world == todo[0].world][: batch or lanes]
        todo = [run for run in todo if run not in now]
        work = work_folder(now[0].world)
        work.mkdir(parents=True, exist_ok=True)
        steps = {step.name: step for run in now for step in run.steps}
        run_steps(list(steps.values()), work, lanes=lanes)
        with path.open("a") as file:
            for run in now:
                row = {"study": study, "world": run.world, **arm_row(run.arm, work / ROOT)}
                row |= {**(figures(run, work / ROOT) if figures else {}), **provenance(), "recipes": fingerprint}
                file.write(json.dumps(row | {"overrides": list(run.arm.overrides)}) + "\n")
    if todo:
        print(f"{study}: {len(todo)} of {len(runs)} runs are left for another sitting")
    found = (_find(read_rows(study), run, fingerprint) for run in runs)
    return [row for row in found if row is not None]


def work_folder(world: int) -> Path:
    """Where everything of a world lies."""
    return HERE.parent / "outputs" / ("bench" if world == 0 else f"bench-world-{world}")


def read_rows(study: str) -> list[dict[str, Any]]:
    """All rows of a study, of every sitting."""
    path = RESULTS / f"{study}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def recipe_fingerprint(names: Sequence[str]) -> str:
    """Of the recipes that decide a run of the grid."""
    return hashlib.sha256(b"\0".join((RECIPES / name).read_bytes() for name in names)).hexdigest()[:12]


def provenance() -> dict[str, Any]:
    """Commit, time, versions and machine of a row."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
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
    """The summary as a Markdown table: mean ± standard deviation over runs."""
    columns = list(next(iter(table.values()), {}))
    lines = ["| arm | runs | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, figures in table.items():
        number = next(iter(figures.values()))[2]
        cells = [f"{mean:.3f} ± {spread:.3f}" for mean, spread, _ in figures.values()]
        lines.append(f"| {name} | {number} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _find(rows: list[dict[str, Any]], run: Run, fingerprint: str) -> dict[str, Any] | None:
    wanted = (run.arm.name, run.arm.seed, run.world, fingerprint, list(run.arm.overrides))
    for row in rows:
        if (row["name"], row["seed"], row.get("world", 0), row["recipes"], row["overrides"]) == wanted:
            return row
    return None
