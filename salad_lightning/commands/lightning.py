"""``salad-lightning fit|validate|test|predict``: LightningCLI after every installed part has been loaded.

Later ``--config`` files replace the dicts and lists of earlier ones, but merge the ``init_args`` of a class that stays
the same; options on the command line come in the order they are written.
"""

from __future__ import annotations

import argparse
import importlib
import re
from importlib.metadata import PackageNotFoundError, requires, version

from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from salad_lightning.commands.parse_errors import explain
from salad_lightning.commands.settings import Setting, check_part_names, read_settings
from salad_lightning.errors import UserError
from salad_lightning.registry import load_all

__all__ = ["SaladCLI", "run"]

_DEFAULT_MODEL = "salad_lightning.training.speech_llm_module.SpeechLLMModule"
_DEFAULT_DATA = "salad_lightning.data.datamodule.SpeechDataModule"
# Imported so that the short names of their classes are known.
_NAMED = ("salad_lightning.training.text_lm_module",)


class SaladCLI(LightningCLI):
    """LightningCLI over any LightningModule and LightningDataModule; this package's own unless others are named.

    Args:
        subcommand: One of `LightningCLI.subcommands`.
        argv: The arguments after it.
        settings: What they set, for error messages.
    """

    def __init__(self, subcommand: str, argv: list[str], settings: list[Setting]) -> None:
        self._settings = settings
        self._chosen = subcommand
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=[subcommand, *argv],
            # The module has two optimiser groups and a schedule of its own.
            auto_configure_optimizers=False,
            # A second run into the same folder would be refused otherwise.
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let ``model`` and ``data`` mean `SpeechLLMModule` and `SpeechDataModule` unless another class is named."""
        parser.set_defaults({"model": {"class_path": _DEFAULT_MODEL}, "data": {"class_path": _DEFAULT_DATA}})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; a mistake becomes a `UserError` that names key and place."""
        try:
            self.config = parser.parse_args(args)  # type: ignore[arg-type]  # always a list here
        except (ArgumentError, argparse.ArgumentError, TypeError, ValueError) as error:
            raise explain(error, self._subcommand_parsers[self._chosen], self._settings, self._chosen) from error

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as written: LightningCLI would let a checkpoint's hyperparameters override it."""


def run(subcommand: str, argv: list[str]) -> None:
    """Run one of Lightning's subcommands.

    Args:
        subcommand: ``fit``, ``validate``, ``test`` or ``predict``.
        argv: The arguments after it.

    Raises:
        UserError: For anything wrong with the arguments or the configuration files.
    """
    settings = read_settings(argv)
    _check_torchaudio()
    # Before the parser is built: jsonargparse finds short names among the subclasses that have been imported.
    registry = load_all()
    for module in (_DEFAULT_MODEL.rpartition(".")[0], _DEFAULT_DATA.rpartition(".")[0], *_NAMED):
        importlib.import_module(module)
    check_part_names(settings, registry)
    SaladCLI(subcommand, argv, settings)


def _check_torchaudio() -> None:
    """Say what to install where torchaudio refuses to import, usually under a torch built for another CUDA version."""
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError, RuntimeError) as error:
        # The bounds are said once, in the package's metadata.
        bounds = [text for text in requires("salad-lightning") or [] if re.match(r"torch(audio)?\b", text)]
        raise UserError(
            f"torchaudio {_version('torchaudio')} cannot be imported with torch {_version('torch')}: {error}",
            cure="pip install " + " ".join(f"'{bound}'" for bound in bounds),
        ) from error


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
