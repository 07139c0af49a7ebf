"""Misalignment of a fixed probe set, cluster by cluster, while a model trains."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from salad_lightning.data.documents import DocumentBuilder
from salad_lightning.data.loading import InStepLoader, StreamLoader
from salad_lightning.data.sources import Source
from salad_lightning.data.stream import EvaluationStream
from salad_lightning.errors import UserError
from salad_lightning.evaluation.gap import GapReport, measure
from salad_lightning.training.speech_llm_module import SpeechLLMModule

__all__ = ["MisalignmentMonitor"]


class MisalignmentMonitor(Callback):
    """Logs ``probe/{cluster}/misalignment`` and ``…/kl``, and their means over all tokens, every so many steps.

    ``misalignment`` compares the model with itself on text (arXiv 2510.13632, section 2), ``kl`` with the teacher,
    which is what clusters are selected by (section on active selection). Training itself is not changed by it: neither
    the random state nor the place in the data.

    Args:
        shards: Spoken probe texts: the ``shards`` of a selection's probe step, or any shards.
        documents: Builder of documents, as in training.
        every_n_steps: Optimizer steps between two measurements; the first is at this step.
        field: JSON field of the samples that names their cluster.
        rows_per_batch: Rows in a batch.

    Raises:
        UserError: If ``every_n_steps`` is below 1.
    """

    def __init__(
        self,
        shards: str | list[str],
        documents: DocumentBuilder,
        every_n_steps: int = 500,
        field: str = "cluster",
        rows_per_batch: int = 8,
    ) -> None:
        if every_n_steps < 1:
            raise UserError(f"{every_n_steps} is too small", where="MisalignmentMonitor.every_n_steps", cure="give ≥ 1")
        self._source = Source(shards, documents, name="probe")
        self._every, self._field, self._rows = every_n_steps, field, rows_per_batch
        self._last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse missing shards before training begins.

        Raises:
            UserError: If the module is no `SpeechLLMModule`, or a shard is missing.
        """
        if not isinstance(pl_module, SpeechLLMModule):
            what = f"{type(pl_module).__name__} has no misalignment"
            raise UserError(what, where="MisalignmentMonitor", cure="use it with SpeechLLMModule")
        self._last_step = trainer.global_step
        self._stream(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Measure, once a step even under gradient accumulation."""
        step = trainer.global_step
        if step == self._last_step or step % self._every:
            return
        self._last_step = step
        assert isinstance(pl_module, SpeechLLMModule)
        figures = self._measure(trainer, pl_module)
        # Not self.log: that repeats the last value in the rows of all the steps between.
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)

    def _stream(self, trainer: Trainer, module: SpeechLLMModule) -> EvaluationStream:
        sampler = trainer.distributed_sampler_kwargs or {}
        return EvaluationStream(
            self._source,
            module.sequence_spec(),
            rows_per_batch=self._rows,
            rank=int(sampler.get("rank", 0)),
            world_size=int(sampler.get("num_replicas", 1)),
        )

    def _measure(self, trainer: Trainer, module: SpeechLLMModule) -> dict[str, float]:
        device = trainer.strategy.root_device
        stream = self._stream(trainer, module)
        loader = StreamLoader(stream)
        if trainer.world_size > 1:
            loader = InStepLoader(stream, num_workers=0, rows_per_batch=self._rows, device=device)
        report = GapReport(self._field)
        training = [part for part in module.modules() if part.training]
        module.eval()
        try:
            for batch in loader:
                with torch.no_grad(), trainer.precision_plugin.forward_context():
                    on_device = batch.to(device)
                    report.update(measure(module.model, on_device, module.teach(on_device)), on_device)
        finally:
            for part in training:
                part.training = True
        report.gather()
        names = ("misalignment", "kl")
        figures = {f"probe/{name}": value for name, value in report.overall().items() if name in names}
        for name in names:
            figures |= {f"probe/{group}/{name}": v for group, v in report.by_group().get(name, {}).items()}
        return figures
