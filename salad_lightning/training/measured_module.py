"""What a speech LLM's validation, test and prediction measure, whatever it is trained by."""

from __future__ import annotations

import json
from abc import abstractmethod
from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn

from salad_lightning.batch import Prediction, SpeechBatch
from salad_lightning.corpus.workspace import write_aside
from salad_lightning.evaluation.gap import GapReport, Measured, measure
from salad_lightning.model.speech_llm import SpeechLLM
from salad_lightning.training.base import TokenLossModule, save_folder
from salad_lightning.training.schedule import WarmupStableDecay

__all__ = ["MeasuredModule"]


class MeasuredModule(TokenLossModule):
    """Validates and tests by NLL, KL, M, F and accuracies of multiple-choice options; predicts them token by token.

    Attributes:
        model: What is measured.

    Args:
        optimizer: As in `TokenLossModule`.
        schedule: As in `TokenLossModule`.
        report_by: JSON field of the samples by which test results are broken down.
    """

    model: SpeechLLM

    def __init__(self, optimizer: OptimizerCallable, schedule: WarmupStableDecay | None, *, report_by: str) -> None:
        super().__init__(optimizer, schedule)
        self._report_by = report_by
        self._reports: dict[str, GapReport] = {}
        self._rows: list[dict[str, Any]] = []

    @abstractmethod
    def teach(self, batch: SpeechBatch) -> Prediction:
        """Q(· | w): the original LLM's prediction of the batch's tokens from the plain transcripts."""

    def on_validation_epoch_start(self) -> None:
        """Start one report for each validation set."""
        self._reports = {name: GapReport(self._report_by) for name in self._set_names("val")}

    def validation_step(self, batch: SpeechBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """NLL, KL, M and F of one batch."""
        self._measure(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the means of each validation set."""
        for name, report in self._reports.items():
            report.gather()
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
            report.gather()
            if report.incomplete:
                rank_zero_warn(
                    f"{name}: {report.incomplete} items are not counted, as some of their options were not read; "
                    "trainer.limit_test_batches ends a set anywhere"
                )
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
        write_aside(path, "".join(json.dumps(row) + "\n" for row in self._rows))

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
