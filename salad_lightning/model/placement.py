"""Loads a language model to where a run wants it: whole on this device, or sharded block by block."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from salad_lightning.model.execution import Execution, prepare_blocks
from salad_lightning.model.llm import LanguageModel, load_language_model
from salad_lightning.model.parallel import shard_block
from salad_lightning.model.streaming import stream_language_model

__all__ = ["Placement", "load_placed"]


class Placement(NamedTuple):
    """Where and in what precision a model is computed.

    Attributes:
        device: Of this process.
        dtype: Of matrix products and frozen weights.
        mesh: One-dimensional, over which weights are sharded; None for whole ones.
    """

    device: torch.device
    dtype: torch.dtype
    mesh: DeviceMesh | None = None


def load_placed(
    path: str,
    vocab_size: int,
    placement: Placement,
    execution: Execution,
    *,
    trained: bool,
    quantization: Any = None,
) -> LanguageModel:
    """A trained model; under a mesh its blocks are sharded, and what is around them must be by the caller.

    Args:
        path: Folder or hub name.
        vocab_size: Real tokens.
        placement: Where.
        execution: How it is computed.
        trained: Whether its weights are (then in fp32); frozen ones take the compute dtype.
        quantization: See `load_language_model`; for whole models.

    Returns:
        The model, in eval mode.
    """
    mesh = placement.mesh
    dtype = torch.float32 if trained and quantization is None else placement.dtype
    if mesh is None:
        llm = load_language_model(path, vocab_size, dtype, execution.attention, quantization)
        prepare_blocks(llm.blocks, execution, trained=trained)
        return llm

    def place(block: nn.Module) -> None:
        prepare_blocks([block], execution, trained=trained)
        shard_block(block, mesh, placement.dtype)

    streamed = stream_language_model(
        path, vocab_size, dtype=dtype, device=placement.device, place=place, attention=execution.attention
    )
    if streamed is not None:
        return streamed
    llm = load_language_model(path, vocab_size, dtype, execution.attention).to(placement.device)
    for block in llm.blocks:
        place(block)
    return llm
