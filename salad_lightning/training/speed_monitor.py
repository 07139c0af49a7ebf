"""How fast a run is, from counts and the clock of the host: nothing here waits for the device."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from salad_lightning.batch import SpeechBatch
from salad_lightning.model.llm import LanguageModel
from salad_lightning.training.cost import GIB, TransformerSize, model_flops_utilisation

__all__ = ["SpeedMonitor", "Work", "count_parameters", "peak_flops_per_second", "size_of", "trained_share"]

# Dense bf16 peaks by the start of the device's name, longer names first: https://www.nvidia.com/en-us/data-center/
_PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
}
# Steps before a profile begins: compilation, allocation and the loader's start are over by then.
_PROFILE_AFTER = 5


class Work(NamedTuple):
    """What a micro-batch asks of the model, counted on the host.

    Attributes:
        positions: Of student rows, padding excluded.
        room: Of student rows, padding included.
        predicted: Tokens that the heads are applied to.
        context: Positions seen, summed over ``positions``: each sees its own document up to itself.
        teacher_positions: Of teacher rows, padding excluded.
        teacher_context: As ``context``, of teacher rows.
        speech_positions: Of student rows, filled by the connector.
        samples: Of audio that the encoder reads; none of pre-encoded speech.
    """

    positions: int = 0
    room: int = 0
    predicted: int = 0
    context: int = 0
    teacher_positions: int = 0
    teacher_context: int = 0
    speech_positions: int = 0
    samples: int = 0

    @classmethod
    def of(cls, batch: SpeechBatch) -> Work:
        """Count a batch that is still on the host; on a device this would wait for it."""
        real_BS, real_RU = batch.document_ids_BS >= 0, batch.teacher_document_ids_RU >= 0
        return cls(
            positions=int(real_BS.sum()),
            room=real_BS.numel(),
            predicted=batch.num_predicted,
            context=int(((batch.position_ids_BS + 1) * real_BS).sum()),
            teacher_positions=int(real_RU.sum()),
            teacher_context=int(((batch.teacher_position_ids_RU + 1) * real_RU).sum()),
            speech_positions=int(batch.span_num_positions_K.sum()),
            samples=int(batch.clip_lengths_N.sum()),
        )


class _Measured(Protocol):
    """What a module must tell."""

    work: Work  # of the micro-batch at hand
    seen: dict[str, float]  # over the whole run, all processes

    def flops(self, work: Work) -> float:
        """Operations the micro-batch needs; 0 where they are not known."""


class SpeedMonitor(Callback):
    """Logs, every ``log_every_n_steps`` optimizer steps, over the steps since the last time:

    ======================== ==================================================================================
    tokens_per_second        positions of all processes, text tokens and speech together, padding excluded
    audio_seconds_per_second speech of all processes
    padding_share            of the student's positions, 0 to 1
    data_wait_share          of the time, in which this process had no batch to train on, 0 to 1
    mfu                      model FLOPs utilisation, see `TokenLossModule.flops` and `training.cost`:
                             flops needed ÷ (seconds · peak flops of one device), as if all processes did as much as
                             this one; recomputed activations count nothing
    peak_memory_gib          of the device since the start of the run (CPU: of this process)
    tokens, audio_seconds    totals of the run
    ======================== ==================================================================================

    Validation and the writing of checkpoints are left out of the time. Kernels run behind the host, so the figures of
    a single step are rough; those of an interval are exact but for the kernels in flight at its ends. Every training
    module of this package brings one along; list it in ``trainer.callbacks`` to change an argument.

    Args:
        peak_teraflops: Dense peak of one device in the dtype of the matrix products. By default that of bf16 for the
            GPUs known here; without one there is no ``mfu``.
        profile_steps: Trace so many optimizer steps of rank 0 with torch.profiler, after a few to warm up, into
            ``profile.json`` in the run's folder (for https://ui.perfetto.dev). 0 is off.

    Raises:
        ValueError: If an argument is negative.
    """  # noqa: D415

    def __init__(self, peak_teraflops: float | None = None, profile_steps: int = 0) -> None:
        if profile_steps < 0 or (peak_teraflops is not None and peak_teraflops <= 0):
            raise ValueError("peak_teraflops must be positive and profile_steps at least 0")
        self._given_peak, self._profile_steps = peak_teraflops, profile_steps
        self._peak: float | None = None
        self._profiler: torch.profiler.profile | None = None
        self._profile_from = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        device = pl_module.device
        self._peak = self._given_peak * 1e12 if self._given_peak else peak_flops_per_second(device)
        self._logged_step = trainer.global_step
        self._profile_from = trainer.global_step + _PROFILE_AFTER
        self._begin(pl_module)

    def _begin(self, module: Any) -> None:
        """Forget the interval."""
        self._seconds = self._waited = self._flops = 0.0
        self._positions = self._room = 0
        self._seen = dict(module.seen)
        self._idle_since: float | None = time.perf_counter()
        self._busy_since = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A batch is there: the wait is over."""
        self._busy_since = time.perf_counter()
        if self._idle_since is not None:
            self._waited += self._busy_since - self._idle_since
            self._seconds += self._busy_since - self._idle_since
        if self._profile_steps and trainer.global_step == self._profile_from and self._profiler is None:
            self._start_profile(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the micro-batch up; log where an interval ends."""
        self._idle_since = time.perf_counter()
        self._seconds += self._idle_since - self._busy_since
        module: _Measured = pl_module  # type: ignore[assignment]
        self._positions += module.work.positions
        self._room += module.work.room
        self._flops += module.flops(module.work)
        step = trainer.global_step
        if self._profiler is not None and step >= self._profile_from + self._profile_steps:
            self._stop_profile(trainer)
        # Under accumulation, several micro-batches end at the same step.
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and step > self._logged_step and step % every == 0:
            self._log(trainer, module)
            self._logged_step = step
            self._begin(module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What follows is no waiting for data."""
        self._idle_since = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to training."""
        self._idle_since = time.perf_counter()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What follows is no waiting for data."""
        self._idle_since = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A profile that the run was too short for is still written."""
        if self._profiler is not None:
            self._stop_profile(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no profiler behind."""
        if self._profiler is not None:
            self._profiler.stop()

    def _log(self, trainer: Trainer, module: _Measured) -> None:
        seconds = max(self._seconds, 1e-9)
        values = {
            "tokens_per_second": (module.seen["tokens"] - self._seen["tokens"]) / seconds,
            "audio_seconds_per_second": (module.seen["audio_seconds"] - self._seen["audio_seconds"]) / seconds,
            "padding_share": 1 - self._positions / max(self._room, 1),
            "data_wait_share": self._waited / seconds,
            "peak_memory_gib": _peak_memory(trainer.strategy.root_device) / GIB,
            **module.seen,
        }
        if self._peak and self._flops:
            values["mfu"] = model_flops_utilisation(self._flops, seconds, self._peak)
        # Not self.log, which makes a tensor of every figure on the device and waits for it. The step is that of
        # Lightning's own rows: the first is 0.
        for logger in trainer.loggers:
            logger.log_metrics({f"train/{name}": value for name, value in values.items()}, step=trainer.global_step - 1)

    def _start_profile(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            self._profiler = torch.profiler.profile(record_shapes=True)
            self._profiler.start()

    def _stop_profile(self, trainer: Trainer) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        path = Path(trainer.default_root_dir) / "profile.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.part")
        self._profiler.export_chrome_trace(str(aside))
        os.replace(aside, path)
        self._profiler, self._profile_steps = None, 0


def count_parameters(module: nn.Module, *, trained: bool = False) -> int:
    """Parameters of a module: sharded ones in full, quantised ones as they were, shared ones once.

    Args:
        module: Any.
        trained: Count only those that are.
    """
    total = 0
    for parameter in module.parameters():
        if parameter.requires_grad or not trained:
            state = getattr(parameter, "quant_state", None)  # 4-bit weights of bitsandbytes: two in a byte
            total += parameter.numel() if state is None else int(torch.Size(state.shape).numel())
    return total


def trained_share(module: nn.Module) -> float:
    """Share of a module's parameters that is trained, 0 to 1."""
    return count_parameters(module, trained=True) / max(count_parameters(module), 1)


def size_of(llm: LanguageModel) -> TransformerSize:
    """The counts that a language model's cost depends on."""
    config: Any = llm.hf.config.get_text_config()
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or llm.dim // heads
    return TransformerSize(
        parameters=count_parameters(llm),
        vocab_size=int(config.vocab_size),
        dim=llm.dim,
        num_layers=len(llm.blocks),
        attention_dim=heads * int(head_dim),
        tied=bool(config.tie_word_embeddings),
    )


def peak_flops_per_second(device: torch.device) -> float | None:
    """Dense bf16 peak of a GPU by its name; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((_PEAK_FLOPS[known] for known in sorted(_PEAK_FLOPS, key=len, reverse=True) if name.startswith(known)),
                None)  # fmt: skip


def _peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
