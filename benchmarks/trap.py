"""The trap: a pool in which a third of the texts cannot be spoken. What the intelligibility filter is worth.

Run by: python -m benchmarks.trap --budget-minutes 30

The texts of two well covered domains come out garbled (`benchmarks.garbled`), in the probes as in what is spoken
for training. Broken speech is misunderstood worst of all, so selection by misalignment walks into it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.grid import HERE, RECIPES, ROOT, STAGE2_RECIPES, Run, markdown, run_all, summarise
from benchmarks.stage2 import FIGURES, STAGE1, pairs_table
from salad_lightning.demo.arms import Arm, arm_steps, base_steps
from salad_lightning.demo.pipeline import Step
from salad_lightning.demo.stage2 import Selection, Stage2Arm, selection_of, stage2_steps

STUDY = "trap"
NUM_BROKEN_DOMAINS = 2
BROKEN = Path("world") / "broken.jsonl"
_OPEN = "--score.intelligibility=false"


def arms(seed: int) -> list[Stage2Arm]:
    """Uniform and active, each with the filter and without; 10 % of the natural speech each."""
    probe = yaml.safe_load((RECIPES / "scale" / "mini_select.yaml").read_text())["probe"]
    broken = {"broken": str(ROOT / BROKEN)}
    voices = tuple({**voice, **broken} for voice in probe["voices"])
    name = "benchmarks.garbled.GarbledSynthesizer"
    spoken = (f"--probe.synthesizer={name}", f"--probe.voices={json.dumps(voices)}")

    def arm(kind: str, *options: str, scored: str) -> Stage2Arm:
        selection = Selection(f"trap-{kind}-{seed}", (*spoken, *options), name, voices, scored=scored)
        return Stage2Arm(f"trap-{kind}", selection)

    return [
        arm("uniform", _OPEN, "--draw.gamma=0", scored="trap-open"),
        arm("uniform-filtered", "--draw.gamma=0", scored="trap-filtered"),
        arm("active-open", _OPEN, scored="trap-open"),
        arm("active-filtered", scored="trap-filtered"),
    ]


def runs(seeds: int, worlds: Sequence[int]) -> list[Run]:
    """All arms of a world and a seed before the next ones."""
    texts = [sys.executable, "-m", "benchmarks.trap", "--write-broken", str(ROOT)]
    found = []
    for seed in range(seeds):
        for world in worlds:
            stage1 = Arm(STAGE1, seed=seed)
            base = [*base_steps(RECIPES, ROOT, world_seed=world), *arm_steps(stage1, RECIPES, ROOT)]
            base.append(Step("broken-texts", texts, ("text",)))
            steps = stage2_steps(RECIPES, ROOT, stage1, arms(seed), world_seed=world)
            found += [Run(Arm(arm.name, seed=seed), [*base, *_after_texts(steps)], world) for arm in arms(seed)]
    return found


def _after_texts(steps: list[Step]) -> list[Step]:
    return [
        Step(step.name, step.command, (*step.after, "broken-texts"), step.reads, step.weight)
        if step.name.startswith("select-")
        else step
        for step in steps
    ]


def figures(run: Run, root: Path) -> dict[str, Any]:
    """How much of what was spoken is broken."""
    name = f"{run.arm.name}-{run.arm.seed}"
    broken = {json.loads(line)["text"] for line in (root / BROKEN).read_text().splitlines()}
    rows = [json.loads(line) for line in (root / f"selection_{name}" / "manifest.jsonl").read_text().splitlines()]
    share = sum(row["text"] in broken for row in rows) / len(rows)
    seconds = sum(cluster["seconds"] for cluster in selection_of(name, root).values())
    return {"broken_share": round(share, 4), "synthetic_seconds": round(seconds, 1)}


def write_broken(root: Path) -> None:
    """The pool's texts of the best covered domains."""
    domains = [json.loads(line) for line in (root / "world" / "domains.jsonl").read_text().splitlines()]
    best = sorted(domains, key=lambda domain: -domain["speech_share"])[:NUM_BROKEN_DOMAINS]
    names = {domain["name"] for domain in best}
    lines = [
        line for line in (root / "world" / "pool.jsonl").read_text().splitlines() if json.loads(line)["domain"] in names
    ]
    (root / BROKEN).write_text("".join(line + "\n" for line in lines))


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-minutes", type=float, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--worlds", type=int, nargs="*", default=(1,))
    parser.add_argument("--write-broken", type=Path, metavar="ROOT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_broken:
        write_broken(args.write_broken)
        return
    # The steps run in the world's folder and import the voice from here.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    rows = run_all(
        STUDY,
        runs(args.seeds, args.worlds),
        recipes=STAGE2_RECIPES,
        budget_minutes=args.budget_minutes,
        batch=6,
        figures=figures,
    )
    print(markdown(summarise(rows, {**FIGURES, "share broken": lambda row: row["broken_share"]})))
    names = [
        ("active-filtered", "uniform"), ("active-open", "uniform"),
        ("active-filtered", "uniform-filtered"), ("active-filtered", "active-open"),
    ]  # fmt: skip
    pairs = [(f"trap-{first}", f"trap-{second}") for first, second in names]
    print("\n" + pairs_table(rows, pairs))


if __name__ == "__main__":
    main()
