"""A language model block by block from its safetensors, so that nobody ever holds all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from salad_lightning.errors import UserError
from salad_lightning.model.llm import LanguageModel, build_language_model, load_config

__all__ = ["meta_parameters", "stream_language_model", "weights_mark"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PIECES, _PIECE = 64, 4096  # of a file that is to be told from others, and bytes of each


def stream_language_model(
    path: str,
    vocab_size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    place: Callable[[nn.Module], None],
    attention: str = "sdpa",
) -> LanguageModel | None:
    """Build a model without memory, then fill it block by block; ``place`` shards each as soon as it is filled.

    At the peak a process holds its shards, one whole block, and what lies outside the blocks.

    Args:
        path: Folder or hub name.
        vocab_size: Real tokens.
        dtype: Of the parameters.
        device: Of the parameters.
        place: Called with every block, in order.
        attention: See `build_language_model`.

    Returns:
        The model, in eval mode; None where its weights are stored in another form than it holds them (no safetensors,
        other names, parts put together on loading), which only `load_language_model` can read.

    Raises:
        UserError: If a weight has another shape than config.json says.
    """
    with meta_parameters():
        model = build_language_model(load_config(path), vocab_size, attention)
    names = _names(model.hf)
    weights = _Weights.find(path)
    if weights is None or any(not weights.name_of(aliases) for aliases in names.values()):
        return None
    for module in [*model.blocks, model]:
        _fill(module, names, weights, dtype, device)
        if module is not model:
            place(module)
    model.to(device)  # buffers: they were built with their values
    return model.eval()


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Modules built in here have their parameters on the meta device, and buffers with their values.

    ``torch.device("meta")`` would empty the buffers too, and those that no checkpoint holds (the rotary frequencies)
    would come back as whatever is in memory.
    """
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _names(hf: nn.Module) -> dict[int, list[str]]:
    """All names of every parameter, by its identity: a tied head has two."""
    names: dict[int, list[str]] = {}
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _fill(module: nn.Module, names: dict[int, list[str]], weights: _Weights, dtype: Any, device: Any) -> None:
    filled: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for key, empty in owner._parameters.items():
            if empty is None or not empty.is_meta:
                continue
            if id(empty) not in filled:  # else tied
                value = weights.read(names[id(empty)], empty.shape)
                filled[id(empty)] = nn.Parameter(value.to(device, dtype), requires_grad=empty.requires_grad)
            owner._parameters[key] = filled[id(empty)]


def weights_mark(path: str) -> str:
    """A name for the weights of a model: models of one shape, such as a base model and its chat version, have others.

    Made of 64 pieces of every file, so that it takes no time; a model that is saved anew in other files has another.

    Args:
        path: Folder or hub name.

    Returns:
        16 hexadecimal digits, or nothing where there are no safetensors.
    """
    files = _files(path)
    if not files:
        return ""
    digest = hashlib.sha256()
    for _, file in sorted(files.items()):
        last = max(Path(file).stat().st_size - _PIECE, 0)
        digest.update(str(last).encode())
        with open(file, "rb") as content:
            for number in range(_PIECES):
                content.seek(last * number // (_PIECES - 1))
                digest.update(content.read(_PIECE))
    return digest.hexdigest()[:16]


class _Weights:
    """Tensors by name, each read from its file when it is asked for."""

    def __init__(self, path: str, files: dict[str, str]) -> None:
        self._path, self._files = path, files

    @classmethod
    def find(cls, path: str) -> _Weights | None:
        """The files of a folder or hub name; None where there are no safetensors."""
        files = _files(path)
        if _SINGLE in files:
            with safe_open(files[_SINGLE], "pt") as file:
                return cls(path, dict.fromkeys(file.keys(), files[_SINGLE]))
        return cls(path, {name: files[held] for name, held in _index(path).items()}) if files else None

    def name_of(self, aliases: list[str]) -> str | None:
        """Under which of its names a parameter is stored."""
        return next((name for name in aliases if name in self._files), None)

    def read(self, aliases: list[str], shape: torch.Size) -> Tensor:
        name = self.name_of(aliases)
        assert name is not None, aliases
        with safe_open(self._files[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if tensor.shape != shape:
            raise UserError(
                f"{name} has the shape {tuple(tensor.shape)} in the weights and {tuple(shape)} by config.json",
                where=self._path,
                cure="copy the model's folder again: weights and config.json are of different models",
            )
        return tensor


def _files(path: str) -> dict[str, str]:
    """Where the safetensors of a folder or hub name are, by their names; none where there are none."""
    names = {_SINGLE} if _cached(path, _SINGLE) else set(_index(path).values())
    return {name: str(_cached(path, name)) for name in names}


def _index(path: str) -> dict[str, str]:
    """Which file holds which tensor, where several do."""
    index = _cached(path, _INDEX)
    held: dict[str, str] = {} if index is None else json.loads(Path(index).read_text())["weight_map"]
    return held


def _cached(path: str, name: str) -> str | None:
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else str(found)
