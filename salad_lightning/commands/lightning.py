"""``salad-lightning fit|validate|test|predict``: LightningCLI after every installed part has been loaded.

Later ``--config`` files replace the plain dicts and lists of earlier ones, but merge the ``init_args`` of a class; if
the class itself changes, those ``init_args`` stay that the new class has too. Options apply in the order of writing.
"""

from __future__ import annotations

import argparse
import importlib
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from salad_lightning.commands.parse_errors import explain
from salad_lightning.commands.quiet import quieten
from salad_lightning.commands.settings import Setting, check_part_names, read_settings
from salad_lightning.errors import UserError
from salad_lightning.model.checkpoint_folder import older_checkpoint, restore_folder
from salad_lightning.registry import MODEL_KINDS, load_all
from salad_lightning.training.base import is_trial
from salad_lightning.training.callbacks import checkpoint_folder

__all__ = ["SaladCLI", "run"]

_DEFAULT_MODEL = "salad_lightning.training.speech_llm_module.SpeechLLMModule"
_DEFAULT_DATA = "salad_lightning.data.datamodule.SpeechDataModule"
# Imported so that the short names of their classes are known.
_NAMED = (
    "salad_lightning.data.choice",
    "salad_lightning.data.interleave",
    "salad_lightning.data.template",
    "salad_lightning.training.connector_warmup_module",
    "salad_lightning.training.text_lm_module",
    "salad_lightning.training.callbacks",
    "salad_lightning.training.misalignment_monitor",
    "salad_lightning.training.spoken_evaluation",
)


# Lightning looks these up itself.
_CHECKPOINT_NAMES = ("last", "best", "hpc")


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
            # test.json and the gap table say all that Lightning's own table of results would.
            args=[subcommand, *(["--verbose=false"] if subcommand == "test" else []), *argv],
            # The module has two optimiser groups and a schedule of its own.
            auto_configure_optimizers=False,
            # A second run into the same folder would be refused otherwise.
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False},
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in LightningCLI, called on self
        """Only the chosen one: building the parsers of all four takes four times as long."""
        return {self._chosen: super().subcommands()[self._chosen]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let ``model`` and ``data`` mean `SpeechLLMModule` and `SpeechDataModule` unless another class is named."""
        parser.set_defaults({"model": {"class_path": _DEFAULT_MODEL}, "data": {"class_path": _DEFAULT_DATA}})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Put all that a run writes under ``trainer.default_root_dir``: ``checkpoints/``, and ``logs/version_N/``.

        A fixed checkpoint folder lets ``--ckpt_path last`` find it again; a new version for every start keeps the
        metrics of the start before.
        """
        trainer = super().instantiate_trainer(**kwargs)
        root = Path(trainer.default_root_dir)
        if self._get(self.config_init, "trainer.logger", True) in (None, True):
            csv = CSVLogger(root, name="logs")
            trainer.loggers = [csv, TensorBoardLogger(root, name="logs", version=csv.version)]
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(root / "checkpoints")
        return trainer

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; a mistake becomes a `UserError` that names key and place."""
        try:
            self.config = parser.parse_args(args)  # type: ignore[arg-type]  # always a list here
        except (ArgumentError, argparse.ArgumentError, TypeError, ValueError) as error:
            raise explain(error, self._subcommand_parsers[self._chosen], self._settings, self._chosen) from error

    def instantiate_classes(self) -> None:
        """Build; a size or name that a class refuses is the configuration's mistake."""
        path = self._get(self.config, "ckpt_path")
        if path and path not in _CHECKPOINT_NAMES and "://" not in str(path) and not Path(path).exists():
            if self._chosen == "fit":
                restore_folder(Path(path))
            if not Path(path).exists():
                cure = older_checkpoint(path) or "give the path of a checkpoint, or `last`"
                raise UserError("no such checkpoint", where=f"ckpt_path: {path}", cure=cure)
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps what a class says into what it tried; the first error of the chain has the point.
            first: BaseException = error
            while not isinstance(first, UserError) and isinstance(first.__cause__, (UserError, ValueError)):
                first = first.__cause__
            if isinstance(first, UserError):
                raise UserError(first.what, where=first.where, cure=first.cure) from error
            cure = "correct the configuration (full traceback: SALAD_DEBUG=1)"
            raise UserError(str(first), where=f"building what `{self._chosen}` needs", cure=cure) from error
        if self._chosen != "fit" and path in _CHECKPOINT_NAMES:
            self._check_named_checkpoint(str(path))
        elif path == "last":
            for old in self._last_checkpoints(".old"):
                restore_folder(old.with_suffix(""))
        if path == "last" and (found := self._last_checkpoints()):
            # Lightning does not count what it saves itself when SLURM requeues a job.
            path = str(max(found, key=lambda entry: entry.stat().st_mtime))
            self.config_init[self._chosen]["ckpt_path"] = path
        self._check_fit_of(str(path) if path else "")
        final = checkpoint_folder(self.trainer) / "final.ckpt"
        if self._chosen == "fit" and not path and final.exists() and not is_trial(self.trainer):
            rank_zero_warn(
                f"{final} is of a finished run, which this one will write over: set another "
                "trainer.default_root_dir to keep it, or go on with --ckpt_path last"
            )

    def _check_fit_of(self, path: str) -> None:
        """Refuse a checkpoint of another model before weights are loaded, which can take minutes."""
        check = getattr(self.model, "check_checkpoint", None)  # any module may be trained; ours have it
        if check is not None and path and Path(path).exists():
            check(path, goes_on=self._chosen == "fit")

    def _check_named_checkpoint(self, name: str) -> None:
        """Lightning would only warn, and then measure untrained weights."""
        folder = checkpoint_folder(self.trainer)
        if name != "last" or not self._last_checkpoints():
            held = ", ".join(sorted(path.name for path in folder.glob("*.ckpt"))[:8]) or "nothing"
            killed = [older_checkpoint(old.with_suffix("")) for old in self._last_checkpoints(".old")]
            raise UserError(
                f"there is no `{name}` checkpoint to {self._chosen}",
                where=f"ckpt_path: {name}",
                cure=killed[0] if killed else f"give the path of one; {folder} holds {held}",
            )

    def _last_checkpoints(self, suffix: str = "") -> list[Path]:
        """Where Lightning looks for them, in the folders of all callbacks that save; and those of a SLURM requeue."""
        callbacks = [one for one in self.trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        folders = {checkpoint_folder(self.trainer), *(Path(one.dirpath) for one in callbacks if one.dirpath)}
        pattern = f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}*.ckpt{suffix}"
        requeued = Path(self.trainer.default_root_dir).glob(f"hpc_ckpt_*.ckpt{suffix}")
        return [*requeued, *(path for folder in sorted(folders) for path in folder.glob(pattern))]

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
    registry = load_all(MODEL_KINDS)
    for module in (_DEFAULT_MODEL.rpartition(".")[0], _DEFAULT_DATA.rpartition(".")[0], *_NAMED):
        importlib.import_module(module)
    check_part_names(settings, registry)
    quieten()
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
