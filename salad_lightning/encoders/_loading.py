"""Load a frozen Hugging Face model, or say plainly why it cannot be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig

from salad_lightning.errors import UserError

__all__ = ["load_config", "load_frozen"]

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_FAILURES = (OSError, ValueError, RuntimeError, SafetensorError)


def load_config(path: str, model_types: Sequence[str]) -> tuple[str, PreTrainedConfig]:
    """The configuration behind a folder or a Hugging Face name.

    Args:
        path: Folder, or name on the Hugging Face hub.
        model_types: ``model_type`` values that are taken.

    Returns:
        ``path`` with ``~`` expanded where it is a folder, and the configuration.

    Raises:
        UserError: If there is no such model, or it is of another type.
    """
    folder = Path(path).expanduser()
    is_folder = folder.is_dir()
    if is_folder:
        path = str(folder)
        _check_files(folder)
    elif _looks_like_a_folder(path):
        raise UserError("the model folder is not there", where=path, cure="check the path")
    try:
        config = AutoConfig.from_pretrained(path)
    except _FAILURES as error:
        if is_folder:
            raise UserError(f"config.json cannot be used ({_first_line(error)})", where=path, cure=_RESAVE) from error
        raise _not_on_the_hub(path, error) from error
    if config.model_type not in model_types:
        raise UserError(
            f"model_type is {config.model_type!r}, not {' or '.join(map(repr, model_types))}",
            where=path,
            cure="give a model of that type, or use the encoder made for this one",
        )
    return path, config


def load_frozen(
    model_class: Any, path: str, config: PreTrainedConfig, *, not_needed: str, dtype: str = "float32"
) -> Any:
    """A model in eval mode, without gradient.

    Args:
        model_class: A transformers class with ``from_pretrained``.
        path: As `load_config` returned it.
        config: As `load_config` returned it.
        not_needed: Regular expression of parameter names that may be missing from the file.
        dtype: Of the weights; said here because some checkpoints would load as float16.

    Raises:
        UserError: If the weights are missing, damaged, or of another architecture, or there is no such dtype.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"no encoder is computed in {dtype!r}", where="encoder: dtype", cure="use float32 or bfloat16")
    try:
        model, info = model_class.from_pretrained(
            path, config=config, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except _FAILURES as error:
        raise UserError(f"the weights cannot be loaded ({_first_line(error)})", where=path, cure=_RESAVE) from error
    # transformers fills missing weights with random numbers and only warns.
    if missing := sorted(name for name in info["missing_keys"] if not re.search(not_needed, name)):
        raise UserError(
            f"the weights lack {len(missing)} of the encoder's parameters, {missing[0]} among them",
            where=path,
            cure=_RESAVE,
        )
    return model.eval().requires_grad_(False)


_RESAVE = "download or save the model folder again"


def _check_files(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError("the model folder holds no config.json", where=str(folder), cure=_RESAVE)
    if not any((folder / name).is_file() for name in _WEIGHT_FILES):
        raise UserError(
            "the model folder holds no weights",
            where=str(folder),
            cure=f"put {_WEIGHT_FILES[0]} there: {_RESAVE}",
        )


def _looks_like_a_folder(path: str) -> bool:
    """Hub names are ``name`` or ``owner/name``."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is None


def _not_on_the_hub(path: str, error: Exception) -> UserError:
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return UserError(
            "no such folder, and not in the Hugging Face cache; HF_HUB_OFFLINE forbids a download",
            where=path,
            cure=f"check the path, or unset HF_HUB_OFFLINE, or fetch it once: hf download {path}",
        )
    return UserError(
        f"neither a folder nor a model that the Hugging Face hub gives out ({_first_line(error)})",
        where=path,
        cure=f"check the spelling, or fetch it where there is a network (hf download {path} --local-dir DIR) "
        "and give that folder",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
