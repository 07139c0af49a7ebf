"""``salad-lightning encode``: runs a recipe's frozen encoder once over shards, so that training need not."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salad_lightning.errors import UserError

if TYPE_CHECKING:
    from salad_lightning.interfaces import Encoder

__all__ = ["add_arguments", "encoder_of", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("shards", help="shards of audio: a folder, a file, a glob or braces, as in a recipe")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the encoded shards")
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="recipe that will train from them: its encoder is what runs; several as for `fit`",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="how frames are stored; codes always take the smallest integer (default: float16)",
    )
    parser.add_argument(
        "--batch-seconds", type=float, default=240.0, metavar="S", help="padded audio at a time (default: 240)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that an earlier run wrote")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read ahead (default: 0)")
    parser.add_argument("--accelerator", default="auto", help="as Lightning's Trainer takes it (default: auto)")
    parser.add_argument("--devices", default="auto", help="how many, as Lightning's Trainer takes it (default: auto)")


def run(args: argparse.Namespace) -> None:
    """Encode what the options say, and print what came of it."""
    # Imported here for start-up time: `encode --help` must not wait for torch.
    from salad_lightning.commands.quiet import quieten
    from salad_lightning.corpus.encode import encode_shards

    quieten()
    index = encode_shards(
        args.shards,
        args.output,
        encoder_of(args.config),
        dtype=args.dtype,
        batch_seconds=args.batch_seconds,
        num_workers=args.workers,
        accelerator=args.accelerator,
        devices=args.devices,
        overwrite=args.overwrite,
    )
    if index is not None:
        size = sum(path.stat().st_size for path in args.output.glob("*.tar")) / max(index["seconds"], 1e-9)
        hours = index["seconds"] / 3600
        print(f"{args.output}: {index['num_samples']} samples, {hours:.2f} h, {size:.0f} bytes a second of speech")


def encoder_of(recipes: Sequence[Path]) -> Encoder:
    """The encoder that a run from these recipes would have.

    Args:
        recipes: As ``--config`` of ``fit``: later ones override earlier ones.

    Raises:
        UserError: If a file cannot be read, or they name no encoder or one that cannot be built.
    """
    # As in `run`.
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser

    from salad_lightning.interfaces import Encoder
    from salad_lightning.registry import load_all

    load_all(["encoder"])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Encoder, "encoder")
    config: Any = None
    where = ", ".join(map(str, recipes))
    for recipe in recipes:
        try:
            content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
            node = ((content.get("model") or {}).get("init_args") or {}).get("encoder")
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
            raise UserError(
                f"not a recipe ({error})", where=str(recipe), cure="give a YAML file as for `fit`"
            ) from error
        if node is None:
            continue
        try:
            config = parser.parse_object({"encoder": node}, config)
        except (ArgumentError, TypeError, ValueError) as error:
            raise UserError(f"the encoder cannot be built: {error}", where=str(recipe)) from error
    if config is None:
        raise UserError("no recipe has an encoder", where=where, cure="name one under model.init_args.encoder")
    try:
        encoder = parser.instantiate_classes(config).encoder
    except ValueError as error:
        raise UserError(f"the encoder cannot be built: {error}", where=where) from error
    assert isinstance(encoder, Encoder)
    return encoder
