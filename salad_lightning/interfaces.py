"""The four kinds of parts a speech LLM is made of, and the factories that build them.

A part is a class; installing a package that names it under an entry-point group is its registration
(``salad_lightning.encoders``, ``.connectors``, ``.objectives``, ``.synthesizers``). Shapes use the legend of
`salad_lightning.batch`. Each kind has a contract test class in `salad_lightning.testing.contracts`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from salad_lightning.batch import ObjectiveOutput, Prediction

__all__ = [
    "Connector",
    "ConnectorFactory",
    "ConnectorOutput",
    "Encoder",
    "EncoderOutput",
    "LengthT",
    "Objective",
    "Speech",
    "Stored",
    "Synthesizer",
    "TimedWord",
]

LengthT = TypeVar("LengthT", int, Tensor)
"""A length as a Python int (data pipeline) or an integer tensor ``[N]`` (model): the same arithmetic serves both."""


class Stored(NamedTuple):
    """What the heavy, frozen half of an encoder makes of audio; this is what a shard may hold instead of audio.

    Attributes:
        data: ``[N, T, …]``: codes (integers) or frames (floats), zero beyond each length.
        lengths: ``[N]`` valid frames.
    """

    data: Tensor
    lengths: Tensor


class EncoderOutput(NamedTuple):
    """Frames of every layer that is offered.

    Attributes:
        frames: ``[N, T, K, D]``, K layers of width D, zero beyond each length.
        lengths: ``[N]`` valid frames.
    """

    frames: Tensor
    lengths: Tensor


class Encoder(nn.Module, ABC):
    """A frozen speech encoder: audio to frames.

    Must hold: padding a clip changes none of its valid frames; ``output_lengths`` is exact; always frozen and in eval
    mode; if ``causal``, frame ``t`` depends on no sample at or after ``(t + 1) * sample_rate_hz / frame_rate_hz``.

    Attributes:
        sample_rate_hz: Rate of the audio it takes.
        frame_rate_hz: Frames a second it gives.
        output_dim: Width D of a frame.
        num_layers: K, layers offered; their mix is trained by the model, not here.
        causal: Whether frames can be cut out of a whole encoded utterance without hearing what follows. Where False,
            every span is encoded alone.
    """

    sample_rate_hz: int
    frame_rate_hz: float
    output_dim: int
    num_layers: int = 1
    causal: bool

    @abstractmethod
    def output_lengths(self, num_samples: LengthT) -> LengthT:
        """Valid frames for clips of ``num_samples``; pure arithmetic, at least 1 for any clip of 1 sample or more."""

    @abstractmethod
    def encode(self, audio_NL: Tensor, lengths_N: Tensor) -> Stored:
        """Run the heavy, frozen part, without reading a value back from the device.

        Args:
            audio_NL: float audio in [-1, 1] at ``sample_rate_hz``, zero-padded, in training to the longest clip.
            lengths_N: Samples. On the host only ``audio_NL.shape[1]`` is known.
        """

    @abstractmethod
    def embed(self, stored: Stored) -> EncoderOutput:
        """The cheap part: what ``encode`` stored to frames. Identity but for a new axis in most encoders."""

    def forward(self, audio_NL: Tensor, lengths_N: Tensor) -> EncoderOutput:
        """``embed(encode(audio))``."""
        return self.embed(self.encode(audio_NL, lengths_N))

    def frame_span(self, start_s: float, end_s: float) -> tuple[int, int]:
        """Frames ``[first, last)`` of a whole utterance that belong to a span and hear nothing at or after ``end_s``.

        Meaningful for causal encoders only. ``last > first`` only where the span holds at least one whole frame.
        """
        # A span edge is a word time rounded to milliseconds: forgive a thousandth of a frame.
        last = int(end_s * self.frame_rate_hz + 1e-3)
        return min(int(start_s * self.frame_rate_hz + 1e-3), last), last

    def identity(self) -> str:
        """A name for exactly this encoder with these weights, which pre-encoded shards carry."""
        digest = hashlib.sha256(repr(sorted(self.settings().items())).encode())
        for name, tensor in sorted(self.state_dict().items()):
            kind = f" {tensor.dtype}" if tensor.is_floating_point() and tensor.dtype != torch.float32 else ""
            digest.update(f"{name} {tuple(tensor.shape)}{kind}".encode())
            if not tensor.is_meta:
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return f"{type(self).__name__}-{digest.hexdigest()[:16]}"

    def settings(self) -> dict[str, object]:
        """What decides, beside the weights, what `encode` stores; part of `identity`."""
        names = ("sample_rate_hz", "frame_rate_hz", "output_dim", "num_layers")
        return {name: getattr(self, name) for name in names}

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode whatever is asked: the encoder is frozen (dropout off, batch statistics fixed)."""
        super().train(False)
        return self


