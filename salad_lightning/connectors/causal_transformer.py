"""The paper's connector: a causal Transformer decoder over the frames of a span."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salad_lightning.connectors._layers import (
    OutputProjection,
    RMSNorm,
    ceil_div,
    require_positive,
    stack_frames,
    zero_padding,
)
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Connector, ConnectorOutput, LengthT

__all__ = ["CausalTransformerConnector"]


class CausalTransformerConnector(Connector):
    """Decoder blocks as in Llama: RMS norm before, RoPE, grouped-query attention, SwiGLU, no biases.

    The paper gives the sizes that are the defaults here, about 122 M parameters (arXiv 2510.13632, section 4). From
    Mimi's latents (512) to Qwen2.5-3B (2048) they make 120.5 M: 118.0 M in the blocks, 0.5 M before, 2.0 M after them.
    Attention stays inside a span and never looks ahead, so speech can be streamed; positions count from the span's
    first frame.

    Args:
        encoder_dim: Width of an encoder frame.
        llm_dim: Width of an LLM embedding.
        num_layers: Blocks.
        dim: Width of the blocks.
        mlp_dim: Inner width of the SwiGLU.
        num_heads: Query heads.
        num_kv_heads: Key and value heads, each shared by ``num_heads / num_kv_heads`` query heads.
        rope_theta: Base of the rotary frequencies.
        stack: Adjacent frames joined into one position before the first block.
        output_scale: Root mean square of an output vector at the start. Best near that of the LLM's
            embedding table; 0.02 is what Hugging Face's LLMs are initialised to.

    Attributes:
        layers: The blocks, for wrapping by FSDP and activation checkpointing.

    Raises:
        UserError: If ``dim`` does not split into ``num_heads`` heads of even width, or these not into
            ``num_kv_heads`` groups.
    """

    def __init__(
        self,
        *,
        encoder_dim: int,
        llm_dim: int,
        num_layers: int = 12,
        dim: int = 960,
        mlp_dim: int = 2560,
        num_heads: int = 15,
        num_kv_heads: int = 5,
        rope_theta: float = 10_000.0,
        stack: int = 1,
        output_scale: float = 0.02,
    ) -> None:
        super().__init__()
        require_positive(self, num_layers=num_layers, dim=dim, mlp_dim=mlp_dim, num_heads=num_heads)
        require_positive(self, num_kv_heads=num_kv_heads, rope_theta=rope_theta, stack=stack, output_scale=output_scale)
        if dim % (2 * num_heads) or num_heads % num_kv_heads:
            raise UserError(
                f"dim {dim}, num_heads {num_heads} and num_kv_heads {num_kv_heads} do not fit together",
                where=type(self).__name__,
                cure="make dim a multiple of 2 * num_heads and num_heads a multiple of num_kv_heads",
            )
        self.stack, self.rope_theta, self.head_dim = stack, rope_theta, dim // num_heads
        self.input = nn.Linear(stack * encoder_dim, dim)
        self.layers = nn.ModuleList(_Block(dim, mlp_dim, num_heads, num_kv_heads) for _ in range(num_layers))
        self.norm = RMSNorm(dim)
        self.output = OutputProjection(dim, llm_dim, output_scale)

    def output_lengths(self, lengths: LengthT, *, num_words: LengthT | None = None) -> LengthT:
        """``ceil(lengths / stack)``."""
        return ceil_div(lengths, self.stack)

    def forward(self, frames_NTD: Tensor, lengths_N: Tensor, *, num_words_N: Tensor | None = None) -> ConnectorOutput:
        """Map spans to embeddings."""
        # Padding stands at the end, where causal attention never reaches it from a valid position: no mask is needed.
        hidden = self.input(stack_frames(zero_padding(frames_NTD, lengths_N), self.stack))
        rotation = _rotation(hidden.shape[1], self.head_dim, self.rope_theta, hidden)
        for layer in self.layers:
            hidden = layer(hidden, rotation)
        lengths = self.output_lengths(lengths_N)
        return ConnectorOutput(self.output(self.norm(hidden), lengths), lengths, {})


class _Block(nn.Module):
    def __init__(self, dim: int, mlp_dim: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.attention_norm = RMSNorm(dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False)
        self.attention_output = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = RMSNorm(dim)
        self.gate = nn.Linear(dim, mlp_dim, bias=False)
        self.up = nn.Linear(dim, mlp_dim, bias=False)
        self.down = nn.Linear(mlp_dim, dim, bias=False)

    def forward(self, hidden_NTD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        hidden_NTD = hidden_NTD + self._attend(self.attention_norm(hidden_NTD), rotation)
        normed = self.mlp_norm(hidden_NTD)
        hidden: Tensor = hidden_NTD + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return hidden

    def _attend(self, normed_NTD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = (self._heads(linear(normed_NTD)) for linear in (self.query, self.key, self.value))
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=key.shape[1] != query.shape[1]
        )
        output: Tensor = self.attention_output(attended.transpose(1, 2).flatten(2))
        return output

    def _heads(self, inputs_NTD: Tensor) -> Tensor:
        """``[N, heads, T, head_dim]``."""
        num_spans, num_positions, _ = inputs_NTD.shape
        # The number of heads is written out: -1 cannot be inferred for an empty batch of spans.
        num_heads = inputs_NTD.shape[2] // self.head_dim
        return inputs_NTD.view(num_spans, num_positions, num_heads, self.head_dim).transpose(1, 2)


def _rotation(num_positions: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, head_dim / 2]`` of RoPE (arXiv 2104.09864), computed in fp32.

    Made anew in every call: a buffer outside the state dict comes back from the meta device as garbage.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim)
    angles = torch.arange(num_positions, device=like.device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(inputs: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs (i, i + head_dim / 2), the pairing of Hugging Face's Llama and Qwen2."""
    cos, sin = rotation
    first, second = inputs.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
