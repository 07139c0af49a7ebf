"""``salad-lightning select``: YAML files and ``--key=value`` overrides to the settings of a selection, and its run."""

from __future__ import annotations

import argparse
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from salad_lightning.commands.parse_errors import explain
from salad_lightning.commands.settings import read_settings
from salad_lightning.selection.settings import SelectionSettings

__all__ = ["run"]


def run(subcommand: str, argv: list[str]) -> None:
    """Select, and print where the manifest is.

    Args:
        subcommand: ``select``.
        argv: The arguments after it.

    Raises:
        UserError: For anything wrong with the arguments, the configuration files or what they name.
    """
    said = read_settings(argv)
    parser = ArgumentParser(
        prog=f"salad-lightning {subcommand}",
        description="Choose, by the Stage-I model's own misalignment, which texts to speak.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; later ones override earlier ones")
    parser.add_class_arguments(SelectionSettings, as_group=False)
    try:
        parsed = parser.instantiate_classes(parser.parse_args(argv))
    except (ArgumentError, argparse.ArgumentError, TypeError, ValueError) as error:
        raise explain(error, parser, said, subcommand) from error
    del parsed["config"]
    # Imported here for start-up time: --help needs none of it.
    from salad_lightning.selection.pipeline import select

    manifest: Path = select(SelectionSettings(**parsed.as_dict()))
    print(f"manifest: {manifest}    report: {manifest.with_name('report.md')}")
