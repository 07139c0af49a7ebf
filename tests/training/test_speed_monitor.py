"""Figures of speed against the clock and counts made another way."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import instantiate_module
from lightning.pytorch.loggers import CSVLogger
from torch.utils.flop_counter import FlopCounterMode

from salad_lightning.data.format import decode, read_shard
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.packing import collate
from salad_lightning.registry import load_all
from salad_lightning.testing.runs import TinyRun, TinyWorld
from salad_lightning.testing.tiny import save_tiny_llm
from salad_lightning.training.speech_llm_module import SpeechLLMModule
from salad_lightning.training.speed_monitor import SpeedMonitor, Work, count_parameters, peak_flops_per_second

FIGURES = ("tokens_per_second", "audio_seconds_per_second", "padding_share", "data_wait_share", "peak_memory_gib")


@pytest.fixture(scope="module")
def run(world):
    return world.run(
        "fit",
        "speed",
        "--trainer.max_steps=12",
        "--trainer.log_every_n_steps=4",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.val_check_interval=8",
        "--trainer.limit_val_batches=1",
        "--trainer.callbacks+=SpeedMonitor",
        "--trainer.callbacks.peak_teraflops=0.1",
        "--trainer.callbacks.profile_steps=2",
    )


def test_figures_once_an_interval(run):
    rows = [row for row in run.metrics() if "train/mfu" in row]
    assert [row["step"] for row in rows] == [3, 7, 11]  # as Lightning counts its own rows
    for name in FIGURES:
        assert all(row[f"train/{name}"] >= 0 for row in rows), name
    for row in rows:
        assert row["train/padding_share"] < 0.6
        assert row["train/data_wait_share"] < 1
        assert 0 < row["train/mfu"] < 1
        assert 0.1 < row["train/peak_memory_gib"] < 16
        # Both are rates over the same seconds: 8 micro-batches of 2 rows of 128 positions, padding apart.
        assert row["train/tokens_per_second"] > 0
    assert run.results("fit.json")["tokens"] == rows[-1]["train/tokens"]


def test_rates_are_those_of_the_interval(run):
    """Tokens between two rows ÷ tokens per second, added up, is no more than the run took."""
    rows = [row for row in run.metrics() if "train/mfu" in row]
    tokens = [0.0, *(row["train/tokens"] for row in rows)]
    seconds = sum((tokens[i + 1] - tokens[i]) / row["train/tokens_per_second"] for i, row in enumerate(rows))
    assert 0.3 * run.results("fit.json")["seconds"] < seconds <= run.results("fit.json")["seconds"]


def test_the_profile_is_a_trace_of_the_steps_asked_for(run):
    events = json.loads((run.folder / "profile.json").read_text())["traceEvents"]
    steps = [event for event in events if str(event.get("name", "")).startswith("Optimizer.step")]
    assert len(steps) == 2


def test_what_was_half_written_has_no_name(tmp_path, monkeypatch):
    def cut_off(path):
        Path(path).write_bytes(b"{")
        raise OSError("the disk is full")

    trainer = SimpleNamespace(default_root_dir=tmp_path, is_global_zero=True, global_step=3, fast_dev_run=False)
    monitor = SpeedMonitor()
    monitor._profiler = SimpleNamespace(stop=lambda: None, export_chrome_trace=cut_off)
    with pytest.raises(OSError, match="full"):
        monitor._stop_profile(trainer)
    monkeypatch.setattr(Path, "write_text", lambda path, *_, **__: cut_off(path))
    with pytest.raises(OSError, match="full"):
        SpeechLLMModule.on_fit_end(SimpleNamespace(trainer=trainer, parameters=list, _started=0.0, seen={}))
    assert all(path.suffix == ".part" for path in tmp_path.iterdir())


class Slow:
    """A loader that makes the model wait."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for batch in self.batches:
            time.sleep(0.2)
            yield batch


def build(world):
    settings = yaml.safe_load(world.config.read_text())["model"]["init_args"]
    load_all()
    return instantiate_module(SpeechLLMModule, settings)


@pytest.fixture(scope="module")
def documents(world):
    spec = build(world).sequence_spec()
    builder = InterleaveDocuments(text_words=(1, 4), speech_words=(2, 5))
    samples = [raw for path in sorted((world.folder / "speech").glob("*.tar")) for raw in read_shard(str(path))]
    utterances = [decode(raw, source="speech", sample_rate_hz=16_000) for raw in samples[:12]]
    return [document for utterance in utterances for document in builder.build(utterance, spec)]


@pytest.fixture(scope="module")
def batches(documents):
    rows = [[documents[2 * i], documents[2 * i + 1]] for i in range(4)]
    return [collate([row], context=128, rows_per_batch=1, trim=True) for row in rows]


def test_waiting_for_data_is_seen(world, batches, tmp_path):
    monitor = SpeedMonitor(peak_teraflops=1.0)
    trainer = Trainer(
        accelerator="cpu", max_steps=3, max_epochs=-1, logger=CSVLogger(tmp_path, name="logs"), log_every_n_steps=3,
        callbacks=[monitor], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(build(world), Slow(batches))
    (share,) = TinyRun(tmp_path).column("train/data_wait_share")
    (rate,) = TinyRun(tmp_path).column("train/tokens_per_second")
    # Lightning draws one batch ahead, before the clock starts: three steps wait for at least two more.
    assert share > 0.3
    assert rate < sum(batch.num_positions for batch in batches[:3]) / 0.4


def test_work_is_counted_as_a_loop_counts(batches):
    batch = batches[0]
    positions = context = 0
    for ids, places in zip(batch.document_ids_BS.tolist(), batch.position_ids_BS.tolist(), strict=True):
        for document, place in zip(ids, places, strict=True):
            positions += document >= 0
            context += (place + 1) if document >= 0 else 0
    work = Work.of(batch)
    assert (work.positions, work.context) == (positions, context)
    assert work.positions == batch.num_positions
    assert work.predicted == len(batch.labels_M)
    assert work.speech_positions == sum(batch.span_num_positions_K.tolist())
    assert work.samples == sum(batch.clip_lengths_N.tolist())


def test_flops_are_those_that_torch_counts(world, documents, tmp_path):
    """One document of one span, so that nothing is padded, and a language model that outweighs the connector."""
    document = next(document for document in documents if len(document.spans) == 1)
    settings = yaml.safe_load(world.config.read_text())
    settings["model"]["init_args"]["llm"] = str(save_tiny_llm(tmp_path / "llm", width=256))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    module = build(TinyWorld(tmp_path))
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.configure_model()
    batch = collate([[document]], context=128, rows_per_batch=1, trim=True)
    with FlopCounterMode(display=False) as counter:
        module.compute_loss(batch).sum.backward()
    # Torch does not count the looking up of embeddings, nor, on a CPU, the attention's two products.
    assert module.flops(Work.of(batch)) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_parameters_are_counted_once():
    tied = torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False), torch.nn.Linear(3, 5, bias=False))
    tied[1].weight = tied[0].weight
    assert count_parameters(tied) == 15
    tied[0].weight.requires_grad_(False)
    assert count_parameters(tied, trained=True) == 0


def test_no_peak_is_known_of_a_cpu():
    assert peak_flops_per_second(torch.device("cpu")) is None


@pytest.mark.parametrize("bad", [{"peak_teraflops": 0.0}, {"profile_steps": -1}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="positive"):
        SpeedMonitor(**bad)
