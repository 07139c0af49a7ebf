"""The speech LLM: frozen encoder → trained connector → embeddings between text embeddings → LLM → next text token."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from salad_lightning.batch import ObjectiveOutput, Prediction, SpeechBatch
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Connector, ConnectorOutput, Encoder, Objective, Stored
from salad_lightning.model.llm import LanguageModel

__all__ = ["SpeechLLM", "Spliced", "freeze", "predict_transcripts"]

ResultT = TypeVar("ResultT")


class Spliced(NamedTuple):
    """Packed rows with speech in them, as the language model reads them.

    Attributes:
        embeddings_BSD: Text embeddings, with those of speech in their places.
        position_ids_BS: The batch's; renumbered where a connector left positions unused.
        document_ids_BS: The batch's; -1 also where a connector left positions unused.
        losses: The connector's own.
    """

    embeddings_BSD: Tensor
    position_ids_BS: Tensor
    document_ids_BS: Tensor
    losses: dict[str, Tensor]


class SpeechLLM(nn.Module):
    """SALAD's model P (arXiv 2510.13632, section 3): knows nothing of training, data or devices.

    Args:
        llm: The language model that reads text and speech.
        encoder: Frozen speech encoder.
        connector: Maps encoder frames to LLM embeddings, span by span.
        switch_embeddings: Learn one embedding before and one after every speech span. They are parameters of their
            own, never vocabulary rows, and carry no loss.

    Attributes:
        layer_mix: ``[K]`` logits of the mix over the encoder's layers, where it offers more than one
            (the weighted sum of SUPERB, arXiv 2105.01051).
    """

    def __init__(
        self, *, llm: LanguageModel, encoder: Encoder, connector: Connector, switch_embeddings: bool = False
    ) -> None:
        super().__init__()
        self.llm = llm
        self.encoder = encoder.requires_grad_(False)
        self.connector = connector
        self.layer_mix = nn.Parameter(torch.zeros(encoder.num_layers)) if encoder.num_layers > 1 else None
        self.switch = nn.Parameter(torch.randn(2, llm.dim) * 0.02) if switch_embeddings else None
        self._checked = False  # whether the connector keeps to what it announced

    def forward(self, batch: SpeechBatch, objective: Objective, teacher: Prediction | None) -> ObjectiveOutput:
        """Summed loss of a batch. The objective runs in here because the head may be sharded outside.

        Args:
            batch: Packed rows.
            objective: What to minimise.
            teacher: The teacher's prediction of the same tokens, or None.
        """
        student, losses = self._predict(batch)
        output = objective(student, teacher, batch.labels_M)
        assert isinstance(output, ObjectiveOutput)
        parts = output.parts | {name: loss.detach() for name, loss in losses.items()}
        return ObjectiveOutput(sum(losses.values(), output.sum), output.count, parts)

    def predict(self, batch: SpeechBatch) -> Prediction:
        """P(· | c): the M text tokens predicted from interleaved text and speech."""
        return self._predict(batch)[0]

    def _predict(self, batch: SpeechBatch) -> tuple[Prediction, dict[str, Tensor]]:
        embeddings_BSD, position_ids_BS, document_ids_BS, losses = self.splice(batch)
        prediction = self.llm(position_ids_BS, document_ids_BS, batch.predict_at_M, embeddings_BSD=embeddings_BSD)
        assert isinstance(prediction, Prediction)
        return prediction, losses

    def predict_text(self, batch: SpeechBatch) -> Prediction:
        """P(· | w): the same M tokens predicted by this model from the plain transcripts."""
        return predict_transcripts(self.llm, batch)

    def check_llm(self) -> None:
        """See `LanguageModel.check_against_hugging_face`; under sharding, only a root's method may read weights."""
        self.llm.check_against_hugging_face()

    def run(self, function: Callable[..., ResultT], *args: Any) -> ResultT:
        """``function(self, *args)`` with whole weights: under sharding, only in here does any other code find them."""
        return function(self, *args)

    def embed(self, batch: SpeechBatch) -> Tensor:
        """Embeddings ``[B, S, D]`` of packed rows: text, with the speech spans in their places."""
        return self.splice(batch).embeddings_BSD

    def embed_speech(self, batch: SpeechBatch) -> ConnectorOutput:
        """Embeddings ``[K, T, D]`` of all speech spans, their lengths ``[K]``, and the connector's own losses.

        Each clip is encoded once; spans are slices of its frames, and the connector sees one span at a time.
        """
        # Not in autocast: `encode`, which runs the same encoder for shards, is not in it, and codes would differ.
        device = batch.input_ids_BS.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            frames_NTKD = self.encoder.embed(self._stored(batch)).frames
        if torch.is_autocast_enabled(device):  # the connector's weights, sharded, are in this dtype
            frames_NTKD = frames_NTKD.to(torch.get_autocast_dtype(device))
        elif (weight := next(self.connector.parameters(), None)) is not None:
            frames_NTKD = frames_NTKD.to(weight.dtype)  # the encoder may be in bf16
        offset_T = torch.arange(batch.max_span_frames, device=frames_NTKD.device)
        inside_KT = offset_T < batch.span_num_frames_K[:, None]
        index_KT = (batch.span_first_frame_K[:, None] + offset_T).clamp(max=frames_NTKD.shape[1] - 1)
        frames_KTKD = frames_NTKD[batch.span_clip_K[:, None], index_KT] * inside_KT[..., None, None]
        output = self.connector(self._mix(frames_KTKD), batch.span_num_frames_K, num_words_N=batch.span_num_words_K)
        if not isinstance(output, ConnectorOutput):
            raise UserError(
                f"{type(self.connector).__name__} gives {type(output).__name__}",
                where="model.connector",
                cure="let its forward return a ConnectorOutput",
            )
        return output

    def _stored(self, batch: SpeechBatch) -> Stored:
        """What the encoder's heavy half makes of every clip; pre-encoded clips come after the others."""
        if batch.stored_NT is None or batch.stored_lengths_N is None:
            return self.encoder.encode(batch.audio_NL, batch.clip_lengths_N)
        stored_NT = batch.stored_NT.float() if batch.stored_NT.is_floating_point() else batch.stored_NT
        before = Stored(stored_NT, batch.stored_lengths_N)
        if not batch.clips_NL.shape[0]:
            return before
        fresh = self.encoder.encode(batch.audio_NL, batch.clip_lengths_N)
        num_frames = max(fresh.data.shape[1], before.data.shape[1])
        data = [_extend(stored.data, num_frames) for stored in (fresh, before)]
        return Stored(torch.cat([data[0], data[1].to(data[0].dtype)]), torch.cat([fresh.lengths, before.lengths]))

    def _mix(self, frames: Tensor) -> Tensor:
        """Weighted sum over the layer axis: ``[…, K, D]`` to ``[…, D]``."""
        if self.layer_mix is None:
            return frames.squeeze(-2)
        return torch.einsum("...kd,k->...d", frames, self.layer_mix.softmax(0).to(frames.dtype))

    def splice(self, batch: SpeechBatch) -> Spliced:
        """Put the speech spans' embeddings at their positions between the text embeddings.

        A connector whose lengths are only bounded beforehand fills the end of the positions kept for a span, so that
        the last of them, from which the next text token is predicted, is always speech. Those left over belong to no
        document from here on, and what follows them moves up.
        """
        text_BSD = self.llm.embed(batch.input_ids_BS)
        owners_BS = batch.document_ids_BS
        if batch.span_at_K.shape[0] == 0:
            # Collectives of a sharded connector hang unless every rank runs it: one silent span, which counts nothing.
            speech_KTD, _, losses = self.embed_speech(self.silence(batch))
            unused = speech_KTD.sum() if self.switch is None else speech_KTD.sum() + self.switch.sum()
            # Losses by the same names as on other ranks, which add up what is logged.
            nothing = {name: 0.0 * loss for name, loss in losses.items()}
            return Spliced(text_BSD + (0.0 * unused).to(text_BSD.dtype), batch.position_ids_BS, owners_BS, nothing)
        speech_KTD, lengths_K, losses = self.embed_speech(batch)
        B, S, D = text_BSD.shape
        edge = 0 if self.switch is None else 1
        if not self._checked:  # once: it waits for the device
            _check_speech(self.connector, speech_KTD, lengths_K, batch.span_num_positions_K - 2 * edge, D)
            self._checked = True
        unused_K = batch.span_num_positions_K - lengths_K - 2 * edge
        first_K = batch.span_at_K + unused_K + edge
        offset_T = torch.arange(speech_KTD.shape[1], device=text_BSD.device)
        # Unused positions all go to one extra row that is cut off: a boolean index would cost a device sync.
        at_KT = torch.where(offset_T < lengths_K[:, None], first_K[:, None] + offset_T, B * S)
        flat = torch.cat([text_BSD.reshape(B * S, D), text_BSD.new_zeros(1, D)])
        flat = flat.index_put((at_KT,), speech_KTD.to(flat.dtype))
        if self.switch is not None:
            for edges, at_K in zip(self.switch, (first_K - 1, first_K + lengths_K), strict=True):
                flat = flat.index_put((at_K,), edges.to(flat.dtype).expand(at_K.shape[0], D))
        embeddings_BSD = flat[:-1].view(B, S, D)
        if self.connector.exact:
            return Spliced(embeddings_BSD, batch.position_ids_BS, owners_BS, losses)
        return Spliced(embeddings_BSD, *_leave_out(batch, unused_K), losses)

    def silence(self, batch: SpeechBatch) -> SpeechBatch:
        """The batch with one silent span of one frame in place of its speech."""
        samples = round(self.encoder.sample_rate_hz / self.encoder.frame_rate_hz)
        one = batch.span_at_K.new_ones(1)
        fields = vars(batch) | {
            "clips_NL": batch.clips_NL.new_zeros(1, samples),
            "clip_lengths_N": one * samples,
            "stored_NT": None,
            "stored_lengths_N": None,
            "span_clip_K": one * 0,
            "span_first_frame_K": one * 0,
            "span_num_frames_K": one,
            "span_num_words_K": one,
            "max_span_frames": 1,
        }
        return SpeechBatch(**fields)


