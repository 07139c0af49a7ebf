"""Checkpoints as files: written whole or not at all, read, and compared with a module by names and shapes."""

from __future__ import annotations

import fnmatch
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import nn

from salad_lightning.errors import UserError
from salad_lightning.model.checkpoint_folder import check_fit, is_checkpoint_folder, older_checkpoint, read_whole

__all__ = [
    "PLAIN",
    "AtomicCheckpointIO",
    "check_outline",
    "check_trained",
    "compare_weights",
    "frozen_names",
    "is_of",
    "load_checkpoint",
    "trained_names",
]


PLAIN = "build the module by salad_lightning.training.from_settings, from what a recipe would say of it"
"""What to do about checkpoints that others than the run itself refuse to read."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint aside and renames it: a run killed meanwhile leaves nothing half-written in its place."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save to ``path`` + ``.part``, then rename.

        Raises:
            UserError: If the disk is full, or the place cannot be written to; what was half-written is removed.
        """
        aside = f"{path}.part"
        try:
            super().save_checkpoint(checkpoint, aside, storage_options)
            os.replace(aside, path)
        except OSError as error:
            Path(aside).unlink(missing_ok=True)
            raise UserError(
                f"the checkpoint cannot be written ({error.strerror or error})",
                where=str(path),
                cure="make room, then go on from the one before with --ckpt_path=last",
            ) from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load, with one message where the file is missing or damaged."""
        return load_checkpoint(path, weights_only=bool(weights_only))


def load_checkpoint(path: str | os.PathLike[str], *, weights_only: bool, outline: bool = False) -> dict[str, Any]:
    """A checkpoint, in one file or sharded, on the CPU.

    Args:
        path: The file or folder.
        weights_only: Refuse anything but plain data, which could run code.
        outline: For names, shapes and settings alone: weights are left on disk until they are looked at, or are on the
            meta device.

    Raises:
        UserError: If there is no such file, or it is no checkpoint.
    """
    where, cure = str(path), older_checkpoint(path) or "give the path of a .ckpt file that a run has written"
    if is_checkpoint_folder(path):
        return read_whole(path, weights_only=weights_only, outline=outline)
    try:
        content = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=outline)
    except FileNotFoundError as error:
        raise UserError("no such checkpoint", where=where, cure=cure) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, IsADirectoryError, LookupError, ValueError) as error:
        if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
            what = f"the checkpoint cannot be read without running code, as it holds an object of {found[1]}"
            raise UserError(what, where=where, cure=f"trust none from others; in a run of yours, {PLAIN}") from error
        first = str(error).partition("\n")[0]
        raise UserError(f"the checkpoint cannot be read ({first})", where=where, cure=cure) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError("the file holds no checkpoint", where=where, cure=cure)
    return content


def check_outline(module: nn.Module, checkpoint: Mapping[str, Any], where: str) -> None:
    """Compare names and shapes of a checkpoint's weights with a module's, either of which may be on the meta device.

    Args:
        module: With the names that the checkpoint has.
        checkpoint: With ``state_dict``.
        where: Its path.

    Raises:
        UserError: If a weight is missing that was not frozen, unknown, or of another shape.
    """
    compare_weights(module.state_dict(), checkpoint, where, frozen_names(module))


def check_trained(module: nn.Module, checkpoint: Mapping[str, Any], where: str) -> None:
    """Compare what a checkpoint's optimizer has a state for with what a module trains.

    Args:
        module: With the names that the checkpoint has.
        checkpoint: Of a `TokenLossModule`; others pass.
        where: Its path.

    Raises:
        UserError: If they differ.
    """
    ours = trained_names(module)
    theirs = checkpoint.get("salad_lightning", {}).get("trained", ours)
    if different := sorted(set(ours) ^ set(theirs)):
        was, has = ("was not", "is") if different[0] in ours else ("was", "is not")
        raise UserError(
            f"{different[0]} {has} trained here and {was} there ({len(different)} such weights)",
            where=where,
            cure="set model.freeze as in that run, or start from its weights: model.init_from",
        )


def trained_names(module: nn.Module) -> list[str]:
    """Names of the parameters that are trained, in order."""
    return sorted(name for name, parameter in module.named_parameters() if parameter.requires_grad)


def compare_weights(ours: Mapping[str, Any], checkpoint: Mapping[str, Any], where: str, frozen: set[str]) -> None:
    """Compare names and shapes of a checkpoint's weights with a state dict.

    Args:
        ours: The state dict.
        checkpoint: With ``state_dict``.
        where: Its path.
        frozen: Names that may be missing, beside those that the checkpoint notes.

    Raises:
        UserError: If a weight is missing that was not frozen, unknown, or of another shape.
    """
    frozen = frozen | set(checkpoint.get("salad_lightning", {}).get("frozen", ()))
    check_fit(
        {name: value.shape for name, value in ours.items()},
        {name: value.shape for name, value in checkpoint["state_dict"].items()},
        where,
        may_lack={name for name in ours if is_of(frozen, name)},
    )


def is_of(frozen: set[str], name: str) -> bool:
    """Whether a state-dict entry is a frozen weight, or belongs to one: the scales of a 4-bit one are entries below."""
    return name in frozen or (".weight." in name and name[: name.index(".weight.")] + ".weight" in frozen)


def frozen_names(module: nn.Module) -> set[str]:
    """State-dict names of all frozen parameters, and of the buffers beside them in wholly frozen modules."""
    frozen = {name for name, parameter in module.named_parameters(remove_duplicate=False)
              if not parameter.requires_grad}  # fmt: skip
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name, _ in module.named_buffers():
        owner = ".".join(name.split(".")[:2])
        if not fnmatch.filter(trained, f"{owner}.*"):
            frozen.add(name)
    return frozen
