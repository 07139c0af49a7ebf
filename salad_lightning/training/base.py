"""What all training modules of this package share: global normalisation, parameter groups, schedule, what was seen."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from salad_lightning.batch import ObjectiveOutput, SpeechBatch
from salad_lightning.corpus.workspace import write_aside
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.errors import UserError
from salad_lightning.model.parallel import check_device, compute_dtype
from salad_lightning.training.checkpoints import (
    PLAIN,
    AtomicCheckpointIO,
    compare_weights,
    frozen_names,
    is_of,
    trained_names,
)
from salad_lightning.training.optimizer import default_optimizer, restore_fused
from salad_lightning.training.schedule import WarmupStableDecay
from salad_lightning.training.since_step import SinceStep
from salad_lightning.training.speed_monitor import SpeedMonitor, Work

# Checkpoints of earlier code name the optimizer here.
__all__ = ["TokenLossModule", "default_optimizer", "is_trial", "save_folder"]


class TokenLossModule(LightningModule):
    """A module whose loss is a sum over predicted tokens, normalised by their count in the *global* batch.

    A mean per micro-batch weighs tokens of short batches more, under accumulation and under data parallelism. So
    `training_step` returns the sum; before clipping, the gradients are scaled by ``accumulation · ranks / count``
    (Lightning has divided by the first two), where the count is summed over all ranks and micro-batches.

    Subclasses give `compute_loss`, `parameter_rates` and `sequence_spec`.

    Args:
        optimizer: Builds the optimizer from parameter groups that carry their own ``lr``.
        schedule: Learning-rate schedule over ``trainer.max_steps``.
    """

    def __init__(self, optimizer: OptimizerCallable, schedule: WarmupStableDecay | None) -> None:
        super().__init__()
        self._build_optimizer = optimizer
        self.schedule = schedule or WarmupStableDecay()
        self.strict_loading = False  # frozen weights are not in checkpoints; on_load_checkpoint checks the rest
        self._totals: dict[str, Tensor] = {}
        self._since_step = SinceStep()
        self.seen = {"tokens": 0.0, "audio_seconds": 0.0}  # over the whole run: rank 0's, times the processes
        self.work = Work()  # of the micro-batch at hand
        self._started = 0.0

    def compute_loss(self, batch: SpeechBatch) -> ObjectiveOutput:
        """Summed loss of one micro-batch."""
        raise NotImplementedError

    def parameter_rates(self) -> dict[str, tuple[float, list[tuple[str, nn.Parameter]]]]:
        """Group name → (learning rate, named parameters)."""
        raise NotImplementedError

    def sequence_spec(self) -> SequenceSpec:
        """What the data must know of the model; asked for before any weight is loaded."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Refuse what cannot work, before any weight is loaded, and make checkpoints atomic.

        Raises:
            UserError: For ways of counting an epoch that lose data on resume, a precision that the weights or the
                device do not stand, or an optimizer that does not run under FSDP2.
        """
        check_device(compute_dtype(self.trainer.precision), self.trainer.strategy.root_device)
        if stage == "fit":
            _check_trainer(self.trainer)
            self._check_optimizer()
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def configure_callbacks(self) -> list[Callback]:
        """Bring a `SpeedMonitor` along, unless the run has one."""
        present = any(isinstance(callback, SpeedMonitor) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if present else [SpeedMonitor()]

    def on_before_batch_transfer(self, batch: SpeechBatch, dataloader_idx: int) -> SpeechBatch:
        """Count the work while the batch is on the host, where that costs no device sync."""
        if self.trainer.training:
            self.work = Work.of(batch)
        return batch

    def flops(self, work: Work) -> float:
        """Operations that a training micro-batch needs on this process, for the MFU; 0 where they are not known."""
        return 0.0

    def _check_optimizer(self) -> None:
        if self.device_mesh is None:
            return
        probe = self._build_optimizer([{"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0}])
        if type(probe).__module__.startswith("bitsandbytes"):
            raise UserError(
                f"{type(probe).__name__} does not run under FSDP2",
                where="model.optimizer",
                cure="use torch.optim.AdamW, or set trainer.strategy to auto (one device) or ddp",
            )

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """One micro-batch: returns the *summed* loss."""
        output = self.compute_loss(batch)
        for name, value in {"count": output.count, "loss": output.sum.detach(), **output.parts}.items():
            self._totals[name] = self._totals.get(name, 0) + value.float()
        self._since_step.add(batch, self.trainer)
        return output.sum

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step; only now does what the step was made of count as trained on."""
        super().optimizer_step(*args, **kwargs)
        states, work = self._since_step.end(self.trainer)
        if note_trained := getattr(self.trainer.datamodule, "note_trained", None):  # type: ignore[attr-defined]
            for state in states:
                note_trained(state)
        for name, amount in work.items():
            self.seen[name] += amount

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn averaged sums into the mean per token of the global batch; Lightning clips after this."""
        names = sorted(self._totals)
        totals = torch.stack([self._totals[name] for name in names])
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(totals)
        means = dict(zip(names, totals, strict=True))
        count = means.pop("count").clamp(min=1)
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / count
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        self._totals.clear()
        for name, total in means.items():
            self.log(f"train/{name}", total / count)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            # Not by `prog_bar`: that is read from the device after every batch, whether there is a bar or not.
            self.trainer.progress_bar_metrics["train/loss"] = float(means["loss"] / count)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, by default by the norm over all processes.

        Lightning's plugin for mixed precision refuses fused optimizers, since those may undo the scaling of a loss.
        Without fp16 there is none, so this asks the plugin that it refines.
        """
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        Precision.clip_gradients(self.trainer.precision_plugin, optimizer, gradient_clip_val or 0.0, algorithm)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Groups by `parameter_rates`, each split by whether weight decay applies (matrices only)."""
        groups = []
        for name, (rate, named) in self.parameter_rates().items():
            trained = [parameter for _, parameter in named if parameter.requires_grad]
            for suffix, members, extra in (
                ("", [p for p in trained if p.ndim > 1], {}),
                ("_no_decay", [p for p in trained if p.ndim <= 1], {"weight_decay": 0.0}),
            ):
                if members:
                    groups.append({"params": members, "lr": rate, "name": name + suffix, **extra})
        if not groups:
            raise UserError("every parameter is frozen", where="model.freeze", cure="leave something to train")
        optimizer = self._build_optimizer(groups)
        total = self.trainer.max_steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen weights out that are found where they were loaded from, and note their names.

        Between two optimizer steps, the checkpoint is that of the first.
        """
        self._since_step.take_back(checkpoint)
        frozen = self.left_out()
        for name in list(checkpoint["state_dict"]):
            if is_of(frozen, name):
                del checkpoint["state_dict"][name]
        checkpoint["salad_lightning"] = {
            "frozen": sorted(frozen),
            "trained": trained_names(self),
            "seen": dict(self.seen),
            "sharded": self.device_mesh is not None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that nothing but frozen weights is missing.

        Raises:
            UserError: If the checkpoint is of another model.
        """
        groups = [group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]]
        goes_on = self._trainer is not None and self.trainer.training
        if goes_on and not all("params" in group for group in groups):
            raise UserError(
                "the checkpoint is of a sharded run, which goes on under FullyShardedStrategy alone",
                where=str(self.trainer.ckpt_path),
                cure="set trainer.strategy as it was in that run, or start from its weights: model.init_from",
            )
        self.seen = dict(checkpoint.get("salad_lightning", {}).get("seen", self.seen))
        if "state_dict" in checkpoint:
            self.check_weights(checkpoint, "the checkpoint")

    def check_checkpoint(self, path: str, *, goes_on: bool = False) -> None:
        """Refuse a checkpoint to go on from, or to measure, before any weight is loaded.

        Args:
            path: Of the checkpoint.
            goes_on: Whether the run goes on with its optimizer's state, too.

        Raises:
            UserError: If it does not fit.
        """

    def check_weights(self, checkpoint: Mapping[str, Any], where: str) -> None:
        """Compare names and shapes of a checkpoint's weights with this module's.

        Raises:
            UserError: If a weight is missing that was not frozen, unknown, or of another shape.
        """
        compare_weights(self.state_dict(), checkpoint, where, self.frozen_names())

    def frozen_names(self) -> set[str]:
        """See `checkpoints.frozen_names`."""
        return frozen_names(self)

    def left_out(self) -> set[str]:
        """State-dict names that checkpoints leave out: frozen weights that a new module of these settings has too."""
        return self.frozen_names()

    def on_fit_start(self) -> None:
        """Start the clock.

        Raises:
            UserError: If the strategy expects the module to spread its weights and it does not: every process would
                train a model of its own.
        """
        if self.device_mesh is not None and any(
            p.requires_grad and not isinstance(p, DTensor) for p in self.parameters()
        ):
            raise UserError(
                f"{type(self).__name__} does not spread its weights over processes",
                where="trainer.strategy",
                cure="set it to auto (one device) or ddp",
            )
        if objects := sorted(name for name, value in self.hparams.items() if not _is_plain(value)):
            rank_zero_warn(
                f"{type(self).__name__} was built with objects ({', '.join(objects)}). This run can go on from its "
                "checkpoints; other stages, `select` and `export` will refuse them, since reading objects can run "
                f"code: {PLAIN}"
            )
        self._totals.clear()  # of a run that ended within a step
        self._since_step = SinceStep()
        self._started = time.perf_counter()

    def on_train_start(self) -> None:
        """Step as this machine does, whichever wrote the optimizer's state."""
        for optimizer in self.trainer.optimizers:
            restore_fused(optimizer)

    def on_fit_end(self) -> None:
        """Write ``fit.json``: what the run cost."""
        if not self.trainer.is_global_zero:
            return
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        folder = save_folder(self.trainer)
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "steps": self.trainer.global_step,
            "seconds": round(time.perf_counter() - self._started, 2),
            "trainable_parameters": trained,
            **self.seen,
        }
        write_aside(folder / "fit.json", json.dumps(content, indent=1))


