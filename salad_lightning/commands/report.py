"""``salad-lightning report``: runs side by side on one HTML page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from salad_lightning.errors import UserError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folders that `fit`, `test` (trainer.default_root_dir) or `select` (output) wrote",
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    parser.add_argument("--title", default="Runs", help="heading of the page (default: Runs)")


def run(args: argparse.Namespace) -> None:
    """Read the runs, write the page."""
    # Imported here for start-up time.
    from salad_lightning.report.page import render_page
    from salad_lightning.report.run_folder import read_run, unique_names

    if args.output.is_dir() or not args.output.absolute().parent.is_dir():
        raise UserError("no file can be written there", where=str(args.output), cure="name a file in a folder")
    runs = [read_run(path) for path in args.runs]
    if len({Path(path).resolve() for path in args.runs}) < len(runs):
        raise UserError("a run is named twice", where=" ".join(args.runs), cure="name each once")
    unique_names(runs, args.runs)
    aside = args.output.with_name(args.output.name + ".part")
    aside.write_text(render_page(runs, args.title), encoding="utf-8")
    os.replace(aside, args.output)
    print(f"{args.output}: {len(runs)} runs, {args.output.stat().st_size / 1e3:.0f} kB")
