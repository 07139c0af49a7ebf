"""What data, model and objective exchange.

Tensor legend, used as name suffixes throughout the package:

====== =====================================================================================
``B``  student rows (packed documents)            ``S``  positions in a student row
``R``  teacher rows                               ``U``  positions in a teacher row
``N``  audio clips                                ``L``  samples in the longest clip
``K``  speech spans                               ``T``  frames or positions in the longest span
``M``  predicted text tokens of the whole batch   ``V``  vocabulary
``D``  width of a model
====== =====================================================================================

Masks are True where valid. Times are seconds, rates hertz, KL and NLL nats.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["INT16_SCALE", "DocumentInfo", "Head", "ObjectiveOutput", "Prediction", "SpeechBatch"]

INT16_SCALE = 32768
"""16-bit audio divided by this lies in [-1, 1)."""


class Head(NamedTuple):
    """The last linear map of a language model, from hidden states to vocabulary logits.

    ``logits = soft_cap * tanh(scale * (hidden @ weight.T + bias) / soft_cap)``, each part only where present.

    Attributes:
        weight: ``[V, D]``.
        bias: ``[V]`` or None.
        scale: Multiplies the logits (Cohere, Granite); 1.0 for most models.
        soft_cap: Gemma 2's final soft-cap, or None.
        vocab_size: Rows of ``weight`` that stand for real tokens; the rest is padding and never predicted.
            None means all of them.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    vocab_size: int | None = None


class Prediction(NamedTuple):
    """What a model says about M text tokens, before the vocabulary is opened.

    Attributes:
        hidden: ``[M, D]`` last hidden states at the predicting positions.
        head: The head that turns them into logits.
    """

    hidden: Tensor
    head: Head


class ObjectiveOutput(NamedTuple):
    """A summed loss, so that it can be normalised by the *global* count of predicted tokens.

    Attributes:
        sum: Scalar, fp32, nats summed over M tokens; exactly 0 with zero gradient where M is 0.
        count: Scalar tensor, M.
        parts: Detached sums over M by name, for logging: ``nll`` and, with a teacher, ``kl``.
    """

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # nobody calls tuple.count here
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class DocumentInfo:
    """What a batch remembers of one document, on the host.

    Attributes:
        key: The sample's key in its shard.
        source: Name of the source it came from.
        fields: The sample's remaining JSON fields (``domain``, ``choices``, ``speaker`` …).
        choice: Which answer option this document spells, for multiple choice; None otherwise.
    """

    key: str
    source: str
    fields: dict[str, Any] = field(default_factory=dict)
    choice: int | None = None


@dataclass
class SpeechBatch:
    """Packed rows of interleaved text and speech, and the teacher's plain-text rows of the same documents.

    Predicted token ``m`` is ``labels_M[m]``. The student predicts it from flat position ``predict_at_M[m]`` of
    ``[B * S]``, the teacher from flat position ``teacher_predict_at_M[m]`` of ``[R * U]``. Both sit right before the
    same text token (arXiv 2510.13632, section 3): for the first token after a speech span that is the last speech
    position for the student and the last transcript token of the span for the teacher.

    Attributes:
        input_ids_BS: Text token ids; 0 at speech and padding positions.
        position_ids_BS: Restart at 0 with every document.
        document_ids_BS: Which document of the batch a position belongs to (index into ``documents``); -1 for padding.
        clips_NL: Audio, zero-padded, at the encoder's sample rate; float32, or int16 where all of it is stored so:
            see ``audio_NL``.
        clip_lengths_N: Samples.
        stored_NT: ``[N', T, …]`` clips that shards hold pre-encoded (`interfaces.Stored`), zero-padded, int64, float32
            or float16; they are numbered after the ``clips_NL``. None where there are none.
        stored_lengths_N: ``[N']`` their frames.
        span_clip_K: Which clip a speech span is cut from.
        span_first_frame_K: First encoder frame of the span within its clip.
        span_num_frames_K: Encoder frames of the span.
        span_num_words_K: Words spoken in the span; 0 where that is not known.
        span_at_K: Flat position in ``[B * S]`` of the span's first embedding.
        span_num_positions_K: Positions the span fills, optional modality-switch embeddings included.
        span_token_at_K: Flat position in ``[R * U]`` of the first transcript token spoken in the span.
        span_num_tokens_K: Transcript tokens spoken in the span.
        predict_at_M: Flat student positions that predict a text token.
        labels_M: The predicted token ids.
        predict_document_M: Index into ``documents`` for each predicted token.
        teacher_input_ids_RU: Plain transcripts.
        teacher_position_ids_RU: Restart at 0 with every document.
        teacher_document_ids_RU: As ``document_ids_BS``.
        teacher_predict_at_M: Flat teacher positions.
        documents: One entry a document, on the host.
        num_positions: Positions of student rows that are not padding (a Python int: no device sync).
        audio_seconds: Seconds of speech inside the spans.
        stream_state: Where the stream stood after this batch; plain data. See ``salad_lightning.data.stream``.
        max_span_frames: Frames of the longest span; derived.
    """

    input_ids_BS: Tensor
    position_ids_BS: Tensor
    document_ids_BS: Tensor
    clips_NL: Tensor
    clip_lengths_N: Tensor
    span_clip_K: Tensor
    span_first_frame_K: Tensor
    span_num_frames_K: Tensor
    span_num_words_K: Tensor
    span_at_K: Tensor
    span_num_positions_K: Tensor
    span_token_at_K: Tensor
    span_num_tokens_K: Tensor
    predict_at_M: Tensor
    labels_M: Tensor
    predict_document_M: Tensor
    teacher_input_ids_RU: Tensor
    teacher_position_ids_RU: Tensor
    teacher_document_ids_RU: Tensor
    teacher_predict_at_M: Tensor
    documents: list[DocumentInfo] = field(default_factory=list)
    num_positions: int = 0
    audio_seconds: float = 0.0
    stream_state: dict[str, Any] = field(default_factory=dict)
    max_span_frames: int = 0
    stored_NT: Tensor | None = None
    stored_lengths_N: Tensor | None = None

    def __post_init__(self) -> None:
        """Read the longest span once, on the host, where the batch is built: later it would cost a device sync."""
        if not self.max_span_frames and self.span_num_frames_K.numel():
            self.max_span_frames = int(self.span_num_frames_K.max())

    @property
    def num_predicted(self) -> int:
        """M, read from a shape, so without a device sync."""
        return self.labels_M.shape[0]

    @property
    def audio_NL(self) -> Tensor:
        """The clips as float32 in [-1, 1], for an encoder."""
        return self.clips_NL if self.clips_NL.is_floating_point() else self.clips_NL.float() / INT16_SCALE

    @property
    def padding_share(self) -> float:
        """Share of student positions that are padding, 0 to 1."""
        return 1.0 - self.num_positions / max(self.input_ids_BS.numel(), 1)

    def to(self, device: torch.device | str) -> SpeechBatch:
        """A copy with every tensor on ``device``; Lightning calls this.

        A GPU is not waited for: each of the twenty copies would wait for all that it was asked before.
        """
        on_gpu = torch.device(device).type == "cuda"
        return self._map(lambda tensor: tensor.to(device, non_blocking=on_gpu))

    def pin_memory(self) -> SpeechBatch:
        """A copy in page-locked memory; torch's DataLoader calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Any) -> SpeechBatch:
        tensors = {
            entry.name: change(value)
            for entry in dataclasses.fields(self)
            if isinstance(value := getattr(self, entry.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)
