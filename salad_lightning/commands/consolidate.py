"""``salad-lightning consolidate``: a sharded checkpoint to one file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from salad_lightning.errors import UserError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder that a sharded run wrote")
    parser.add_argument("file", type=Path, help="new file; weights and settings, without the optimizer's state")


def run(args: argparse.Namespace) -> None:
    """Write the file under its name when it is whole.

    Raises:
        UserError: If the checkpoint is none of a sharded run, or the file is there already.
    """
    # Imported here for start-up time: `consolidate --help` must not wait for torch.
    import torch

    from salad_lightning.model.checkpoint_folder import is_checkpoint_folder, read_whole

    if not is_checkpoint_folder(args.checkpoint):
        cure = "give a folder such as RUN/checkpoints/final.ckpt; a checkpoint that is a file needs nothing done"
        raise UserError("not a sharded checkpoint", where=str(args.checkpoint), cure=cure)
    if args.file.exists():
        raise UserError("the file is there already", where=str(args.file), cure="name a new file")
    whole = read_whole(args.checkpoint)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    aside = args.file.with_name(args.file.name + ".part")
    torch.save(whole, aside)
    os.replace(aside, args.file)
    print(f"{args.file}: step {whole.get('global_step', 0)}, {args.file.stat().st_size / 1e6:.1f} MB")
