"""A gated recurrent unit between speech frames and LLM embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from salad_lightning.interfaces import Connector, ConnectorOutput, LengthT

__all__ = ["GRUConnector"]


class GRUConnector(Connector):
    """Joins adjacent frames and reads the groups from left to right with a GRU (Cho et al., arXiv 1406.1078).

    Every position knows the span up to itself and nothing after it, so spans can be read while they are being spoken.

    Args:
        encoder_dim: Width of an encoder frame.
        llm_dim: Width of an LLM embedding.
        stack: Adjacent frames that become one position; the tail of a span is filled with zeros.
        hidden_dim: Width of the recurrent state.
        num_layers: GRU layers.
        output_scale: Root mean square of an output vector at the start; about that of the LLM's embedding table.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(
        self,
        *,
        encoder_dim: int,
        llm_dim: int,
        stack: int = 2,
        hidden_dim: int = 512,
        num_layers: int = 2,
        output_scale: float = 0.02,
    ) -> None:
        super().__init__()
        if min(stack, hidden_dim, num_layers, output_scale) <= 0:
            raise ValueError(f"sizes must be positive: {stack=}, {hidden_dim=}, {num_layers=}, {output_scale=}")
        self.stack = stack
        self.gru = nn.GRU(stack * encoder_dim, hidden_dim, num_layers, batch_first=True)
        self.norm = nn.LayerNorm(hidden_dim)
        self.output = nn.Linear(hidden_dim, llm_dim)
        # Normalised states have unit variance, so an output's variance is hidden_dim times that of the weights.
        nn.init.normal_(self.output.weight, std=output_scale * hidden_dim**-0.5)
        nn.init.zeros_(self.output.bias)

    def output_lengths(self, lengths: LengthT, *, num_words: LengthT | None = None) -> LengthT:
        """``ceil(lengths / stack)``."""
        return (lengths + self.stack - 1) // self.stack

    def forward(self, frames_NTD: Tensor, lengths_N: Tensor, *, num_words_N: Tensor | None = None) -> ConnectorOutput:
        """Map spans to embeddings ``[N, ceil(T / stack), llm_dim]``."""
        valid_NT = torch.arange(frames_NTD.shape[1], device=lengths_N.device) < lengths_N[:, None]
        # What stands beyond a span's end would share a group with its last frames.
        frames_NTD = frames_NTD.masked_fill(~valid_NT[:, :, None], 0.0)
        frames_NTD = nn.functional.pad(frames_NTD, (0, 0, 0, -frames_NTD.shape[1] % self.stack))
        num_clips, num_frames, width = frames_NTD.shape
        states, _ = self.gru(frames_NTD.reshape(num_clips, num_frames // self.stack, self.stack * width))
        return ConnectorOutput(self.output(self.norm(states)), self.output_lengths(lengths_N), {})
