"""Learned queries that read the frames of a window, or of a whole span."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salad_lightning.connectors._layers import OutputProjection, ceil_div, require_positive, zero_padding
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Connector, ConnectorOutput, LengthT

__all__ = ["QFormerConnector"]


class QFormerConnector(Connector):
    """A Q-Former: learned queries attend to each other and to the frames, ``num_queries`` positions per window.

    With ``window`` it is SALMONN's window-level Q-Former (arXiv 2310.13289, section 3.1: one query per 0.33 s), so
    longer spans get more positions; without, BLIP-2's (arXiv 2301.12597): a fixed number per span. Blocks have layer
    norm before self-attention, cross-attention and a GELU MLP. Frames carry sinusoidal positions inside their window.

    Args:
        encoder_dim: Width of an encoder frame.
        llm_dim: Width of an LLM embedding.
        num_queries: Queries, and so positions, per window.
        window: Frames in a window; null for the whole span. 4 frames of Mimi last 0.32 s, 17 of Whisper 0.34 s.
        num_layers: Blocks.
        num_heads: Attention heads.
        hidden_dim: Width of queries and blocks; the MLP is four times as wide.
        output_scale: Root mean square of an output vector at the start. Best near that of the LLM's
            embedding table; 0.02 is what Hugging Face's LLMs are initialised to.

    Raises:
        UserError: If ``hidden_dim`` does not split into ``num_heads`` heads, or is odd.
    """

    def __init__(
        self,
        *,
        encoder_dim: int,
        llm_dim: int,
        num_queries: int = 1,
        window: int | None = 4,
        num_layers: int = 2,
        num_heads: int = 12,
        hidden_dim: int = 768,
        output_scale: float = 0.02,
    ) -> None:
        super().__init__()
        require_positive(self, num_queries=num_queries, num_layers=num_layers, num_heads=num_heads)
        require_positive(self, window=1 if window is None else window, hidden_dim=hidden_dim, output_scale=output_scale)
        if hidden_dim % num_heads or hidden_dim % 2:
            raise UserError(
                f"hidden_dim {hidden_dim} does not split into {num_heads} heads, or is odd",
                where=type(self).__name__,
                cure="make hidden_dim an even multiple of num_heads",
            )
        self.num_queries, self.window = num_queries, window
        self.input = nn.Linear(encoder_dim, hidden_dim)
        self.input_norm = nn.LayerNorm(hidden_dim)
        self.queries = nn.Parameter(torch.randn(num_queries, hidden_dim))
        self.layers = nn.ModuleList(_Block(hidden_dim, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.output = OutputProjection(hidden_dim, llm_dim, output_scale)

    def output_lengths(self, lengths: LengthT, *, num_words: LengthT | None = None) -> LengthT:
        """``num_queries`` for every window begun, or for the span where there is no window."""
        windows = ceil_div(lengths, self.window) if self.window else lengths * 0 + 1
        return windows * self.num_queries

    def forward(self, frames_NTD: Tensor, lengths_N: Tensor, *, num_words_N: Tensor | None = None) -> ConnectorOutput:
        """Map spans to embeddings."""
        num_spans, num_frames, width = frames_NTD.shape
        window = self.window or num_frames
        num_windows = ceil_div(num_frames, window)
        frames_NTD = F.pad(zero_padding(frames_NTD, lengths_N), (0, 0, 0, num_windows * window - num_frames))
        # From here on the batch is one of windows, W = N * num_windows; windows share weights and see only themselves.
        frames_WTD = self.input(frames_NTD.reshape(num_spans * num_windows, window, width))
        frames_WTD = self.input_norm(frames_WTD + _sinusoids(frames_WTD))
        mask_WT = _frame_mask(lengths_N, num_windows, window)
        hidden = self.queries.expand(num_spans * num_windows, -1, -1)
        for layer in self.layers:
            hidden = layer(hidden, frames_WTD, mask_WT)
        hidden = hidden.reshape(num_spans, num_windows * self.num_queries, hidden.shape[-1])
        lengths = self.output_lengths(lengths_N)
        return ConnectorOutput(self.output(self.norm(hidden), lengths), lengths, {})


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.self_norm, self.cross_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention, self.cross_attention = _Attention(dim, num_heads), _Attention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, queries_WQD: Tensor, frames_WTD: Tensor, mask_WT: Tensor) -> Tensor:
        normed = self.self_norm(queries_WQD)
        queries_WQD = queries_WQD + self.self_attention(normed, normed, None)
        queries_WQD = queries_WQD + self.cross_attention(self.cross_norm(queries_WQD), frames_WTD, mask_WT)
        hidden: Tensor = queries_WQD + self.mlp(self.mlp_norm(queries_WQD))
        return hidden


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, queries: Tensor, context: Tensor, mask_WT: Tensor | None) -> Tensor:
        query, key, value = (
            self._heads(self.query(queries)),
            self._heads(self.key(context)),
            self._heads(self.value(context)),
        )
        mask = None if mask_WT is None else mask_WT[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return output

    def _heads(self, inputs: Tensor) -> Tensor:
        batch, length, dim = inputs.shape
        return inputs.view(batch, length, self.num_heads, dim // self.num_heads).transpose(1, 2)


def _frame_mask(lengths_N: Tensor, num_windows: int, window: int) -> Tensor:
    """``[N * num_windows, window]``, True at frames that exist."""
    positions = torch.arange(num_windows * window, device=lengths_N.device).view(num_windows, window)
    mask = positions < lengths_N[:, None, None]
    # Windows beyond the end have nothing to attend to, and a softmax over nothing is NaN in some attention kernels:
    # they get a (zero) frame to look at, and their output is dropped.
    mask[..., 0] = True
    return mask.flatten(0, 1)


def _sinusoids(like_WTD: Tensor) -> Tensor:
    """``[T, D]`` sines and cosines of positions (arXiv 1706.03762, section 3.5)."""
    num_positions, dim = like_WTD.shape[1:]
    exponents = torch.arange(0, dim, 2, device=like_WTD.device, dtype=torch.float32) / dim
    angles = torch.arange(num_positions, device=like_WTD.device, dtype=torch.float32)[:, None] * 10_000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like_WTD.dtype)
