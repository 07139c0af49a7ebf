"""Sharded checkpoints: a folder to which every process of a run has written its part."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer

from salad_lightning.errors import UserError

__all__ = [
    "check_fit",
    "is_checkpoint_folder",
    "load_into",
    "older_checkpoint",
    "read_extra",
    "read_whole",
    "replace_folder",
    "restore_folder",
    "stored_shapes",
]

# Lightning's name of the file for what is neither weights nor optimizer state.
_EXTRA = "meta.pt"
_OLD = ".old"
_CURE = "give the path of a checkpoint folder that a run has written, whole"


def is_checkpoint_folder(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a sharded checkpoint."""
    return (Path(path) / _EXTRA).is_file()


def read_extra(path: str | os.PathLike[str], *, weights_only: bool = True) -> dict[str, Any]:
    """What is neither weights nor optimizer state: step, settings, the place in the data.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        extra: dict[str, Any] = torch.load(Path(path) / _EXTRA, map_location="cpu", weights_only=weights_only)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"the checkpoint cannot be read ({_first_line(error)})", where=str(path), cure=_CURE) from error
    return extra


def stored_shapes(path: str | os.PathLike[str]) -> dict[str, torch.Size]:
    """Name and shape of every weight, without reading any.

    Raises:
        UserError: If the folder is not whole.
    """
    return {name: entry.size for name, entry in _stored(path).items()}


def _stored(path: str | os.PathLike[str]) -> dict[str, TensorStorageMetadata]:
    prefix = "state_dict."
    try:
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
    except (OSError, CheckpointException, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"the checkpoint cannot be read ({_first_line(error)})", where=str(path), cure=_CURE) from error
    return {
        name.removeprefix(prefix): entry
        for name, entry in stored.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def load_into(
    path: str | os.PathLike[str],
    module: nn.Module,
    optimizers: list[Optimizer],
    *,
    frozen: Set[str],
    weights_only: bool = True,
) -> dict[str, Any]:
    """Give a sharded module and its optimizers their parts of a checkpoint; on any number of processes.

    torch's own loading asks for every weight of the module, and fails on the frozen ones, which are not stored.

    Args:
        path: The folder.
        module: Sharded; changed in place.
        optimizers: Of the module; changed in place.
        frozen: Names that may be missing.
        weights_only: See `torch.load`.

    Returns:
        The rest of the checkpoint, see `read_extra`.

    Raises:
        UserError: If a trained weight is missing, unknown, or of another shape.
    """
    stored = stored_shapes(path)
    ours: dict[str, Any] = get_model_state_dict(module)
    check_fit({name: value.shape for name, value in ours.items()}, stored, str(path), may_lack=frozen)
    wanted = {name: value for name, value in ours.items() if name in stored}
    load({"state_dict": wanted}, checkpoint_id=path)
    module.load_state_dict(wanted, strict=False)
    for index, optimizer in enumerate(optimizers):
        state = {f"optimizer_{index}": get_optimizer_state_dict(module, optimizer)}
        load(state, checkpoint_id=path)
        set_optimizer_state_dict(module, optimizer, optim_state_dict=state[f"optimizer_{index}"])
    return read_extra(path, weights_only=weights_only)


def check_fit(
    ours: Mapping[str, torch.Size], theirs: Mapping[str, torch.Size], where: str, *, may_lack: Set[str]
) -> None:
    """Compare names and shapes of a checkpoint's weights with a module's.

    Args:
        ours: Of the module.
        theirs: Of the checkpoint.
        where: Its path.
        may_lack: Names that the checkpoint may lack.

    Raises:
        UserError: If a weight is missing, unknown, or of another shape.
    """
    missing = sorted(set(ours) - set(theirs) - may_lack)
    unknown = sorted(set(theirs) - set(ours))
    shapes = [f"{name} {tuple(size)} here {tuple(ours[name])}" for name, size in theirs.items()
              if name in ours and ours[name] != size]  # fmt: skip
    for label, names in (("lacks", missing), ("has the unknown weight", unknown), ("has another shape:", shapes)):
        if names:
            raise UserError(
                f"the weights do not fit this model: it {label} {names[0]} ({len(names)} in all)",
                where=where,
                cure="use the same llm, encoder and connector as the run that wrote it",
            )


def read_whole(path: str | os.PathLike[str], *, weights_only: bool = True, outline: bool = False) -> dict[str, Any]:
    """All weights on the CPU, with the rest of the checkpoint, in the form of a checkpoint in one file.

    The optimizer's state is left where it is, but for its learning rates: to go on with a run, give the folder.

    Args:
        path: The folder.
        weights_only: See `torch.load`.
        outline: Read shapes and dtypes alone; weights are on the meta device.

    Raises:
        UserError: If it cannot be read.
    """
    extra = read_extra(path, weights_only=weights_only)
    device = "meta" if outline else "cpu"
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
        for name, entry in _stored(path).items()
    }
    try:
        if not outline:
            load({"state_dict": weights}, checkpoint_id=path, no_dist=True)
    except (OSError, CheckpointException, EOFError) as error:
        raise UserError(f"the checkpoint cannot be read ({_first_line(error)})", where=str(path), cure=_CURE) from error
    states = [
        {"state": {}, "param_groups": [{"lr": lr, "initial_lr": peak} for lr, peak in _rates(scheduler)]}
        for scheduler in extra.get("lr_schedulers", [])
    ]
    return {**extra, "state_dict": weights, "optimizer_states": states}


def _rates(scheduler: dict[str, Any]) -> list[tuple[float, float]]:
    return list(zip(scheduler["_last_lr"], scheduler["base_lrs"], strict=True))


def replace_folder(aside: Path, final: Path) -> None:
    """Rename ``aside`` to ``final``; an older one goes only when the new one stands."""
    old = final.with_name(final.name + _OLD)
    if final.exists():
        _remove(old)
        os.replace(final, old)
    os.replace(aside, final)
    _remove(old)


def restore_folder(final: Path) -> None:
    """Give an older checkpoint its name back, where a run was killed within `replace_folder`; for that run alone.

    Every process of the run may do so at the same time.
    """
    old = final.with_name(final.name + _OLD)
    if is_checkpoint_folder(old) and not final.exists():
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.replace(old, final)


def older_checkpoint(path: str | os.PathLike[str]) -> str:
    """What to do where a checkpoint is missing since a run was killed within `replace_folder`; empty elsewhere."""
    old = Path(f"{path}{_OLD}")
    return f"its run was killed while it saved, go on with it or give {old}" if is_checkpoint_folder(old) else ""


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
