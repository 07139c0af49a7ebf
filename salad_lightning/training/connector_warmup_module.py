"""Warms a connector up by recognition: its positions are to land on the LLM's embeddings of the words spoken."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from salad_lightning.batch import ObjectiveOutput, SpeechBatch
from salad_lightning.training.speech_llm_module import SpeechLLMModule

__all__ = ["ConnectorWarmupModule"]

# A position that equals a token's embedding gets this logit for it; one that is far from all of them is a blank.
_MATCH_LOGIT = 12.0
_BLANK_LOGIT = 5.0


class ConnectorWarmupModule(SpeechLLMModule):
    """`SpeechLLMModule` with one change: the loss is CTC between connector outputs and transcript tokens.

    The logit of token v at a position is the dot product with the LLM's embedding of v, so nothing is learned but the
    connector. A few dozen steps of it save many hundreds of distillation, which hears of a word only where later text
    depends on it. CTC: Graves et al. 2006, https://doi.org/10.1145/1143844.1143891.

    Wants documents that are one speech span each: `TemplateDocuments` with ``template: "{speech}"``.
    """

    def compute_loss(self, batch: SpeechBatch) -> ObjectiveOutput:
        """Summed CTC loss; the count is that of transcript tokens."""
        speech_KTD, lengths_K, losses = self.model.embed_speech(batch)
        targets, target_lengths_K = _transcripts(batch)
        log_probs_KTV = self._logits(speech_KTD).log_softmax(-1)
        loss = functional.ctc_loss(
            log_probs_KTV.transpose(0, 1), targets, lengths_K, target_lengths_K,
            blank=log_probs_KTV.shape[-1] - 1, reduction="sum", zero_infinity=True,
        )  # fmt: skip
        parts = {"ctc": loss.detach()} | {name: value.detach() for name, value in losses.items()}
        return ObjectiveOutput(sum(losses.values(), loss), target_lengths_K.sum(), parts)

    def validation_step(self, batch: SpeechBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the validation loss."""
        output = self.compute_loss(batch)
        self.log("val/ctc", output.sum / output.count, batch_size=len(batch.documents), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Nothing is gathered."""

    def _logits(self, speech_KTD: Tensor) -> Tensor:
        """``[K, T, V + 1]``, the blank last."""
        tokens = torch.arange(self.model.llm.vocab_size, device=speech_KTD.device)
        table_VD = self.model.llm.embed(tokens).detach().float()
        scale = _MATCH_LOGIT / table_VD.pow(2).sum(-1).mean()
        logits = scale * speech_KTD.float() @ table_VD.T
        return torch.cat([logits, torch.full_like(logits[..., :1], _BLANK_LOGIT)], -1)


def _transcripts(batch: SpeechBatch) -> tuple[Tensor, Tensor]:
    """Tokens of each span's document, end to end, and their lengths ``[K]``."""
    owners = batch.document_ids_BS.flatten()[batch.span_at_K].tolist()
    tokens, documents = batch.teacher_input_ids_RU.flatten(), batch.teacher_document_ids_RU.flatten()
    found = [tokens[documents == owner] for owner in owners]
    return torch.cat(found), torch.tensor([len(part) for part in found], device=tokens.device)
