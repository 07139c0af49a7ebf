"""What all training modules of this package share: global normalisation, two-rate optimizer, schedule, throughput."""

from __future__ import annotations

import fnmatch
import json
import os
import pickle
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from salad_lightning.batch import ObjectiveOutput, SpeechBatch
from salad_lightning.corpus.workspace import write_aside
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.errors import UserError
from salad_lightning.model.checkpoint_folder import is_checkpoint_folder, older_checkpoint, read_whole
from salad_lightning.model.parallel import check_device, compute_dtype
from salad_lightning.training.schedule import WarmupStableDecay
from salad_lightning.training.speed_monitor import SpeedMonitor, Work

__all__ = [
    "AtomicCheckpointIO",
    "TokenLossModule",
    "check_outline",
    "check_trained",
    "default_optimizer",
    "load_checkpoint",
    "save_folder",
]


def default_optimizer(parameters: Iterable[Any], *, fused: bool | None = None) -> torch.optim.Optimizer:
    """AdamW with weight decay 0.1 (arXiv 2510.13632, section 4) and betas (0.9, 0.95).

    Args:
        parameters: Or groups of them, which bring their rates along.
        fused: Whether one kernel does the step, which moves a third of the bytes; by default on a GPU.
    """
    groups = list(parameters)
    if fused is None:
        members = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
        fused = bool(members) and all(p.is_cuda for p in members)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=fused or None)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint aside and renames it: a run killed meanwhile leaves nothing half-written in its place."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save to ``path`` + ``.part``, then rename.

        Raises:
            UserError: If the disk is full, or the place cannot be written to; what was half-written is removed.
        """
        aside = f"{path}.part"
        try:
            super().save_checkpoint(checkpoint, aside, storage_options)
            os.replace(aside, path)
        except OSError as error:
            Path(aside).unlink(missing_ok=True)
            raise UserError(
                f"the checkpoint cannot be written ({error.strerror or error})",
                where=str(path),
                cure="make room, then go on from the one before with --ckpt_path=last",
            ) from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load, with one message where the file is missing or damaged."""
        return load_checkpoint(path, weights_only=bool(weights_only))


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
        if note_trained := getattr(self.trainer.datamodule, "note_trained", None):  # type: ignore[attr-defined]
            note_trained(batch)
        self.seen["tokens"] += batch.num_positions * self.trainer.world_size
        self.seen["audio_seconds"] += batch.audio_seconds * self.trainer.world_size
        return output.sum

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
        """Leave frozen weights out that are found where they were loaded from, and note their names."""
        frozen = self.left_out()
        for name in list(checkpoint["state_dict"]):
            if _is_of(frozen, name):
                del checkpoint["state_dict"][name]
        checkpoint["salad_lightning"] = {
            "frozen": sorted(frozen),
            "trained": _trained_names(self),
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
        _compare_weights(self.state_dict(), checkpoint, where, self.frozen_names())

    def frozen_names(self) -> set[str]:
        """State-dict names of all frozen parameters, and of the buffers beside them in wholly frozen modules."""
        return _frozen_names(self)

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
        self._started = time.perf_counter()

    def on_train_start(self) -> None:
        """Step as this machine does, whichever wrote the optimizer's state."""
        for optimizer in self.trainer.optimizers:
            _restore_fused(optimizer)

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


def check_outline(module: nn.Module, checkpoint: Mapping[str, Any], where: str) -> None:
    """Compare names and shapes of a checkpoint's weights with a module's, either of which may be on the meta device.

    Args:
        module: With the names that the checkpoint has.
        checkpoint: With ``state_dict``.
        where: Its path.

    Raises:
        UserError: If a weight is missing that was not frozen, unknown, or of another shape.
    """
    _compare_weights(module.state_dict(), checkpoint, where, _frozen_names(module))


def check_trained(module: nn.Module, checkpoint: Mapping[str, Any], where: str) -> None:
    """Compare what a checkpoint's optimizer has a state for with what a module trains.

    Args:
        module: With the names that the checkpoint has.
        checkpoint: Of a `TokenLossModule`; others pass.
        where: Its path.

    Raises:
        UserError: If they differ.
    """
    ours = _trained_names(module)
    theirs = checkpoint.get("salad_lightning", {}).get("trained", ours)
    if different := sorted(set(ours) ^ set(theirs)):
        was, has = ("was not", "is") if different[0] in ours else ("was", "is not")
        raise UserError(
            f"{different[0]} {has} trained here and {was} there ({len(different)} such weights)",
            where=where,
            cure="set model.freeze as in that run, or start from its weights: model.init_from",
        )


def _trained_names(module: nn.Module) -> list[str]:
    return sorted(name for name, parameter in module.named_parameters() if parameter.requires_grad)


def _compare_weights(ours: Mapping[str, Any], checkpoint: Mapping[str, Any], where: str, frozen: set[str]) -> None:
    theirs = checkpoint["state_dict"]
    frozen = frozen | set(checkpoint.get("salad_lightning", {}).get("frozen", ()))
    missing = sorted(name for name in set(ours) - set(theirs) if not _is_of(frozen, name))
    unknown = sorted(set(theirs) - set(ours))
    shapes = [f"{n} {tuple(theirs[n].shape)} here {tuple(ours[n].shape)}" for n in theirs if n in ours
              and theirs[n].shape != ours[n].shape]  # fmt: skip
    for label, names in (("lacks", missing), ("has the unknown weight", unknown), ("has another shape:", shapes)):
        if names:
            raise UserError(
                f"the weights do not fit this model: it {label} {names[0]} ({len(names)} in all)",
                where=where,
                cure="use the same llm, encoder and connector as the run that wrote it",
            )


def _is_of(frozen: set[str], name: str) -> bool:
    """Whether a state-dict entry is a frozen weight, or belongs to one: the scales of a 4-bit one are entries below."""
    return name in frozen or (".weight." in name and name[: name.index(".weight.")] + ".weight" in frozen)


def _frozen_names(module: nn.Module) -> set[str]:
    frozen = {name for name, parameter in module.named_parameters(remove_duplicate=False)
              if not parameter.requires_grad}  # fmt: skip
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name, _ in module.named_buffers():
        owner = ".".join(name.split(".")[:2])
        if not fnmatch.filter(trained, f"{owner}.*"):
            frozen.add(name)
    return frozen


def _restore_fused(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer be fused as it was made: loading its state brings the setting of the machine that wrote it."""
    fused = optimizer.defaults.get("fused")
    for group in optimizer.param_groups:
        if group.get("fused") == fused or group.get("capturable"):
            continue
        group["fused"] = fused
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                # Elsewhere it would be read back from the device, for each parameter in each step.
                state["step"] = state["step"].to(parameter.device if fused else "cpu")


def _check_trainer(trainer: Any) -> None:
    problem = ""
    if trainer.max_steps < 1:
        problem = "trainer.max_steps is not set"
    elif isinstance(trainer.limit_train_batches, float) and trainer.limit_train_batches != 1.0:
        problem = "trainer.limit_train_batches is a fraction of an endless stream"
    if problem:
        raise UserError(
            problem,
            where="trainer",
            cure="training data is an endless stream: set trainer.max_steps (and max_epochs: -1), "
            "limit_train_batches to a whole number of batches if at all",
        )


def load_checkpoint(path: str | os.PathLike[str], *, weights_only: bool, outline: bool = False) -> dict[str, Any]:
    """A checkpoint, in one file or sharded, on the CPU.

    Args:
        path: The file or folder.
        weights_only: Refuse anything but plain data, which could run code.
        outline: For names, shapes and settings alone: weights are left on disk until they are looked at, or are on the
            meta device.

    Raises:
        UserError: If there is no such file, or it is no checkpoint.
    """
    where, cure = str(path), older_checkpoint(path) or "give the path of a .ckpt file that a run has written"
    if is_checkpoint_folder(path):
        return read_whole(path, weights_only=weights_only, outline=outline)
    try:
        content = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=outline)
    except FileNotFoundError as error:
        raise UserError("no such checkpoint", where=where, cure=cure) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, IsADirectoryError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"the checkpoint cannot be read ({first})", where=where, cure=cure) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError("the file holds no checkpoint", where=where, cure=cure)
    return content


def save_folder(trainer: Any) -> Path:
    """Where this run writes its results and checkpoints."""
    return Path(trainer.default_root_dir)
