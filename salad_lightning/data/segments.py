"""A document: the tokens of a transcript, and which stretches of them the student hears instead of reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from salad_lightning.batch import DocumentInfo
from salad_lightning.data.audio import Clip

__all__ = ["Document", "SpeechSpan"]


@dataclass(frozen=True)
class SpeechSpan:
    """A stretch of the transcript that the student hears.

    Attributes:
        start: First token of the transcript that is spoken.
        stop: One past the last.
        clip: Index into the document's clips.
        first_frame: First encoder frame of the span within its clip.
        num_frames: Encoder frames, at least 1.
        num_words: Words spoken.
        num_positions: Positions the span fills in the student's row.
        seconds: Duration.
    """

    start: int
    stop: int
    clip: int
    first_frame: int
    num_frames: int
    num_words: int
    num_positions: int
    seconds: float


@dataclass(frozen=True)
class Document:
    """A transcript tokenised once, shared by student (interleaved) and teacher (plain).

    Attributes:
        token_ids: ``[T]`` int64, special tokens included.
        predicted: ``[T]`` bool: tokens that carry loss; never inside a span, and never the very first element.
        spans: Speech spans in order, not overlapping; all other tokens are read as text.
        clips: ``[L]`` float32 or int16 audio each, at the encoder's sample rate, decoded or not yet; or ``[T, …]`` what
            the encoder stored of it.
        info: Where the document comes from.
        encoded: Whether clips are what the encoder stored.
    """

    token_ids: NDArray[np.int64]
    predicted: NDArray[np.bool_]
    info: DocumentInfo
    spans: list[SpeechSpan] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    encoded: bool = False

    @cached_property
    def num_positions(self) -> int:
        """Positions in the student's row."""
        return len(self.token_ids) + sum(span.num_positions - (span.stop - span.start) for span in self.spans)

    @property
    def num_tokens(self) -> int:
        """Positions in the teacher's row."""
        return len(self.token_ids)

    @cached_property
    def token_at(self) -> NDArray[np.int64]:
        """``[T]`` student position of every token that is read as text; -1 inside spans."""
        width = np.ones(len(self.token_ids), dtype=np.int64)
        for span in self.spans:
            width[span.start : span.stop] = 0
            width[span.start] = span.num_positions
        at = np.cumsum(width) - width
        for span in self.spans:
            at[span.start : span.stop] = -1
        return at

    @cached_property
    def span_at(self) -> list[int]:
        """Student position of every span's first embedding."""
        at, shift = [], 0
        for span in self.spans:
            at.append(span.start + shift)
            shift += span.num_positions - (span.stop - span.start)
        return at
