"""Trains a text LLM to understand speech: both stages of SALAD."""

from __future__ import annotations

import json
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from salad_lightning.batch import ObjectiveOutput, Prediction, SpeechBatch
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.errors import UserError
from salad_lightning.evaluation.gap import GapReport, Measured, measure
from salad_lightning.interfaces import Connector, ConnectorFactory, Encoder, Objective
from salad_lightning.model.llm import LanguageModel, load_config, load_language_model, load_tokenizer
from salad_lightning.model.parallel import compute_dtype, shard_language_model, shard_speech_llm
from salad_lightning.model.speech_llm import SpeechLLM, freeze, predict_transcripts
from salad_lightning.training.base import TokenLossModule, default_optimizer, load_checkpoint, save_folder
from salad_lightning.training.handover import check_handover, check_not_decayed, describe_parts
from salad_lightning.training.schedule import WarmupStableDecay

__all__ = ["SpeechLLMModule"]


class SpeechLLMModule(TokenLossModule):
    """Connector and LLM trained on interleaved text and speech, against the LLM's own text-only self.

    Args:
        llm: Folder or hub name of the text LLM.
        encoder: Frozen speech encoder.
        connector: Connector class; the widths on its two sides are filled in.
        objective: What is minimised; ForwardKLObjective is SALAD.
        teacher: Folder or hub name of the teacher Q; by default the untouched ``llm``.
        context: Positions in a row, text tokens and speech together.
        connector_lr: Learning rate of the connector (and of the mix over encoder layers).
        llm_lr: Learning rate of the LLM.
        optimizer: Optimizer class; rates come from the two keys above.
        schedule: Warm-up, stable, decay.
        freeze: Shell patterns of parameter names to keep fixed, such as ``llm.*`` or ``*embed_tokens*``.
        switch_embeddings: Learn one embedding before and one after each speech span.
        init_from: Checkpoint to take weights from (not the optimizer, the step or the place in the data). It must have
            been trained with the same parts.
        require_pre_decay: Refuse an ``init_from`` whose learning rate had decayed: Stage II goes on from before.
        gap_every_n_steps: Measure misalignment and forgetting on the training batch every so many steps; 0 is never.
        report_by: JSON field of the samples by which test results are broken down.
    """

    def __init__(
        self,
        llm: str,
        encoder: Encoder,
        connector: ConnectorFactory,
        objective: Objective,
        teacher: str | None = None,
        context: int = 2048,
        connector_lr: float = 1e-3,
        llm_lr: float = 5e-5,
        optimizer: OptimizerCallable = default_optimizer,
        schedule: WarmupStableDecay | None = None,
        freeze: list[str] | None = None,
        switch_embeddings: bool = False,
        init_from: str | None = None,
        require_pre_decay: bool = False,
        gap_every_n_steps: int = 0,
        report_by: str = "domain",
    ) -> None:
        super().__init__(optimizer, schedule)
        self.save_hyperparameters()
        self.objective = objective
        self._llm_path, self._teacher_path = llm, teacher or llm
        self._config = load_config(llm)
        self._tokenizer = load_tokenizer(llm, self._config)
        if teacher is not None and teacher != llm:
            other = load_tokenizer(teacher, load_config(teacher))
            if other.get_vocab() != self._tokenizer.get_vocab():
                raise UserError(
                    f"teacher and LLM have different vocabularies: there is no KL between {teacher} and {llm}",
                    where="model.teacher",
                    cure="use a teacher with the LLM's tokenizer",
                )
        built = connector(encoder_dim=encoder.output_dim, llm_dim=self._config.get_text_config().hidden_size)
        self._parts: tuple[Encoder, Connector] = (encoder, built)  # a tuple: they are registered inside the SpeechLLM
        self._context, self._switch = context, switch_embeddings
        self._rates = {"connector": connector_lr, "llm": llm_lr}
        self._freeze, self._init_from, self._require_pre_decay = freeze or [], init_from, require_pre_decay
        self._encoder_identity = ""
        self._gap_every, self._report_by = gap_every_n_steps, report_by
        self._teacher: tuple[LanguageModel] | None = None
        self._reports: dict[str, GapReport] = {}
        self._rows: list[dict[str, Any]] = []
        self._gap: dict[str, Tensor] = {}  # sums and counts of this optimizer step
        self.model: SpeechLLM

    def configure_model(self) -> None:
        """Load the weights, once, and spread them if the strategy asks for it."""
        if hasattr(self, "model"):
            return
        attached = self._trainer is not None
        dtype = compute_dtype(self.trainer.precision) if attached else torch.float32
        vocab_size = len(self._tokenizer)
        encoder, connector = self._parts
        llm = load_language_model(self._llm_path, vocab_size)
        model = SpeechLLM(llm=llm, encoder=encoder, connector=connector, switch_embeddings=self._switch)
        freeze(model, self._freeze)
        self.model = model.train()  # from_pretrained gives eval mode; the encoder stays in it
        if self._init_from:
            self._take_weights(self._init_from)
        if not attached:
            return
        # The teacher is not a registered submodule: it is never trained, saved or summarised. Hence the tuple.
        teacher = load_language_model(self._teacher_path, vocab_size, dtype).requires_grad_(False).eval()
        teacher.to(self.trainer.strategy.root_device)
        if self.device_mesh is not None:
            shard_speech_llm(model, self.device_mesh["data_parallel"], dtype)
            shard_language_model(teacher, self.device_mesh["data_parallel"], dtype)
        self._teacher = (teacher,)

    def sequence_spec(self) -> SequenceSpec:
        """Lengths and tokenizer, for the data module."""
        encoder, connector = self._parts
        # Once, before the strategy casts or moves the encoder.
        self._encoder_identity = self._encoder_identity or encoder.identity()
        return SequenceSpec.of_parts(
            self._tokenizer,
            self._context,
            encoder=encoder,
            connector=connector,
            switch_embeddings=self._switch,
            identity=self._encoder_identity,
        )

    def parameter_rates(self) -> dict[str, tuple[float, list[tuple[str, nn.Parameter]]]]:
        """Two groups: the LLM, and everything else that is trained."""
        named = list(self.model.named_parameters())
        llm = [(name, parameter) for name, parameter in named if name.startswith("llm.")]
        other = [(name, parameter) for name, parameter in named if not name.startswith("llm.")]
        return {"connector": (self._rates["connector"], other), "llm": (self._rates["llm"], llm)}

    def compute_loss(self, batch: SpeechBatch) -> ObjectiveOutput:
        """Student, and the teacher where the objective needs it or the gap is measured at this step."""
        gap_due = self._gap_every > 0 and self.global_step % self._gap_every == 0
        teacher = self.teach(batch) if self.objective.needs_teacher or gap_due else None
        output: ObjectiveOutput = self.model(batch, self.objective, teacher)
        if gap_due and teacher is not None:
            # On every rank, whatever its batch holds: sharded models run in step.
            for name, (total, count) in measure(self.model, batch, teacher).sums().items():
                self._gap[name] = self._gap.get(name, 0) + torch.stack([total.float(), count.float()])
        return output

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gap where it was measured, over the global batch."""
        super().on_before_optimizer_step(optimizer)
        if not self._gap:
            return
        names = sorted(self._gap)
        totals = torch.stack([self._gap[name] for name in names])
        self._gap.clear()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(totals)
        values = (totals[:, 0] / totals[:, 1].clamp(min=1)).tolist()
        # Not self.log: that repeats the last value in the rows of all the steps between.
        for logger in self.trainer.loggers:
            logger.log_metrics({f"train/{n}": v for n, v in zip(names, values, strict=True)}, step=self.global_step)

    @torch.no_grad()
    def teach(self, batch: SpeechBatch) -> Prediction:
        """Q(· | w): the original LLM's prediction of the batch's tokens from the plain transcripts."""
        if self._teacher is None:
            raise RuntimeError("the teacher is loaded by a Trainer; this module is not attached to one")
        return predict_transcripts(self._teacher[0], batch)

    def on_validation_epoch_start(self) -> None:
        """Start one report for each validation set."""
        self._reports = {name: GapReport(self._report_by) for name in self._set_names("val")}

    def validation_step(self, batch: SpeechBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """NLL, KL, M and F of one batch."""
        self._measure(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the means of each validation set."""
        for name, report in self._reports.items():
            report.gather(self.device)
            for metric, value in report.overall().items():
                self.log(f"val/{name}/{metric}", value, prog_bar=metric == "misalignment", sync_dist=True)

    def on_test_epoch_start(self) -> None:
        """Start one report for each test set."""
        self._reports = {name: GapReport(self._report_by) for name in self._set_names("test")}

    def test_step(self, batch: SpeechBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """NLL, KL, M and F, and the scores of multiple-choice options."""
        self._measure(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the figures, print the gap table and write ``test.json``."""
        for name, report in self._reports.items():
            report.gather(self.device)
            self.log_dict({f"test/{name}/{m}": v for m, v in report.overall().items()}, sync_dist=True)
        if self.trainer.is_global_zero:
            GapReport.write(self._reports, save_folder(self.trainer) / "test.json")

    def on_predict_start(self) -> None:
        """Forget earlier rows."""
        self._rows = []

    def predict_step(self, batch: SpeechBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """One row a document: its predicted tokens, their log-probabilities from speech and from text, and the KL."""
        measured = self._measured(batch)
        columns = {
            "tokens": batch.labels_M,
            "speech_log_probs": measured.speech_log_prob_M,
            "text_log_probs": measured.text_log_prob_M,
            "base_log_probs": measured.base_log_prob_M,
            "kl": measured.kl_M,
            "after_speech": measured.after_speech_M,
        }
        owners, values = batch.predict_document_M.tolist(), {name: v.tolist() for name, v in columns.items()}
        rows: list[dict[str, Any]] = [
            {"key": info.key, "source": info.source, "choice": info.choice, **{name: [] for name in columns}}
            for info in batch.documents
        ]
        for at, owner in enumerate(owners):
            for name in columns:
                rows[owner][name].append(values[name][at])
        self._rows += rows
        return rows

    def on_predict_end(self) -> None:
        """Write ``predictions.jsonl``; with several processes, one file each."""
        rank = f"-{self.global_rank}" if self.trainer.world_size > 1 else ""
        path = save_folder(self.trainer) / f"predictions{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part")
        aside.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        aside.replace(path)

    def _measured(self, batch: SpeechBatch) -> Measured:
        return measure(self.model, batch, self.teach(batch))

    def _measure(self, batch: SpeechBatch, dataloader_idx: int) -> None:
        # A rank's batch may hold no document at all; sharded models still need every rank to run.
        report = list(self._reports.values())[dataloader_idx]
        report.update(self._measured(batch), batch)

    def _set_names(self, stage: str) -> list[str]:
        names = getattr(self.trainer.datamodule, f"{stage}_names", None)  # type: ignore[attr-defined]
        loaders = self.trainer.num_val_batches if stage == "val" else self.trainer.num_test_batches
        return list(names) if names else [str(index) for index in range(len(loaders))]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the parts, for the next stage."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["salad_lightning"]["parts"] = self._described()

    def _described(self) -> dict[str, str]:
        return describe_parts(
            config=self._config,
            tokenizer=self._tokenizer,
            encoder=self.sequence_spec().encoder,
            connector=self._parts[1],
            switch=self._switch,
        )

    def _take_weights(self, path: str) -> None:
        checkpoint = load_checkpoint(path, weights_only=True)
        check_handover(checkpoint, self._described(), path)
        if self._require_pre_decay:
            check_not_decayed(checkpoint, path)
        self.check_weights(checkpoint, path)
        self.load_state_dict(checkpoint["state_dict"], strict=False)
        taken, step = len(checkpoint["state_dict"]), checkpoint.get("global_step", 0)
        rank_zero_info(f"{taken} weights taken from {path} (step {step}); the optimizer starts afresh")
