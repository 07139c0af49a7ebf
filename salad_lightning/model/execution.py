"""How a model is computed, whatever it is: activation checkpointing, compilation, and the attention kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from salad_lightning.errors import UserError

__all__ = ["Execution", "prepare_blocks", "prepare_process"]

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
# Costly, and with small results.
_ATTENTIONS = frozenset(
    {
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.higher_order.flex_attention,
    }
)


_MAX_GRAPHS = 64


@dataclass(frozen=True)
class Execution:
    """What changes time and memory of a step, and nothing else.

    Args:
        activation_checkpointing: What a Transformer block keeps for its backward pass: ``none`` of it is computed
            again, ``selective`` keeps attention (``flex``: where compiled) and every second matrix product, ``full``
            keeps the block's input only.
        compile: Compile every block of the language models with ``torch.compile``. Rows of one length
            (``data.trim_rows: false``) are compiled once.
        attention: ``sdpa`` is torch's fused attention with the mask written out, for any device; ``flex`` is
            FlexAttention, which skips what no position may see, for GPUs.
    """

    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    attention: Literal["sdpa", "flex"] = "sdpa"

    def check(self, device: torch.device) -> None:
        """Refuse what the device cannot do.

        Raises:
            UserError: For FlexAttention off a GPU, where it has no backward pass.
        """
        if self.attention == "flex" and device.type != "cuda":
            raise UserError(
                f"FlexAttention does not train on {device.type}",
                where="model.execution.attention",
                cure="set it to sdpa",
            )


def prepare_process(device: torch.device, execution: Execution) -> None:
    """Settings of torch that hold for the whole process.

    Args:
        device: That models run on.
        execution: How.
    """
    if device.type == "cuda":
        # cuDNN's attention makes a plan for every new shape, and spans and transcripts bring new ones with each batch.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if execution.compile or execution.attention == "flex":
        import torch._dynamo as dynamo

        # Training, validation, student, teacher, numbers of teacher rows: beyond the limit FlexAttention would go on
        # with all scores in memory, and blocks uncompiled, without a word.
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _MAX_GRAPHS)


def prepare_blocks(blocks: Iterable[nn.Module], execution: Execution, *, trained: bool = True) -> None:
    """Set checkpointing and compilation of Transformer blocks, in place and without new parameter names.

    Only ``forward`` is changed, so that hooks (FSDP2's gathering among them) stay outside.

    Args:
        blocks: Of a model.
        execution: How.
        trained: Whether there is a backward pass.
    """
    for block in blocks:
        if trained and execution.activation_checkpointing != "none":
            block.forward = _checkpointed(block.forward, execution.activation_checkpointing == "selective")
        if execution.compile:
            block.forward = torch.compile(block.forward)


def _checkpointed(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    options: dict[str, Any] = {"context_fn": _selective_contexts} if selective else {}

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    return call


def _selective_contexts() -> Any:
    """Attention and every second product are kept, as in torchtitan (arXiv 2410.06511, section 2.1)."""
    counts = {True: 0, False: 0}  # in the forward pass and again while recomputing

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in _PRODUCTS:
            counts[context.is_recompute] += 1
            keep = counts[context.is_recompute] % 2 == 0
        else:
            keep = operation in _ATTENTIONS
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
