"""Checkpoints at the moments that Lightning's own callback does not know of, and the size of a step."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from salad_lightning.errors import UserError
from salad_lightning.training.agreement import Agreement
from salad_lightning.training.base import TokenLossModule, is_trial
from salad_lightning.training.since_step import validate_again

__all__ = ["FinalCheckpoint", "GlobalBatch", "PreDecayCheckpoint", "SigtermCheckpoint", "checkpoint_folder"]

# What a process has been told, the greater the more urgent.
_REQUEUE, _STOP = 1, 2


class PreDecayCheckpoint(Callback):
    """Keeps the weights as they stand when the learning rate begins to fall: where Stage II starts from.

    (arXiv 2510.13632, section 4.) Written as ``pre_decay.ckpt`` beside the other checkpoints.
    """

    def __init__(self) -> None:
        self._saved = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Another run, another checkpoint."""
        self._saved = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save once, at the step where the decay begins."""
        assert isinstance(pl_module, TokenLossModule), "PreDecayCheckpoint needs a module with a schedule"
        start = pl_module.schedule.decay_start(trainer.max_steps)
        # Under accumulation several micro-batches end at the same step: only the first of them saves.
        if not self._saved and trainer.global_step == start and not is_trial(trainer):
            trainer.save_checkpoint(checkpoint_folder(trainer) / "pre_decay.ckpt", weights_only=False)
            self._saved = True


class FinalCheckpoint(Callback):
    """Saves ``final.ckpt`` when training has come to its end; ``last.ckpt`` where it ended earlier (``max_time``)."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        if not is_trial(trainer):
            name = "final.ckpt" if trainer.global_step >= trainer.max_steps else "last.ckpt"
            trainer.save_checkpoint(checkpoint_folder(trainer) / name, weights_only=False)


class SigtermCheckpoint(Callback):
    """Saves ``last.ckpt`` when the process is told to stop, so that ``fit --ckpt_path last`` goes on from there.

    By SIGTERM, or by Ctrl-C; the second Ctrl-C ends the run at once.

    On SLURM, Lightning itself saves and requeues on the requeue signal (SIGUSR1 by default). Of several processes each
    may get a signal at another moment, or only one of them. Lightning's handlers talk to the others at that moment,
    and deadlock; in their place, all processes act at the end of the same micro-batch.
    """

    def __init__(self) -> None:
        self._told = 0
        self._agreement = Agreement()
        self._requeue: Callable[[], object] | None = None
        self._others: list[Any] = []
        self._validating = self._interrupted = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over."""
        self._told, self._agreement, self._requeue, self._interrupted = 0, Agreement(), None, False
        if threading.current_thread() is threading.main_thread():
            # Those of the program that runs the trainer stay; Lightning's stands before them.
            self._others = getattr(signal.getsignal(signal.SIGTERM), "signal_handlers", [])[1:]
            signal.signal(signal.SIGTERM, self._note_stop)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, self._note_interrupt)
            environment = trainer._accelerator_connector.cluster_environment
            if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
                lightnings = signal.getsignal(environment.requeue_signal)
                if callable(lightnings):
                    self._requeue = functools.partial(lightnings, environment.requeue_signal, None)
                    signal.signal(environment.requeue_signal, self._note_requeue)
        # Lightning asks rank 0 before every micro-batch, and waits for the device to answer.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save after the micro-batch in which a signal came, on several processes one later; Lightning then ends."""
        self._act(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save within a validation, which may take longer than the time that is left."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validating = True
            self._act(trainer)
            self._validating = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Do a validation anew that is broken off."""
        if self._validating:
            validate_again(checkpoint)

    def _act(self, trainer: Trainer) -> None:
        agreed = self._agreement(_STOP if trainer.received_sigterm else self._told, trainer)
        if agreed == _REQUEUE and self._requeue is not None:
            requeue, self._requeue = self._requeue, None
            self._told, self._agreement = 0, Agreement()
            requeue()
        if agreed == _STOP:
            if not is_trial(trainer):
                trainer.save_checkpoint(checkpoint_folder(trainer) / "last.ckpt", weights_only=False)
            trainer._signal_connector.received_sigterm = True  # Lightning ends the run, after it has logged

    def _note_stop(self, *signal_and_frame: Any) -> None:
        self._told = _STOP
        for handler in filter(callable, self._others):
            handler(*signal_and_frame)

    def _note_interrupt(self, *_: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._told, self._interrupted = _STOP, True
        rank_zero_info("interrupted: saving last.ckpt after this micro-batch; once more ends the run at once")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End with the exit code of Ctrl-C, if that was it."""
        if isinstance(exception, SIGTERMException) and self._interrupted:
            exception.code = 128 + signal.SIGINT

    def _note_requeue(self, *_: Any) -> None:
        self._told = max(self._told, _REQUEUE)


class GlobalBatch(Callback):
    """Holds the rows of an optimizer step, whatever the number of processes, by accumulating micro-batches.

    It sets ``trainer.accumulate_grad_batches``; a run goes on with another number of processes at the step where it
    was, and validates every so many steps as before.

    Args:
        rows: Of ``context`` positions in an optimizer step, over all processes: a multiple of ``data.rows_per_batch``
            times the number of processes.
        val_every_n_steps: Validate every so many optimizer steps, in place of ``trainer.val_check_interval``, which
            counts micro-batches; None leaves that as it is.
    """

    def __init__(self, rows: int, val_every_n_steps: int | None = None) -> None:
        if rows < 1 or (val_every_n_steps is not None and val_every_n_steps < 1):
            raise ValueError(f"rows ({rows}) and val_every_n_steps ({val_every_n_steps}) must be at least 1")
        self.rows, self.val_every_n_steps = rows, val_every_n_steps
        self._first = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the accumulation.

        Raises:
            UserError: If no whole number of micro-batches makes up the rows.
        """
        if stage != "fit":
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        per_batch = int(getattr(data, "rows_per_batch", 1))
        at_once = per_batch * trainer.world_size
        if self.rows % at_once:
            raise UserError(
                f"{self.rows} rows are no multiple of {per_batch} rows × {trainer.world_size} process(es) = {at_once}",
                where="trainer.callbacks: GlobalBatch.rows, data.rows_per_batch",
                cure=f"set rows to {max(1, round(self.rows / at_once)) * at_once}, or change rows_per_batch",
            )
        trainer.accumulate_grad_batches = self.rows // at_once
        if self.val_every_n_steps is not None:
            trainer.val_check_interval = self.val_every_n_steps * trainer.accumulate_grad_batches

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See the first batch."""
        self._first = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count micro-batches as this number of processes does: a step ends where they are a multiple.

        In the first batch and not before, as Lightning corrects the counts of a checkpoint on its way there.
        """
        if not self._first:
            return
        self._first = False
        done = trainer.global_step * trainer.accumulate_grad_batches
        progress = trainer.fit_loop.epoch_loop.batch_progress
        for tracker in (progress.total, progress.current):
            counts: Any = tracker
            counts.ready, counts.started, counts.processed, counts.completed = done + 1, done, done, done


def checkpoint_folder(trainer: Trainer) -> Path:
    """The folder of the run's first ModelCheckpoint, else ``checkpoints`` in the run's folder."""
    callback = trainer.checkpoint_callback
    if isinstance(callback, ModelCheckpoint) and callback.dirpath:
        return Path(callback.dirpath)
    return Path(trainer.default_root_dir) / "checkpoints"