def _check_speech(connector: Connector, speech_KTD: Tensor, lengths_K: Tensor, announced_K: Tensor, dim: int) -> None:
    """Positions are counted long before the connector runs: more of them would overwrite the text before a span."""
    spans, most = announced_K.shape[0], int(lengths_K.max())
    cure = "see salad_lightning.interfaces.Connector, and test it with salad_lightning.testing.contracts"
    where = type(connector).__name__
    if speech_KTD.ndim != 3 or speech_KTD.shape[0] != spans or speech_KTD.shape[2] != dim:
        raise UserError(
            f"its embeddings are {tuple(speech_KTD.shape)}, not [{spans}, T', {dim}]", where=where, cure=cure
        )
    if most > speech_KTD.shape[1]:
        raise UserError(f"it says {most} positions and gives {speech_KTD.shape[1]}", where=where, cure=cure)
    wrong = (lengths_K != announced_K) if connector.exact else (lengths_K > announced_K)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise UserError(
            f"it gives {int(lengths_K[at])} positions where output_lengths says {int(announced_K[at])}",
            where=where,
            cure=cure,
        )


def _extend(data_NT: Tensor, num_frames: int) -> Tensor:
    """Zero-pad axis 1."""
    missing = num_frames - data_NT.shape[1]
    return torch.cat([data_NT, data_NT.new_zeros(data_NT.shape[0], missing, *data_NT.shape[2:])], 1)


