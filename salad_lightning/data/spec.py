"""The one small value that the model hands to the data: all that sequence building must know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerFast

from salad_lightning.interfaces import Connector, Encoder

__all__ = ["SequenceSpec"]


@dataclass(frozen=True)
class SequenceSpec:
    """How long things are and how they are tokenised, known before any model runs.

    Attributes:
        tokenizer: The LLM's fast tokenizer (offsets are needed to cut at word boundaries).
        context: Positions in a row.
        sample_rate_hz: What the encoder takes; other audio is resampled.
        causal: Whether spans may be cut out of a whole encoded utterance (`Encoder.causal`).
        num_frames: Samples of a clip to encoder frames (`Encoder.output_lengths`).
        frame_span: ``(start_s, end_s)`` to frames ``[first, last)`` of a whole utterance (`Encoder.frame_span`).
        num_positions: ``(frames, words)`` of a span to the positions it fills, switch embeddings included.
        encoder: `Encoder.identity`, to compare with what encoded the shards.
    """

    tokenizer: PreTrainedTokenizerFast
    context: int
    sample_rate_hz: int
    causal: bool
    num_frames: Callable[[int], int]
    frame_span: Callable[[float, float], tuple[int, int]]
    num_positions: Callable[[int, int], int]
    encoder: str = ""

    @classmethod
    def of_parts(
        cls,
        tokenizer: PreTrainedTokenizerFast,
        context: int,
        *,
        encoder: Encoder,
        connector: Connector,
        switch_embeddings: bool,
        identity: str,
    ) -> SequenceSpec:
        """For a speech LLM.

        Args:
            tokenizer: Of the LLM.
            context: Positions in a row.
            encoder: Asked for its rate and its arithmetic.
            connector: Asked for its arithmetic.
            switch_embeddings: Whether a span has one position more on either side.
            identity: `Encoder.identity`, taken before anything cast the encoder.
        """
        return cls(
            tokenizer=tokenizer,
            context=context,
            sample_rate_hz=encoder.sample_rate_hz,
            causal=encoder.causal,
            num_frames=encoder.output_lengths,
            frame_span=encoder.frame_span,
            num_positions=partial(_positions, connector, 2 if switch_embeddings else 0),
            encoder=identity,
        )

    @classmethod
    def text_only(cls, tokenizer: PreTrainedTokenizerFast, context: int) -> SequenceSpec:
        """For a model that takes no audio: sources with audio are read as their transcripts."""
        return cls(
            tokenizer=tokenizer,
            context=context,
            sample_rate_hz=0,
            causal=True,
            num_frames=_no_frames,
            frame_span=_no_span,
            num_positions=_no_positions,
        )


def _positions(connector: Connector, extra: int, frames: int, words: int) -> int:
    return connector.output_lengths(frames, num_words=words) + extra


def _no_frames(num_samples: int) -> int:
    return 0


def _no_span(start_s: float, end_s: float) -> tuple[int, int]:
    return 0, 0


def _no_positions(frames: int, words: int) -> int:
    return 0