class ConnectorOutput(NamedTuple):
    """Speech as the LLM reads it.

    Attributes:
        embeddings: ``[N, T', llm_dim]``.
        lengths: ``[N]`` valid positions, equal to ``output_lengths`` where the connector is ``exact``.
        losses: Extra summed losses by name (CIF's quantity loss); empty for most.
    """

    embeddings: Tensor
    lengths: Tensor
    losses: dict[str, Tensor]


class Connector(nn.Module, ABC):
    """The trained bridge from encoder frames to LLM embeddings, applied to each speech span by itself.

    Subclasses take ``encoder_dim`` and ``llm_dim`` as keyword-only arguments, beside their own, all annotated.
    Must hold: every parameter gets a finite gradient; works in bf16; padding changes no valid output.

    Attributes:
        exact: Whether ``output_lengths`` is exact; otherwise it is an upper bound: the positions that a span does not
            fill are left out, and those after them move up.
    """

    exact: bool = True

    @abstractmethod
    def output_lengths(self, lengths: LengthT, *, num_words: LengthT | None = None) -> LengthT:
        """Positions for spans of ``lengths`` frames (at least 1); pure arithmetic, at least 1.

        Args:
            lengths: Frames.
            num_words: Words spoken; 0 or None where that is not known.
        """

    @abstractmethod
    def forward(self, frames_NTD: Tensor, lengths_N: Tensor, *, num_words_N: Tensor | None = None) -> ConnectorOutput:
        """Map spans to embeddings.

        Args:
            frames_NTD: ``[N, T, encoder_dim]``, N spans.
            lengths_N: Valid frames, at least 1 each.
            num_words_N: Words spoken in each span, for connectors that use them; 0 where that is not known.
        """


class ConnectorFactory(Protocol):
    """Builds a connector once the widths on both sides are known; a connector class is one."""

    def __call__(self, *, encoder_dim: int, llm_dim: int) -> Connector:
        """Build it."""
        ...


class Objective(nn.Module, ABC):
    """What is minimised at the predicted text tokens.

    Must hold: equals a slow float64 reference; two halves of a batch add up to the whole; M = 0 gives 0, not NaN.

    Attributes:
        needs_teacher: Whether ``forward`` must be given the teacher's prediction.
    """

    needs_teacher: bool

    @abstractmethod
    def forward(self, student: Prediction, teacher: Prediction | None, labels_M: Tensor) -> ObjectiveOutput:
        """Summed loss over M tokens.

        Args:
            student: The trained model's prediction.
            teacher: The text-only teacher's prediction of the same tokens, without gradient; None where there is none.
            labels_M: The tokens themselves.

        Raises:
            ValueError: If student, teacher and labels disagree in M.
        """


class TimedWord(NamedTuple):
    """A word and when it is spoken, in seconds from the start of the audio."""

    word: str
    start_s: float
    end_s: float


class Speech(NamedTuple):
    """Synthesised speech.

    Attributes:
        audio: ``[L]`` float32 in [-1, 1].
        words: Units in reading order. Joined by spaces they spell the text, so a synthesiser that fuses words in
            speech ("in the") reports them as one unit.
    """

    audio: NDArray[np.float32]
    words: list[TimedWord]


class Synthesizer(ABC):
    """Text to speech with word times.

    Must hold: deterministic for a seed; times are monotone and inside the audio.

    Attributes:
        sample_rate_hz: Rate of the audio it gives.
    """

    sample_rate_hz: int

    @abstractmethod
    def speak(self, text: str, *, seed: int = 0) -> Speech:
        """Say ``text``.

        Raises:
            UserError: If the text cannot be spoken (empty, or the engine fails).
        """
