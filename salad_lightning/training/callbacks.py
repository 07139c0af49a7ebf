"""Checkpoints at the moments that Lightning's own callback does not know of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from salad_lightning.training.base import TokenLossModule, save_folder

__all__ = ["FinalCheckpoint", "PreDecayCheckpoint", "SigtermCheckpoint"]


class PreDecayCheckpoint(Callback):
    """Keeps the weights as they stand when the learning rate begins to fall: where Stage II starts from.

    (arXiv 2510.13632, section 4.) Written as ``pre_decay.ckpt`` beside the other checkpoints.
    """

    def __init__(self) -> None:
        self._saved = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save once, at the step where the decay begins."""
        assert isinstance(pl_module, TokenLossModule), "PreDecayCheckpoint needs a module with a schedule"
        start = pl_module.schedule.decay_start(trainer.max_steps)
        # Under accumulation several micro-batches end at the same step: only the first of them saves.
        if not self._saved and trainer.global_step == start:
            trainer.save_checkpoint(checkpoint_folder(trainer) / "pre_decay.ckpt")
            self._saved = True


class FinalCheckpoint(Callback):
    """Saves ``final.ckpt`` when training has come to its end."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        if trainer.global_step >= trainer.max_steps:
            trainer.save_checkpoint(checkpoint_folder(trainer) / "final.ckpt")


class SigtermCheckpoint(Callback):
    """Saves ``last.ckpt`` when the process is told to stop, so that ``fit --ckpt_path last`` goes on from there.

    On SLURM, Lightning itself saves and requeues on the requeue signal (SIGUSR1 by default).
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save after the step in which SIGTERM came; Lightning then ends the run."""
        if trainer.received_sigterm:
            trainer.save_checkpoint(checkpoint_folder(trainer) / "last.ckpt")


def checkpoint_folder(trainer: Trainer) -> Path:
    """The folder of the run's first ModelCheckpoint, else ``checkpoints`` in the run's folder."""
    callback = trainer.checkpoint_callback
    if isinstance(callback, ModelCheckpoint) and callback.dirpath:
        return Path(callback.dirpath)
    return save_folder(trainer) / "checkpoints"