def _leave_out(batch: SpeechBatch, unused_K: Tensor) -> tuple[Tensor, Tensor]:
    """Position and document ids without the first ``unused_K`` positions of every span."""
    B, S = batch.position_ids_BS.shape
    # +1 where a run of unused positions begins, -1 behind its end; runs may meet, so they are added up.
    steps = batch.span_at_K.new_zeros(B * S + 1)
    steps = steps.index_add(0, batch.span_at_K, torch.ones_like(unused_K))
    steps = steps.index_add(0, batch.span_at_K + unused_K, -torch.ones_like(unused_K))
    unused_BS = steps[:-1].cumsum(0).view(B, S)
    before_BS = unused_BS.cumsum(1) - unused_BS
    first_BS = torch.arange(S, device=unused_BS.device) - batch.position_ids_BS  # of a position's document
    position_ids_BS = batch.position_ids_BS - (before_BS - before_BS.gather(1, first_BS))
    return position_ids_BS, batch.document_ids_BS.masked_fill(unused_BS > 0, -1)


def predict_transcripts(llm: LanguageModel, batch: SpeechBatch) -> Prediction:
    """The M tokens of a batch predicted from its plain transcripts; for the teacher this is Q(· | w)."""
    prediction = llm(
        batch.teacher_position_ids_RU,
        batch.teacher_document_ids_RU,
        batch.teacher_predict_at_M,
        input_ids_BS=batch.teacher_input_ids_RU,
    )
    assert isinstance(prediction, Prediction)
    return prediction


def freeze(model: nn.Module, patterns: list[str]) -> list[str]:
    """Stop training every parameter whose name matches a shell pattern such as ``llm.*`` or ``*.embed_tokens.*``.

    Returns:
        The names frozen.

    Raises:
        UserError: If a pattern matches no parameter.
    """
    frozen: list[str] = []
    names = dict(model.named_parameters())
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            parts = sorted({".".join(name.split(".")[:2]) for name in names})
            raise UserError(
                f"the pattern {pattern!r} matches no parameter",
                where="model.freeze",
                cure=f"parameters begin with: {', '.join(parts[:12])}",
            )
        for name in matched:
            names[name].requires_grad_(False)
        frozen += matched
    return frozen
