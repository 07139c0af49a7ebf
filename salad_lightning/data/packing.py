"""Whole documents into rows of a fixed number of positions, and rows into batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from salad_lightning.batch import SpeechBatch
from salad_lightning.data.audio import Clip, as_float, decoded
from salad_lightning.data.segments import Document

__all__ = ["PackedRows", "collate", "pack", "pad"]


class _HasPositions(Protocol):
    @property
    def num_positions(self) -> int: ...


ItemT = TypeVar("ItemT", bound=_HasPositions)


@dataclass(frozen=True)
class PackedRows(Generic[ItemT]):
    """One batch of rows, and what had been read but not placed when it was full.

    Attributes:
        rows: Documents of each row, together at most ``context`` positions.
        pending: Documents waiting, oldest first.
    """

    rows: list[list[ItemT]]
    pending: list[ItemT]


def pack(
    documents: Iterable[ItemT], context: int, rows_per_batch: int, *, lookahead: int = 32
) -> Iterator[PackedRows[ItemT]]:
    """Fill rows with whole documents: the oldest waiting one first, then always the longest that still fits.

    Deterministic; every document is placed once, and none waits for ever since each row begins with the oldest.

    Args:
        documents: Documents, or anything with ``num_positions``; may be infinite.
        context: Positions in a row.
        rows_per_batch: Rows in a batch; the last batch of a finite stream may have fewer.
        lookahead: Documents to choose from.

    Raises:
        ValueError: If a document is longer than ``context``, or an argument is below 1.
    """
    if min(context, rows_per_batch, lookahead) < 1:
        raise ValueError("context, rows_per_batch and lookahead must be at least 1")
    stream = iter(documents)
    pending: list[ItemT] = []
    rows: list[list[ItemT]] = []

    def refill() -> None:
        pending.extend(itertools.islice(stream, lookahead - len(pending)))

    while True:
        refill()
        if not pending:
            break
        row, room = [], context
        if pending[0].num_positions > context:
            raise ValueError(f"a document of {pending[0].num_positions} positions does not fit {context}")
        best = 0
        while best >= 0:
            item = pending.pop(best)
            row.append(item)
            room -= item.num_positions
            refill()
            best = _longest_that_fits(pending, room)
        rows.append(row)
        if len(rows) == rows_per_batch:
            yield PackedRows(rows, list(pending))
            rows = []
    if rows:
        yield PackedRows(rows, [])


def _longest_that_fits(pending: Sequence[_HasPositions], room: int) -> int:
    """Index of the longest document of at most ``room`` positions, the oldest of equals; -1 where none fits."""
    best, longest = -1, 0
    for index, item in enumerate(pending):
        if longest < item.num_positions <= room:
            best, longest = index, item.num_positions
    return best


def collate(
    rows: Sequence[Sequence[Document]],
    *,
    context: int,
    rows_per_batch: int,
    trim: bool = False,
    stream_state: dict[str, Any] | None = None,
) -> SpeechBatch:
    """Lay packed documents out as tensors.

    Args:
        rows: Documents of each student row; fewer rows than ``rows_per_batch``, or none, leave the rest padding.
        context: Width S of a student row, and the most positions of a teacher row.
        rows_per_batch: B.
        trim: Cut rows after the longest one.
        stream_state: Where the stream stands after this batch.

    Raises:
        ValueError: If rows do not fit ``rows_per_batch`` and ``context``, or a document carries loss inside a span.
    """
    lengths = [sum(document.num_positions for document in row) for row in rows]
    if len(rows) > rows_per_batch or max(lengths, default=0) > context:
        raise ValueError(f"{len(rows)} rows of {lengths} positions do not fit {rows_per_batch} × {context}")
    width = max(max(lengths, default=0), 1) if trim else context
    layout = _Layout(rows_per_batch, width, context, trim)
    for number, row in enumerate(rows):
        offset = number * width
        for document in row:
            layout.add(document, offset)
            offset += document.num_positions
    return layout.finish(sum(lengths), stream_state or {})


class _Layout:
    """A batch under construction, in numpy."""

    def __init__(self, rows: int, width: int, teacher_width: int, trim: bool) -> None:
        self.shape, self.teacher_width, self.trim = (rows, width), teacher_width, trim
        self.ids = np.zeros(rows * width, dtype=np.int64)
        self.positions = np.zeros(rows * width, dtype=np.int64)
        self.owners = np.full(rows * width, -1, dtype=np.int64)
        self.documents: list[Document] = []
        self.clips: dict[bool, list[NDArray[Any]]] = {False: [], True: []}  # by whether they are pre-encoded
        self.clip_numbers: dict[int, int] = {}  # by identity: the options of one question share their clip
        self.spans: list[tuple[int, ...]] = []
        self.seconds = 0.0
        self.predict_at: list[NDArray[np.int64]] = []

    def add(self, document: Document, offset: int) -> None:
        """Put a document at a flat student position."""
        end = offset + document.num_positions
        number = len(self.documents)
        self.documents.append(document)
        self.positions[offset:end] = np.arange(document.num_positions)
        self.owners[offset:end] = number
        read = document.token_at >= 0
        self.ids[offset + document.token_at[read]] = document.token_ids[read]
        at = document.token_at[document.predicted]
        if (at < 1).any():
            raise ValueError(f"{document.info.key}: loss on a spoken token, or on the first of a document")
        self.predict_at.append(offset + at - 1)
        for span, span_at in zip(document.spans, document.span_at, strict=True):
            clip = self._clip_number(document.clips[span.clip], document.encoded)
            frames = (span.first_frame, span.num_frames, span.num_words)
            self.spans.append(
                (document.encoded, clip, *frames, offset + span_at, span.num_positions, span.stop - span.start)
            )
            self.seconds += span.seconds

    def _clip_number(self, clip: Clip, encoded: bool) -> int:
        if id(clip) not in self.clip_numbers:
            self.clip_numbers[id(clip)] = len(self.clips[encoded])
            self.clips[encoded].append(decoded(clip))
        return self.clip_numbers[id(clip)]

    def finish(self, num_positions: int, stream_state: dict[str, Any]) -> SpeechBatch:
        """All of it as tensors."""
        teacher = _teacher_rows(self.documents, self.teacher_width, self.trim)
        encoded, *spans = torch.tensor(self.spans, dtype=torch.int64).reshape(-1, 8).T.contiguous()
        counts = [int(document.predicted.sum()) for document in self.documents]
        fresh = self.clips[False]
        if len({clip.dtype for clip in fresh}) > 1:
            fresh = [as_float(clip) for clip in fresh]
        clips, clip_lengths = pad(fresh, np.zeros((0, 0), dtype=np.float32))
        stored, stored_lengths = pad(self.clips[True]) if self.clips[True] else (None, None)
        return SpeechBatch(
            input_ids_BS=torch.from_numpy(self.ids).view(self.shape),
            position_ids_BS=torch.from_numpy(self.positions).view(self.shape),
            document_ids_BS=torch.from_numpy(self.owners).view(self.shape),
            clips_NL=clips,
            clip_lengths_N=clip_lengths,
            stored_NT=stored,
            stored_lengths_N=stored_lengths,
            span_clip_K=spans[0] + encoded * len(self.clips[False]),
            span_first_frame_K=spans[1].clone(),
            span_num_frames_K=spans[2].clone(),
            span_num_words_K=spans[3].clone(),
            span_at_K=spans[4].clone(),
            span_num_positions_K=spans[5].clone(),
            span_token_at_K=teacher[4],
            span_num_tokens_K=spans[6].clone(),
            predict_at_M=_join(self.predict_at),
            labels_M=_join([document.token_ids[document.predicted] for document in self.documents]),
            predict_document_M=torch.from_numpy(np.repeat(np.arange(len(counts), dtype=np.int64), counts)),
            teacher_input_ids_RU=teacher[0],
            teacher_position_ids_RU=teacher[1],
            teacher_document_ids_RU=teacher[2],
            teacher_predict_at_M=teacher[3],
            documents=[document.info for document in self.documents],
            num_positions=num_positions,
            audio_seconds=self.seconds,
            stream_state=stream_state,
        )


def _join(parts: list[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64))


def pad(clips: list[NDArray[Any]], none: NDArray[Any] | None = None) -> tuple[Tensor, Tensor]:
    """``[L, …]`` arrays to ``[N, L, …]`` and their lengths ``[N]``; ``none`` where there is no array."""
    lengths = [len(clip) for clip in clips]
    if clips or none is None:
        dtype = np.result_type(*{clip.dtype for clip in clips})
        padded = np.zeros((len(clips), max(lengths), *clips[0].shape[1:]), dtype=dtype)
        for row, clip in zip(padded, clips, strict=True):
            row[: len(clip)] = clip
        none = padded
    return torch.from_numpy(none), torch.tensor(lengths, dtype=torch.int64)


def _teacher_rows(documents: list[Document], context: int, trim: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Plain transcripts in rows of their own: first fit, longest first; as many rows as needed.

    Their width is that of ``context``, for which a compiled model is compiled once, or with ``trim`` as narrow as goes.

    Returns:
        Ids, positions and documents ``[R, U]``, the predicting positions ``[M]`` in the order of ``documents``, and the
        positions ``[K]`` of the first token of every span.
    """
    used: list[int] = []
    places = [(0, 0)] * len(documents)
    for number in sorted(range(len(documents)), key=lambda index: -documents[index].num_tokens):
        length = documents[number].num_tokens
        row = next((row for row, taken in enumerate(used) if taken + length <= context), len(used))
        if row == len(used):
            used.append(0)
        places[number] = row, used[row]
        used[row] += length
    shape = max(len(used), 1), max(max(used, default=0), 1) if trim else context  # a model takes no empty row
    ids, positions, owners = np.zeros((3, *shape), dtype=np.int64)
    owners -= 1
    predict_at, span_at = [], []
    for number, (document, (row, start)) in enumerate(zip(documents, places, strict=True)):
        stop = start + document.num_tokens
        ids[row, start:stop] = document.token_ids
        positions[row, start:stop] = np.arange(document.num_tokens)
        owners[row, start:stop] = number
        flat = row * shape[1] + start
        predict_at.append(flat + np.flatnonzero(document.predicted) - 1)
        span_at.append(flat + np.array([span.start for span in document.spans], dtype=np.int64))
    laid_out = (torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(owners))
    return *laid_out, _join(predict_at), _join(span_at)
