"""``salad-lightning demo``: the whole method in miniature, offline, by the public commands.

Every command is echoed before it runs, so that a reader can go on alone; what has not changed since the last run is
not run again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from salad_lightning.errors import UserError

__all__ = ["add_arguments", "run"]

_STEPS = 1300  # as many as the time allows; studies over seeds take the recipe's own number
_CURVE = 5  # points of the learning curves; a validation takes as long as 17 steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--recipes", type=Path, default=Path("recipes"), help="the project's recipe folder (default: recipes)"
    )
    parser.add_argument("--lanes", type=int, default=2, help="commands at a time, one thread each (default: 2)")


def run(args: argparse.Namespace) -> None:
    """Build the world, train all arms of both stages, measure and plot."""
    # Imported here for start-up time: the parser above must not wait for torch and matplotlib.
    from salad_lightning.demo.arms import Arm, arm_steps, base_steps
    from salad_lightning.demo.pipeline import run_steps, source_fingerprint
    from salad_lightning.demo.report import write_report
    from salad_lightning.demo.stage2 import STAGE2_ARMS, stage2_steps

    if not (args.recipes / "stage1.yaml").is_file():
        raise UserError(
            "no recipes here", where=str(args.recipes), cure="run it in the project's folder, or set --recipes"
        )
    begin = time.perf_counter()
    root = Path("outputs/demo")
    longer = (f"--trainer.max_steps={_STEPS}", f"--trainer.val_check_interval={_STEPS // _CURVE}")
    arms = [Arm("stage1_kl", longer), Arm("stage1_nll", ("--model.init_args.objective=NLLObjective", *longer))]
    steps = {step.name: step for step in base_steps(args.recipes, root)}
    for arm in arms:
        steps |= {step.name: step for step in arm_steps(arm, args.recipes, root)}
    steps |= {step.name: step for step in stage2_steps(args.recipes, root, arms[0])}
    run_steps(list(steps.values()), Path(), lanes=args.lanes, fingerprint=source_fingerprint(), state=root / ".steps")
    write_report([*arms, *(Arm(arm.name) for arm in STAGE2_ARMS)], root)
    print(f"plots and report.json: {root}    total: {(time.perf_counter() - begin) / 60:.1f} min")
