"""Trains a text LLM from a configuration: the miniature's teacher, or any small language model."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from salad_lightning.batch import ObjectiveOutput, SpeechBatch
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.evaluation.spoken_choice import SpokenChoice
from salad_lightning.interfaces import Objective
from salad_lightning.model.llm import build_language_model, load_config, load_language_model, load_tokenizer
from salad_lightning.model.speech_llm import predict_transcripts
from salad_lightning.projection import token_log_probs
from salad_lightning.training.base import TokenLossModule
from salad_lightning.training.cost import step_flops
from salad_lightning.training.optimizer import default_optimizer
from salad_lightning.training.schedule import WarmupStableDecay
from salad_lightning.training.speed_monitor import Work, size_of

__all__ = ["TextLMModule"]


class TextLMModule(TokenLossModule):
    """A causal language model on plain text, with the data, normalisation and schedule of the speech stages.

    Args:
        llm: Folder (or hub name) with config.json and tokenizer; weights too unless ``from_scratch``.
        objective: What is minimised; one without a teacher.
        from_scratch: Initialise weights from the configuration instead of loading them.
        export_to: Folder to write the trained model to, in Hugging Face format, at the end of ``fit``.
        context: Tokens in a row.
        lr: Learning rate.
        optimizer: Optimizer class.
        schedule: Warm-up, stable, decay.
    """

    def __init__(
        self,
        llm: str,
        objective: Objective,
        from_scratch: bool = False,
        export_to: str | None = None,
        context: int = 2048,
        lr: float = 1e-3,
        optimizer: OptimizerCallable = default_optimizer,
        schedule: WarmupStableDecay | None = None,
    ) -> None:
        super().__init__(optimizer, schedule)
        self.save_hyperparameters()
        if objective.needs_teacher:
            raise ValueError("TextLMModule has no teacher: use NLLObjective")
        self.objective = objective
        self._path, self._from_scratch, self._export_to = llm, from_scratch, export_to
        self._config = load_config(llm)
        self._tokenizer = load_tokenizer(llm, self._config)
        self._context, self._rate = context, lr
        self._choices = SpokenChoice()

    def configure_model(self) -> None:
        """Build or load the weights, once."""
        if hasattr(self, "model"):
            return
        vocab_size = len(self._tokenizer)
        if self._from_scratch:
            self.model = build_language_model(self._config, vocab_size)
        else:
            self.model = load_language_model(self._path, vocab_size)

    def sequence_spec(self) -> SequenceSpec:
        """Tokenizer and context: there is no audio."""
        return SequenceSpec.text_only(self._tokenizer, self._context)

    def parameter_rates(self) -> dict[str, tuple[float, list[tuple[str, nn.Parameter]]]]:
        """One group."""
        return {"llm": (self._rate, list(self.model.named_parameters()))}

    def compute_loss(self, batch: SpeechBatch) -> ObjectiveOutput:
        """The objective at the predicted tokens of plain text."""
        output: ObjectiveOutput = self.objective(predict_transcripts(self.model, batch), None, batch.labels_M)
        return output

    def flops(self, work: Work) -> float:
        """Three passes over plain text."""
        return step_flops(
            size_of(self.model),
            None,
            positions=work.teacher_positions,
            teacher_positions=0,
            predicted=work.predicted,
            mean_context=work.teacher_context / max(work.teacher_positions, 1),
        )

    @torch.no_grad()
    def validation_step(self, batch: SpeechBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Mean NLL per token."""
        output = self.compute_loss(batch)
        value, weight = output.sum / output.count.clamp(min=1), max(batch.num_predicted, 1)
        self.log("val/nll", value, batch_size=weight, sync_dist=True)

    def on_test_epoch_start(self) -> None:
        """Forget earlier items."""
        self._choices = SpokenChoice()

    def test_step(self, batch: SpeechBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score multiple-choice options as text."""
        log_probs_M = token_log_probs(predict_transcripts(self.model, batch), batch.labels_M)
        self._choices.update(log_probs_M, batch.predict_document_M, batch.documents)

    def on_test_epoch_end(self) -> None:
        """Log the accuracy."""
        self._choices.gather()
        if len(self._choices):
            self.log("test/text_accuracy", self._choices.accuracy()["all"], sync_dist=True)

    def on_fit_end(self) -> None:
        """Write what the run cost, and export the trained model."""
        super().on_fit_end()
        if self._export_to and self.trainer.is_global_zero:
            folder = Path(self._export_to)
            self.model.hf.save_pretrained(folder)
            self._tokenizer.save_pretrained(folder)
