"""How the model is spread over devices: the one place that knows (the model does not)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from salad_lightning.errors import UserError
from salad_lightning.model.llm import LanguageModel
from salad_lightning.model.speech_llm import SpeechLLM

__all__ = ["FullyShardedStrategy", "compute_dtype", "shard_language_model", "shard_speech_llm"]


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes of the run, whatever their number.

    `ModelParallelStrategy` left to itself means tensor parallel inside a node; this one shards the data-parallel way
    over the whole world, so one recipe serves one process and many nodes.

    Args:
        save_distributed_checkpoint: Whether every rank writes its own shard (a folder) instead of one file.
    """

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        super().__init__(
            data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint
        )

    def setup_environment(self) -> None:
        """Take the number of processes from the environment that Lightning has just read."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write aside and rename, so that a run killed meanwhile leaves nothing half-written under the final name."""
        final = Path(self.broadcast(filepath))
        aside = final.with_name(final.name + ".part")
        super().save_checkpoint(checkpoint, aside, storage_options)
        self.barrier()
        if self.is_global_zero:
            if final.is_dir():
                shutil.rmtree(final)
            os.replace(aside, final)
        self.barrier()


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of matrix products and frozen weights under Lightning's ``precision`` key.

    Raises:
        UserError: For precisions that would train half-precision master weights or need loss scaling.
    """
    if precision in ("32-true", "64-true"):
        return torch.float32 if precision == "32-true" else torch.float64
    if precision == "bf16-mixed":
        return torch.bfloat16
    raise UserError(
        f"precision {precision!r} is not supported for trained weights",
        where="trainer.precision",
        cure="use bf16-mixed (fp32 weights and reductions, bf16 compute) or 32-true",
    )


def shard_speech_llm(model: SpeechLLM, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Wrap the blocks of LLM and connector, then the root. The frozen encoder stays whole on every rank.

    Args:
        model: Changed in place.
        mesh: One-dimensional.
        dtype: Compute dtype; parameters, optimizer state and gradient reduction stay fp32.
    """
    policy = _policy(dtype)
    for block in [*model.llm.blocks, *getattr(model.connector, "layers", [])]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=set(model.encoder.parameters()))
    for method in ("predict", "predict_text"):
        register_fsdp_forward_method(model, method)  # validation enters here and not through forward


def shard_language_model(model: LanguageModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Wrap the blocks of a text-only LLM (the teacher), then its root."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=_policy(dtype))
    fully_shard(model, mesh=mesh, mp_policy=_policy(dtype))


def _policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
