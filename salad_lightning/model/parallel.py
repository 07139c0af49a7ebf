"""How the model is spread over devices: the one place that knows (the model does not)."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from salad_lightning.errors import UserError
from salad_lightning.model.checkpoint_folder import is_checkpoint_folder, load_into, replace_folder
from salad_lightning.model.llm import LanguageModel
from salad_lightning.model.speech_llm import SpeechLLM

__all__ = [
    "FullyShardedStrategy",
    "check_device",
    "compute_dtype",
    "load_full",
    "reshard",
    "shard_block",
    "shard_language_model",
    "shard_speech_llm",
]


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes of the run, whatever their number.

    `ModelParallelStrategy` left to itself means tensor parallel inside a node; this one shards the data-parallel way
    over the whole world, so one recipe serves one process and many nodes.

    Args:
        save_distributed_checkpoint: Whether every rank writes its own shard (a folder) instead of one file.
        shard_encoder: Shard the frozen encoder too; else every process holds all of it.
        data_parallel_size: Processes over which the weights are sharded: by default all there are, and anything else
            must be as many.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        shard_encoder: bool = False,
        data_parallel_size: int | None = None,
    ) -> None:
        super().__init__(
            data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint
        )
        self.shard_encoder = shard_encoder
        self._wanted = data_parallel_size

    def setup_environment(self) -> None:
        """Take the number of processes from the environment that Lightning has just read.

        Raises:
            UserError: If ``data_parallel_size`` is another one.
        """
        world_size = self.num_nodes * self.num_processes
        if self._wanted not in (None, world_size):
            raise UserError(
                f"data_parallel_size is {self._wanted}, but the run has {self.num_nodes} node(s) × "
                f"{self.num_processes} process(es) = {world_size}",
                where="trainer.strategy.data_parallel_size",
                cure="leave it out, or set trainer.num_nodes and trainer.devices to match",
            )
        self._data_parallel_size = world_size
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write aside and rename, so that a run killed meanwhile leaves nothing half-written under the final name."""
        final = Path(self.broadcast(filepath))
        aside = final.with_name(final.name + ".part")
        if self.is_global_zero and aside.is_dir():
            shutil.rmtree(aside)  # of a run that was killed here
        self.barrier()
        super().save_checkpoint(checkpoint, aside, storage_options)
        self.barrier()
        if self.is_global_zero:
            replace_folder(aside, final)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load each process's part; of a folder, only what is stored: frozen weights are not."""
        path = Path(self.broadcast(checkpoint_path))
        if not is_checkpoint_folder(path):
            if self.optimizers:  # a run that goes on, not one that measures
                _check_optimizer_of(path)
            return super().load_checkpoint(path, weights_only=weights_only)
        module: Any = self.lightning_module
        left_out = module.left_out() if hasattr(module, "left_out") else set()
        return load_into(path, module, list(self.optimizers), frozen=left_out, weights_only=bool(weights_only))


def _check_optimizer_of(path: Path) -> None:
    """Refuse a file of a run that was not sharded: its optimizer state is in another order, and would go elsewhere."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return  # whoever reads it next says why not
    groups = [group for state in content.get("optimizer_states", []) for group in state["param_groups"]]
    sharded = content.get("salad_lightning", {}).get("sharded", False)
    if groups and not (sharded and all("params" in group for group in groups)):
        raise UserError(
            "the checkpoint is of a run that was not sharded, or by consolidate: FSDP2 cannot go on from it",
            where=str(path),
            cure="go on with that run's trainer.strategy, or start from its weights: model.init_from",
        )


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of matrix products and frozen weights under Lightning's ``precision`` key.

    Raises:
        UserError: For precisions that would train half-precision master weights or need loss scaling.
    """
    if precision == "32-true":
        return torch.float32
    if precision == "bf16-mixed":
        return torch.bfloat16
    raise UserError(
        f"precision {precision!r} is not supported for trained weights",
        where="trainer.precision",
        cure="use bf16-mixed (fp32 weights and reductions, bf16 compute) or 32-true",
    )


def check_device(dtype: torch.dtype, device: torch.device, *, has_bf16: bool | None = None) -> None:
    """Refuse bf16 on a device that only emulates it, at a fraction of its speed.

    Args:
        dtype: Of matrix products.
        device: That they run on.
        has_bf16: Whether the device has it; asked of CUDA by default.

    Raises:
        UserError: If it has not.
    """
    if dtype != torch.bfloat16 or device.type != "cuda":
        return
    if has_bf16 is None:
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if not has_bf16:
        raise UserError(
            f"{device} has no bf16 (NVIDIA GPUs have it from compute capability 8.0 on)",
            where="trainer.precision",
            cure="set it to 32-true, or use another device",
        )


def shard_block(block: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Wrap one Transformer block.

    Args:
        block: Changed in place.
        mesh: One-dimensional.
        dtype: Compute dtype; parameters, optimizer state and gradient reduction stay as they are stored.
    """
    fully_shard(block, mesh=mesh, mp_policy=_policy(dtype))


def shard_speech_llm(model: SpeechLLM, mesh: DeviceMesh, dtype: torch.dtype, *, encoder: bool = False) -> None:
    """Wrap the connector's blocks and the root; those of the LLM have been wrapped by `shard_block`.

    Args:
        model: Changed in place.
        mesh: One-dimensional.
        dtype: Compute dtype; parameters, optimizer state and gradient reduction stay fp32.
        encoder: Wrap the frozen encoder too; else it stays whole on every rank.
    """
    for block in getattr(model.connector, "layers", []):
        shard_block(block, mesh, dtype)
    whole = set(model.encoder.parameters())
    if encoder and whole:
        # In the dtype it is stored in: what it makes must equal what `encode` has stored.
        fully_shard(model.encoder, mesh=mesh)
        for method in ("encode", "embed"):
            register_fsdp_forward_method(model.encoder, method)
        whole = set()
    fully_shard(model, mesh=mesh, mp_policy=_policy(dtype), ignored_params=whole)
    for method in ("predict", "predict_text", "check_llm", "run"):
        register_fsdp_forward_method(model, method)  # validation enters here and not through forward


def shard_language_model(model: LanguageModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Wrap the root of a text-only LLM (the teacher), its blocks having been wrapped by `shard_block`."""
    fully_shard(model, mesh=mesh, mp_policy=_policy(dtype))
    register_fsdp_forward_method(model, "check_against_hugging_face")


def load_full(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a sharded module its parts of whole weights, which every process has; others stay as they are."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(module, dict(weights), options=options)


def reshard(module: nn.Module) -> None:
    """Give up the gathered weights of a sharded root, which keeps them after a forward pass."""
    assert isinstance(module, FSDPModule)
    module.reshard()


def _policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