def _check_trainer(trainer: Any) -> None:
    problem = ""
    if trainer.accumulate_grad_batches < 1:
        raise UserError(
            f"{trainer.accumulate_grad_batches} is too small",
            where="trainer.accumulate_grad_batches",
            cure="give 1 or more",
        )
    if trainer.max_steps < 1:
        problem = "trainer.max_steps is not set"
    elif isinstance(trainer.limit_train_batches, float) and trainer.limit_train_batches != 1.0:
        problem = "trainer.limit_train_batches is a fraction of an endless stream"
    elif trainer.overfit_batches:
        problem = "trainer.overfit_batches would be other batches in every epoch"
    elif trainer.max_epochs not in (None, -1) and not is_trial(trainer):
        problem = f"trainer.max_epochs is {trainer.max_epochs}"
    if problem:
        raise UserError(
            problem,
            where="trainer",
            cure="training data is an endless stream: set trainer.max_steps (and max_epochs: -1), "
            "limit_train_batches to a whole number of batches if at all; to overfit, train on a folder of few samples",
        )


def _is_plain(value: Any) -> bool:
    """Whether it can be read from a file without running code."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def save_folder(trainer: Any) -> Path:
    """Where this run writes its results; one with ``fast_dev_run`` leaves those of the real one alone."""
    root = Path(trainer.default_root_dir)
    return root / "fast_dev_run" if is_trial(trainer) else root


def is_trial(trainer: Any) -> bool:
    """Whether this is a run of a few batches with ``fast_dev_run``, which keeps no checkpoint."""
    return bool(trainer.fast_dev_run)
