"""A strided one-dimensional convolution stack."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from salad_lightning.connectors._layers import OutputProjection, ceil_div, require_positive, zero_padding
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Connector, ConnectorOutput, LengthT

__all__ = ["ConvConnector"]


class ConvConnector(Connector):
    """Shortens a span with strided convolutions over time, then maps each position to the LLM's width.

    The length adaptor of Li et al. (arXiv 2010.12829, section 3), here with GELU and a layer norm at the end. Every
    convolution sees zeros beyond its span's end, as if the span were alone.

    Args:
        encoder_dim: Width of an encoder frame.
        llm_dim: Width of an LLM embedding.
        strides: Stride of each convolution; their product is the number of frames behind one position.
        kernel_size: Odd, so that a convolution shortens a span to ``ceil(length / stride)``; no smaller than any
            stride, or frames would be skipped.
        hidden_dim: Channels of the convolutions.
        output_scale: Root mean square of an output vector at the start. Best near that of the LLM's
            embedding table; 0.02 is what Hugging Face's LLMs are initialised to.

    Raises:
        UserError: If ``kernel_size`` is even or smaller than a stride.
    """

    def __init__(
        self,
        *,
        encoder_dim: int,
        llm_dim: int,
        strides: tuple[int, ...] = (2, 2),
        kernel_size: int = 3,
        hidden_dim: int = 1024,
        output_scale: float = 0.02,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        require_positive(self, strides=min(self.strides, default=0), hidden_dim=hidden_dim, output_scale=output_scale)
        if kernel_size % 2 == 0 or kernel_size < max(self.strides):
            raise UserError(
                f"kernel_size must be odd and at least the largest stride, {max(self.strides)}; it is {kernel_size}",
                where="ConvConnector",
                cure=f"use {max(self.strides) // 2 * 2 + 1}",
            )
        widths = [encoder_dim, *[hidden_dim] * len(self.strides)]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(first, second, kernel_size, stride, padding=kernel_size // 2)
            for (first, second), stride in zip(pairwise(widths), self.strides, strict=True)
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.output = OutputProjection(hidden_dim, llm_dim, output_scale)

    def output_lengths(self, lengths: LengthT, *, num_words: LengthT | None = None) -> LengthT:
        """Divided by each stride in turn, rounded up."""
        for stride in self.strides:
            lengths = ceil_div(lengths, stride)
        return lengths

    def forward(self, frames_NTD: Tensor, lengths_N: Tensor, *, num_words_N: Tensor | None = None) -> ConnectorOutput:
        """Map spans to embeddings."""
        hidden, lengths = zero_padding(frames_NTD, lengths_N), lengths_N
        for convolution, stride in zip(self.convolutions, self.strides, strict=True):
            hidden = F.gelu(convolution(hidden.transpose(1, 2)).transpose(1, 2))
            lengths = ceil_div(lengths, stride)
            hidden = zero_padding(hidden, lengths)
        return ConnectorOutput(self.output(self.norm(hidden), lengths), lengths, {})
