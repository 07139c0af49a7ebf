"""Prompts out of a packed batch, tokens drawn after them, and the batch that both make."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from salad_lightning.batch import DocumentInfo, SpeechBatch
from salad_lightning.model.generation import pad_left
from salad_lightning.model.speech_llm import SpeechLLM

__all__ = ["Prompts", "sample"]

# A row that holds nothing, so that every rank has as many: one token, which carries no loss.
_DUMMY = DocumentInfo(key="", source="none")


class _Cut(NamedTuple):
    """A document up to where the student goes on, as flat positions ``[start, stop)``."""

    document: int
    student: tuple[int, int]
    teacher: tuple[int, int]
    spans: list[int]


@dataclass(frozen=True)
class Prompts:
    """P rows of one prompt each, for student and teacher, with room for the tokens to come.

    Attributes:
        batch: Document p in row p; nothing is predicted yet.
        student_length_P: Positions of the prompt in the student's row.
        teacher_length_P: Tokens of the prompt in the teacher's row.
        real_P: False for dummies.
    """

    batch: SpeechBatch
    student_length_P: Tensor
    teacher_length_P: Tensor
    real_P: Tensor

    @classmethod
    def of(cls, batch: SpeechBatch, rows: int, num_tokens: int, context: int) -> Prompts:
        """Cut the first documents of a batch that have speech and fit.

        Args:
            batch: Packed rows.
            rows: P.
            num_tokens: Positions to leave free behind each prompt.
            context: Most positions of a row.
        """
        cuts = [
            cut
            for cut in _cuts(batch)
            if max(stop - start for start, stop in (cut.student, cut.teacher)) + num_tokens <= context
        ][:rows]
        lengths = [[stop - start for start, stop in (cut.student, cut.teacher)] for cut in cuts]
        lengths += [[1, 1]] * (rows - len(cuts))
        device = batch.input_ids_BS.device
        student_P, teacher_P = torch.tensor(lengths, device=device).T
        widths = [max(side) + num_tokens for side in zip(*lengths, strict=True)]
        empty = batch.labels_M[:0]
        student = _rows(batch.input_ids_BS, [cut.student for cut in cuts], student_P, widths[0])
        teacher = _rows(batch.teacher_input_ids_RU, [cut.teacher for cut in cuts], teacher_P, widths[1])
        infos = [batch.documents[cut.document] for cut in cuts]
        changes = _spans(batch, cuts, widths)
        changes |= zip(("input_ids_BS", "position_ids_BS", "document_ids_BS"), student, strict=True)
        names = ("teacher_input_ids_RU", "teacher_position_ids_RU", "teacher_document_ids_RU")
        changes |= zip(names, teacher, strict=True)
        changes |= dict.fromkeys(("predict_at_M", "labels_M", "predict_document_M", "teacher_predict_at_M"), empty)
        prompts = dataclasses.replace(batch, **changes, documents=infos + [_DUMMY] * (rows - len(cuts)))
        return cls(prompts, student_P, teacher_P, torch.arange(rows, device=device) < len(cuts))

    def continued(self, tokens_PN: Tensor, eos: int | None) -> SpeechBatch:
        """The batch in which the drawn tokens are read and predicted, up to the first end-of-sequence token.

        Args:
            tokens_PN: Of each prompt.
            eos: The end-of-sequence token, where there is one.
        """
        ended_PN = tokens_PN == (-1 if eos is None else eos)
        counts_PN = (ended_PN.cumsum(1) - ended_PN.long() == 0) & self.real_P[:, None]
        rows_P1 = torch.arange(tokens_PN.shape[0], device=tokens_PN.device)[:, None]
        changes: dict[str, Any] = {
            "labels_M": tokens_PN[counts_PN],
            "predict_document_M": rows_P1.expand_as(tokens_PN)[counts_PN],
            "num_positions": int(self.student_length_P.sum()) + tokens_PN.numel(),
        }
        for prefix, shape, length_P in (
            ("", "BS", self.student_length_P),
            ("teacher_", "RU", self.teacher_length_P),
        ):
            ids = getattr(self.batch, f"{prefix}input_ids_{shape}").clone()
            at_PN = length_P[:, None] + torch.arange(tokens_PN.shape[1], device=ids.device)
            ids.scatter_(1, at_PN, tokens_PN)
            read = torch.arange(ids.shape[1], device=ids.device) < length_P[:, None] + tokens_PN.shape[1]
            changes[f"{prefix}input_ids_{shape}"] = ids
            changes[f"{prefix}position_ids_{shape}"] = torch.where(read, _every(ids), 0)
            changes[f"{prefix}document_ids_{shape}"] = torch.where(read, rows_P1, -1)
            changes[f"{prefix}predict_at_M"] = (rows_P1 * ids.shape[1] + at_PN - 1)[counts_PN]
        return dataclasses.replace(self.batch, **changes)


def sample(model: SpeechLLM, prompts: SpeechBatch, num_tokens: int, temperature: float) -> Tensor:
    """Draw exactly ``num_tokens`` tokens after every row, with a cache: as many forward passes on every rank.

    Args:
        model: The student.
        prompts: One prompt a row.
        num_tokens: N.
        temperature: Above 0.

    Returns:
        ``[P, N]``.
    """
    spliced, hf = model.splice(prompts), model.llm.hf
    inputs, mask = pad_left(spliced.embeddings_BSD, spliced.document_ids_BS >= 0)
    cache, tokens = DynamicCache(), []
    for _ in range(num_tokens):
        output: Any = hf(
            inputs_embeds=inputs,
            attention_mask=mask.long(),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **model.llm.attention_options,
        )
        # Rows of the head beyond the tokenizer are padding.
        logits_PV = output.logits[:, -1, : model.llm.vocab_size].float()
        tokens.append(torch.multinomial((logits_PV / temperature).softmax(-1), 1))
        inputs = model.llm.embed(tokens[-1]).to(inputs.dtype)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
    return torch.cat(tokens, 1)


def _cuts(batch: SpeechBatch) -> list[_Cut]:
    """Every document with speech, up to the first token that is predicted after its last span, or to its end."""
    student, teacher = _extents(batch.document_ids_BS), _extents(batch.teacher_document_ids_RU)
    owners = batch.document_ids_BS.flatten()[batch.span_at_K].tolist()
    ends = (batch.span_at_K + batch.span_num_positions_K).tolist()
    spans: dict[int, list[int]] = {}
    for span, owner in enumerate(owners):
        spans.setdefault(owner, []).append(span)
    first: dict[int, tuple[int, int]] = {}
    predicted = (batch.predict_document_M, batch.predict_at_M, batch.teacher_predict_at_M)
    for owner, at, teacher_at in zip(*(column.tolist() for column in predicted), strict=True):
        if owner in spans and at + 1 >= ends[spans[owner][-1]]:
            first.setdefault(owner, (at + 1, teacher_at + 1))
    cuts = []
    for owner, members in sorted(spans.items()):
        stop, teacher_stop = first.get(owner, (student[owner][1], teacher[owner][1]))
        cuts.append(_Cut(owner, (student[owner][0], stop), (teacher[owner][0], teacher_stop), members))
    return cuts


def _extents(owners: Tensor) -> dict[int, tuple[int, int]]:
    """Flat ``[start, stop)`` of every document; its positions are neighbours in one row."""
    owner, counts = torch.unique_consecutive(owners, return_counts=True)
    stops = counts.cumsum(0).tolist()
    rows = zip(owner.tolist(), counts.tolist(), stops, strict=True)
    return {number: (stop - count, stop) for number, count, stop in rows if number >= 0}


def _rows(ids: Tensor, extents: list[tuple[int, int]], length_P: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and documents ``[P, width]`` of stretches of packed rows, one a row."""
    flat, rows = ids.flatten(), ids.new_zeros(len(length_P), width)
    for row, (start, stop) in enumerate(extents):
        rows[row, : stop - start] = flat[start:stop]
    read = torch.arange(width, device=ids.device) < length_P[:, None]
    numbers = torch.arange(len(length_P), device=ids.device)[:, None]
    return rows, torch.where(read, _every(rows), 0), torch.where(read, numbers, -1)


