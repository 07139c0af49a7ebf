"""Frame stacking and a multi-layer perceptron."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from salad_lightning.connectors._layers import (
    OutputProjection,
    ceil_div,
    require_positive,
    stack_frames,
    zero_padding,
)
from salad_lightning.interfaces import Connector, ConnectorOutput, LengthT

__all__ = ["MLPConnector"]


class MLPConnector(Connector):
    """Joins adjacent frames and maps each group by itself through an MLP.

    The projector of SLAM-LLM (arXiv 2402.08846, section 2: 5 frames of 50 Hz, width 2048) and, without stacking, of
    LLaVA 1.5 (arXiv 2310.03744). Layer norm per frame, GELU between the linear layers.

    Args:
        encoder_dim: Width of an encoder frame.
        llm_dim: Width of an LLM embedding.
        stack: Adjacent frames that become one position; the tail of a span is filled with zeros.
        hidden_dim: Width between the linear layers.
        num_layers: Linear layers, the last one to ``llm_dim`` included.
        output_scale: Root mean square of an output vector at the start. Best near that of the LLM's
            embedding table; 0.02 is what Hugging Face's LLMs are initialised to.
    """

    def __init__(
        self,
        *,
        encoder_dim: int,
        llm_dim: int,
        stack: int = 2,
        hidden_dim: int = 2048,
        num_layers: int = 2,
        output_scale: float = 0.02,
    ) -> None:
        super().__init__()
        require_positive(self, stack=stack, hidden_dim=hidden_dim, num_layers=num_layers, output_scale=output_scale)
        self.stack = stack
        self.norm = nn.LayerNorm(encoder_dim)
        widths = [stack * encoder_dim, *[hidden_dim] * (num_layers - 1)]
        self.hidden = nn.Sequential(*[nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in pairwise(widths)])
        self.output = OutputProjection(widths[-1], llm_dim, output_scale)

    def output_lengths(self, lengths: LengthT, *, num_words: LengthT | None = None) -> LengthT:
        """``ceil(lengths / stack)``."""
        return ceil_div(lengths, self.stack)

    def forward(self, frames_NTD: Tensor, lengths_N: Tensor, *, num_words_N: Tensor | None = None) -> ConnectorOutput:
        """Map spans to embeddings."""
        frames_NTD = zero_padding(self.norm(frames_NTD), lengths_N)
        hidden = self.hidden(stack_frames(frames_NTD, self.stack))
        lengths = self.output_lengths(lengths_N)
        return ConnectorOutput(self.output(hidden, lengths), lengths, {})
