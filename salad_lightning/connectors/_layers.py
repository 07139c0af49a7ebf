"""Small layers that several built-in connectors share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salad_lightning.errors import UserError
from salad_lightning.interfaces import LengthT


class RMSNorm(nn.RMSNorm):
    """RMS norm in the dtype of its input: torch's own falls back to a slow fp32 path for fp32 gains under autocast."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise the last dimension; the mean square is taken in fp32 for bf16 inputs too."""
        return F.rms_norm(inputs, self.normalized_shape, self.weight.to(inputs.dtype), self.eps)


class OutputProjection(nn.Module):
    """Linear map to the LLM's width, then an RMS norm whose gain starts at 1, times a fixed ``scale``.

    Embedding tables of LLMs start near 0.02 and grow in training. A linear layer alone starts at another size and
    drifts. In a small trial of one seed (two causal blocks before a frozen two-layer LLM whose table has 0.13) 350
    steps at learning rate 2e-3 ended at a KL of 0.06 nats with a scale of 0.13, 0.21 with 0.02, 0.67 with 1 and 0.56
    with the linear layer alone; at 5e-4 all were alike (1.0 to 1.1).
    The scale is fixed and the gain relative, because AdamW's steps have about the size of the learning rate: beside a
    gain of 0.02 a step of 1e-3 would be large, beside 1 it is small.
    """

    def __init__(self, input_dim: int, llm_dim: int, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, llm_dim)
        self.norm = RMSNorm(llm_dim)
        self.scale = scale

    def forward(self, inputs_NTD: Tensor, lengths_N: Tensor) -> Tensor:
        """``[N, T, llm_dim]``, zero beyond each length."""
        return zero_padding(self.norm(self.linear(inputs_NTD)) * self.scale, lengths_N)


def zero_padding(inputs_NTD: Tensor, lengths_N: Tensor) -> Tensor:
    """Zero beyond each length."""
    positions_T = torch.arange(inputs_NTD.shape[1], device=inputs_NTD.device)
    return inputs_NTD.masked_fill((positions_T >= lengths_N[:, None])[..., None], 0.0)


def ceil_div(lengths: LengthT, divisor: int) -> LengthT:
    """Division rounded up, for ints and integer tensors alike."""
    return -(-lengths // divisor)


def stack_frames(frames_NTD: Tensor, stack: int) -> Tensor:
    """Join ``stack`` adjacent frames: ``[N, T, D]`` to ``[N, ceil(T / stack), stack * D]``, the tail filled with 0."""
    num_spans, num_frames, width = frames_NTD.shape
    padded = F.pad(frames_NTD, (0, 0, 0, -num_frames % stack))
    return padded.reshape(num_spans, ceil_div(num_frames, stack), stack * width)


def require_positive(owner: object, **values: int | float) -> None:
    """Refuse sizes below 1 and scales that are not positive.

    Raises:
        UserError: Naming the connector and the key.
    """
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name} must be positive, not {value}", where=type(owner).__name__, cure=f"raise {name}")
