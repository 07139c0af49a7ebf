"""Between two rows of the log, a training run reads nothing back from the device, so the host runs ahead of a GPU."""

from __future__ import annotations

from lightning.pytorch import Callback

from salad_lightning.testing.device_reads import DeviceReads
from salad_lightning.training.speech_llm_module import SpeechLLMModule

# What still is on the host, or always: batches before their transfer.
ON_THE_HOST = ("salad_lightning/data/", "on_before_batch_transfer")


class Watch(Callback):
    """Reads by optimizer step, from the start of a batch to that of the next."""

    def __init__(self):
        self.steps, self.reads = {}, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.stop()
        self.reads = DeviceReads()
        self.steps.setdefault(trainer.global_step, []).append(self.reads)
        self.reads.__enter__()

    def on_train_end(self, trainer, pl_module):
        self.stop()

    def stop(self):
        if self.reads is not None:
            self.reads.__exit__(None, None, None)
            self.reads = None


def test_no_step_between_two_rows_of_the_log_waits_for_the_device(world, monkeypatch):
    watch, callbacks = Watch(), SpeechLLMModule.configure_callbacks
    monkeypatch.setattr(SpeechLLMModule, "configure_callbacks", lambda module: [*callbacks(module), watch])
    options = [
        "--trainer.max_steps=12",
        "--trainer.log_every_n_steps=5",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.enable_progress_bar=true",
        "--trainer.gradient_clip_val=1.0",
        "--trainer.val_check_interval=100",
        "--model.gap_every_n_steps=0",
        "--model.optimizer=torch.optim.AdamW",
        "--model.optimizer.fused=true",  # else a CPU's counts its steps in tensors on the host
    ]
    world.run("fit", "reads", *options)
    reads = {
        step: [read for part in parts for read in part.found if not any(place in read for place in ON_THE_HOST)]
        for step, parts in watch.steps.items()
    }
    assert len(reads) == 12
    reads.pop(0)  # filters and windows are made once
    assert {step for step, found in reads.items() if found} == {4, 9}, reads