def _every(rows: Tensor) -> Tensor:
    return torch.arange(rows.shape[1], device=rows.device).expand_as(rows)


def _spans(batch: SpeechBatch, cuts: list[_Cut], widths: list[int]) -> dict[str, Any]:
    """The chosen documents' spans at their new places, and the clips that they are cut from."""
    device = batch.span_at_K.device
    kept = torch.tensor([span for cut in cuts for span in cut.spans], dtype=torch.long, device=device)
    moved = [
        [row * width - start for row, (cut, start) in enumerate(zip(cuts, starts, strict=True)) for _ in cut.spans]
        for width, starts in zip(
            widths, ([cut.student[0] for cut in cuts], [cut.teacher[0] for cut in cuts]), strict=True
        )
    ]
    shift_K, teacher_shift_K = torch.tensor(moved, dtype=torch.long, device=device)
    used, clip_K = torch.unique(batch.span_clip_K[kept], return_inverse=True)
    num_clips = batch.clips_NL.shape[0]
    fresh, stored = used[used < num_clips], used[used >= num_clips] - num_clips
    lengths = batch.stored_lengths_N
    share = float(batch.span_num_frames_K[kept].sum() / batch.span_num_frames_K.sum().clamp(min=1))
    plain = ("first_frame", "num_frames", "num_words", "num_positions", "num_tokens")
    return {
        **{f"span_{name}_K": getattr(batch, f"span_{name}_K")[kept] for name in plain},
        "span_at_K": batch.span_at_K[kept] + shift_K,
        "span_token_at_K": batch.span_token_at_K[kept] + teacher_shift_K,
        "span_clip_K": clip_K,
        "audio_seconds": share * batch.audio_seconds,
        "clips_NL": batch.clips_NL[fresh],
        "clip_lengths_N": batch.clip_lengths_N[fresh],
        "stored_NT": batch.stored_NT[stored] if batch.stored_NT is not None and len(stored) else None,
        "stored_lengths_N": lengths[stored] if lengths is not None and len(stored) else None,
    }
