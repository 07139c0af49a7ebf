"""Continuous integrate-and-fire: speech frames are gathered into one vector a word."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from salad_lightning.errors import UserError
from salad_lightning.interfaces import Connector, ConnectorOutput, LengthT

__all__ = ["CIFConnector", "integrate_and_fire"]


class CIFConnector(Connector):
    """One vector a spoken word, by continuous integrate-and-fire (Dong and Xu, arXiv 1905.11235, section 3).

    A small network gives every frame a weight between 0 and 1. Weights are added up from left to right; each time the
    sum passes a whole number a vector is complete: the weighted mean of the frames since the one before. BLSP-KD
    (arXiv 2405.19041) puts this between a speech encoder and an LLM, so that speech has the pace of text.

    In training, where the transcript is known, the weights of a span are scaled so that they add up to its words (the
    paper's scaling strategy), and the *quantity loss* |sum of the weights − words| teaches the weights to do so by
    themselves. In evaluation they are scaled to their own sum, rounded (in place of the paper's rule for the tail), so
    the number of vectors is what the connector hears and is known only afterwards: beforehand it is bounded.

    Args:
        encoder_dim: Width of an encoder frame.
        llm_dim: Width of an LLM embedding.
        frames_per_word: Frames that make a word before anything is learned: 4.5 of Mimi's 12.5 a second, 18 of
            Whisper's 50.
        quantity_weight: Weight of the quantity loss, which is summed over spans as the objective is over tokens.
        kernel_size: Frames that the weight of a frame is computed from, centred on it; odd.
        hidden_dim: Width of the weight network and of the map to the LLM.
        output_scale: Root mean square of an output vector at the start; about that of the LLM's embedding table.

    Raises:
        UserError: If a value is out of range.
    """

    exact = False

    def __init__(
        self,
        *,
        encoder_dim: int,
        llm_dim: int,
        frames_per_word: float = 4.5,
        quantity_weight: float = 1.0,
        kernel_size: int = 5,
        hidden_dim: int = 512,
        output_scale: float = 0.02,
    ) -> None:
        super().__init__()
        for wrong, cure in (
            (frames_per_word <= 1 and f"frames_per_word is {frames_per_word}", "give more than 1"),
            (quantity_weight <= 0 and f"quantity_weight is {quantity_weight}", "without it nothing learns to count"),
            (kernel_size % 2 != 1 and f"kernel_size is {kernel_size}", "give an odd number"),
            (hidden_dim <= 0 and f"hidden_dim is {hidden_dim}", "give 1 or more"),
            (output_scale <= 0 and f"output_scale is {output_scale}", "give more than 0"),
        ):
            if wrong:
                raise UserError(wrong, where="CIFConnector", cure=cure)
        self.quantity_weight = quantity_weight
        self._frames_in_100_words = round(100 * frames_per_word)
        self.context = nn.Conv1d(encoder_dim, hidden_dim, kernel_size, padding=kernel_size // 2)
        self.weight = nn.Linear(hidden_dim, 1)
        # sigmoid(-log(n - 1)) is 1 / n.
        nn.init.constant_(self.weight.bias, -math.log(frames_per_word - 1))
        self.input = nn.Linear(encoder_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        self.output = nn.Linear(hidden_dim, llm_dim)
        # Normalised vectors have unit variance, so an output's variance is hidden_dim times that of the weights.
        nn.init.normal_(self.output.weight, std=output_scale * hidden_dim**-0.5)
        nn.init.zeros_(self.output.bias)

    def output_lengths(self, lengths: LengthT, *, num_words: LengthT | None = None) -> LengthT:
        """At most half as many again as there are words, where those are known; never more than frames.

        Where they are not, at most twice as many as ``frames_per_word`` suggests.
        """
        unknown = lengths * 200 // self._frames_in_100_words + 1
        if isinstance(lengths, Tensor):
            words = torch.zeros_like(lengths) if num_words is None else torch.as_tensor(num_words)
            bound = torch.where(words > 0, _half_more(words), unknown)
            return torch.minimum(lengths, bound)
        return min(lengths, _half_more(num_words) if num_words else unknown)

    def forward(self, frames_NTD: Tensor, lengths_N: Tensor, *, num_words_N: Tensor | None = None) -> ConnectorOutput:
        """Map spans to embeddings ``[N, most vectors of a span, llm_dim]``."""
        valid_NT = torch.arange(frames_NTD.shape[1], device=lengths_N.device) < lengths_N[:, None]
        # What stands beyond a span's end would be heard by the convolution at its last frames.
        frames_NTD = frames_NTD.masked_fill(~valid_NT[:, :, None], 0.0)
        weight_NT = self._weights(frames_NTD) * valid_NT
        most_N = self.output_lengths(lengths_N, num_words=num_words_N)
        words_N = torch.zeros_like(lengths_N) if num_words_N is None else num_words_N
        count_N = weight_NT.detach().sum(1).round().long()
        if self.training:
            count_N = torch.where(words_N > 0, words_N, count_N)
        count_N = torch.minimum(count_N.clamp(min=1), most_N)
        vectors = integrate_and_fire(self.input(frames_NTD), weight_NT, count_N, int(frames_NTD.shape[1]))
        away_N = (weight_NT.sum(1) - words_N).abs()
        quantity = self.quantity_weight * torch.where(words_N > 0, away_N, 0.0).sum()
        return ConnectorOutput(self.output(self.norm(vectors)), count_N, {"quantity": quantity})

    def _weights(self, frames_NTD: Tensor) -> Tensor:
        """``[N, T]`` in (0, 1), fp32: sums over a span need it."""
        hidden_NTD = nn.functional.gelu(self.context(frames_NTD.transpose(1, 2))).transpose(1, 2)
        weights: Tensor = self.weight(hidden_NTD).squeeze(-1).float().sigmoid()
        return weights


def integrate_and_fire(frames_NTD: Tensor, weight_NT: Tensor, count_N: Tensor, most: int) -> Tensor:
    """Weighted means of consecutive frames.

    Frame t covers the stretch between the sums of the weights before and after it; vector k gathers from every frame
    what lies of its stretch between k and k + 1. That is the paper's loop over frames without the loop.

    Args:
        frames_NTD: Frames.
        weight_NT: Their weights, fp32, at least 0, with a positive sum in every row; scaled here to ``count_N``.
        count_N: Vectors of each row.
        most: K, vectors to return; those beyond ``count_N`` are zero.

    Returns:
        ``[N, K, D]``, in the dtype of the frames.
    """
    with torch.autocast(frames_NTD.device.type, enabled=False):
        weight_NT = weight_NT * (count_N / weight_NT.sum(1))[:, None]
        after_NT = weight_NT.cumsum(1)
        before_NT = after_NT - weight_NT
        start_K1 = torch.arange(most, device=frames_NTD.device, dtype=weight_NT.dtype)[:, None]
        share_NKT = torch.minimum(after_NT[:, None], start_K1 + 1) - torch.maximum(before_NT[:, None], start_K1)
        # Rounding may carry the last sum a little over its whole number.
        share_NKT = share_NKT.clamp(min=0) * (start_K1 < count_N[:, None, None])
        return share_NKT.to(frames_NTD.dtype) @ frames_NTD


def _half_more(num_words: LengthT) -> LengthT:
    return num_words + num_words // 2 + 1
