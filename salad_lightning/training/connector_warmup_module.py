"""Warms a connector up by recognition: its positions are to land on the LLM's embeddings of the words spoken."""

from __future__ import annotations

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import functional

from salad_lightning.batch import ObjectiveOutput, SpeechBatch
from salad_lightning.errors import UserError
from salad_lightning.model.llm import LanguageModel
from salad_lightning.model.speech_llm import SpeechLLM
from salad_lightning.training.speech_llm_module import SpeechLLMModule
from salad_lightning.training.speed_monitor import Work

__all__ = ["ConnectorWarmupModule"]

# A position that equals a token's embedding gets this logit for it; one that is far from all of them is a blank.
_MATCH_LOGIT = 12.0
_BLANK_LOGIT = 3.0


class ConnectorWarmupModule(SpeechLLMModule):
    """`SpeechLLMModule` with one change: the loss is CTC between connector outputs and transcript tokens.

    The logit of token v at a position is the dot product with the LLM's embedding of v, so nothing is learned but the
    connector. A few dozen steps of it save many hundreds of distillation, which hears of a word only where later text
    depends on it. CTC: Graves et al. 2006, https://doi.org/10.1145/1143844.1143891.

    Spans of one or two words are learned fastest: `InterleaveDocuments` with ``speech_words: [1, 2]``.
    """

    def configure_model(self) -> None:
        """See `SpeechLLMModule.configure_model`.

        Raises:
            UserError: Under a sharding strategy, which gathers weights for ``SpeechLLM.forward`` only.
        """
        if self._trainer is not None and self.device_mesh is not None:
            raise UserError(
                "connector warm-up runs on one device or under DDP",
                where="trainer.strategy",
                cure="set trainer.strategy to auto or ddp; the connector is small",
            )
        super().configure_model()

    @property
    def _wants_teacher(self) -> bool:
        return super()._wants_teacher and self.trainer.state.fn != TrainerFn.FITTING

    def _freezes_llm(self) -> bool:
        return True

    def _assemble(self, llm: LanguageModel) -> SpeechLLM:
        model = super()._assemble(llm)
        # Nothing else has a gradient, which DDP would wait for.
        model.llm.requires_grad_(False)
        if model.switch is not None:
            model.switch.requires_grad_(False)
        return model

    def compute_loss(self, batch: SpeechBatch) -> ObjectiveOutput:
        """Summed CTC loss; the count is that of transcript tokens."""
        if batch.span_at_K.shape[0] == 0:  # nothing to hear, but all ranks must run the connector
            silence = self.model.embed_speech(self.model.silence(batch))
            silent = sum(silence.losses.values(), silence.embeddings.sum()) * 0.0
            return ObjectiveOutput(
                silent, batch.span_at_K.sum(), dict.fromkeys(("ctc", *silence.losses), silent.detach())
            )
        speech_KTD, lengths_K, losses = self.model.embed_speech(batch)
        offset = torch.arange(batch.max_span_frames, device=speech_KTD.device)
        inside_KT = offset < batch.span_num_tokens_K[:, None]  # CTC cannot spell more tokens than there are frames
        tokens_KT = (batch.span_token_at_K[:, None] + offset).clamp(max=batch.teacher_input_ids_RU.numel() - 1)
        targets_KT = batch.teacher_input_ids_RU.flatten()[tokens_KT] * inside_KT
        target_lengths_K = inside_KT.sum(1)
        log_probs_KTV = self._logits(speech_KTD).log_softmax(-1)
        loss = functional.ctc_loss(
            log_probs_KTV.transpose(0, 1), targets_KT, lengths_K, target_lengths_K,
            blank=log_probs_KTV.shape[-1] - 1, reduction="sum", zero_infinity=True,
        )  # fmt: skip
        parts = {"ctc": loss.detach()} | {name: value.detach() for name, value in losses.items()}
        return ObjectiveOutput(sum(losses.values(), loss), target_lengths_K.sum(), parts)

    def flops(self, work: Work) -> float:
        """Not counted: the language model does not run, and CTC's logits are most of the work."""
        return 0.0

    def validation_step(self, batch: SpeechBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the validation loss."""
        output = self.compute_loss(batch)
        self.log("val/ctc", output.sum / output.count.clamp(min=1), batch_size=len(batch.documents), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Nothing is gathered."""

    def _logits(self, speech_KTD: Tensor) -> Tensor:
        """``[K, T, V + 1]``, the blank last."""
        tokens = torch.arange(self.model.llm.vocab_size, device=speech_KTD.device)
        table_VD = self.model.llm.embed(tokens).detach().float()
        scale = _MATCH_LOGIT / table_VD.pow(2).sum(-1).mean()
        logits = scale * speech_KTD.float() @ table_VD.T
        return torch.cat([logits, torch.full_like(logits[..., :1], _BLANK_LOGIT)], -1)
