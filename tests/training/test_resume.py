"""Killed at any step and resumed through the command line: the samples are those of the unbroken run, in order.

Processes of their own cost seconds, so these are the corners of the matrix; `tests/data/test_stream.py` has all of it
for the stream alone.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch

from salad_lightning.cli import main
from salad_lightning.testing.runs import TinyRun

pytestmark = pytest.mark.slow
STEPS = 10
OPTIONS = [
    f"--trainer.max_steps={STEPS}",
    "--data.shuffle_block=6",
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=2",
    "--trainer.callbacks.save_last=true",
]
KEY_LOG = '''
import json, os, signal
from pathlib import Path
from lightning.pytorch import Callback


class KeyLog(Callback):
    """Notes what every process trained on at each step; ends all processes of the run at once, the hard way."""

    def __init__(self, kill_at: int = -1):
        self.kill_at = kill_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.kill_at and trainer.global_rank == 0:
            os.killpg(os.getpgrp(), signal.SIGKILL)
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # Labels tell which words of a sample are heard.
        entry = [self.step, [info.key for info in batch.documents], batch.labels_M.tolist()]
        with (Path(trainer.default_root_dir) / f"keys-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\\n")


class SaveAndEnd(Callback):
    """Saves at some moment of a micro-batch, as by the clock or by a signal, and ends the run the hard way."""

    def __init__(self, moment: str, batch: int):
        def end(trainer, *_):
            if trainer.fit_loop.epoch_loop.batch_idx == batch:
                trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
                os.killpg(os.getpgrp(), signal.SIGKILL)

        setattr(self, moment, end)
'''


@pytest.fixture(scope="module", autouse=True)
def key_log(world):
    """The callback, where both this process and others import it from."""
    (world.folder / "key_log.py").write_text(KEY_LOG)
    sys.path.insert(0, str(world.folder))
    yield
    sys.path.remove(str(world.folder))


def fit(world, name, *options, kill_at=-1):
    """Run in a process group of its own; returns the exit code and what was printed."""
    logging = ["--trainer.callbacks+=key_log.KeyLog", f"--trainer.callbacks.kill_at={kill_at}"]
    command = [sys.executable, "-m", "salad_lightning", *world.arguments("fit", name, *OPTIONS, *options, *logging)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with (world.folder / f"{name}.txt").open("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=world.folder, start_new_session=True
        )
        code = process.wait(timeout=240)
        output.seek(0)
        return code, output.read()


def trained_on(world, name, rank):
    """Every entry of a process's log, in order."""
    return [json.loads(line) for line in (world.folder / name / f"keys-{rank}.jsonl").read_text().splitlines()]


def half_packed(state):
    """Whether documents had been drawn before one that was still waiting for its row."""
    return any(worker["done"] for rank in state["ranks"].values() for worker in rank["workers"].values())


@pytest.mark.parametrize(("workers", "ranks", "kills"), [(0, 1, [5]), (4, 1, [3, 8]), (1, 2, [7])])
def test_the_samples_of_the_unbroken_run_in_order(world, workers, ranks, kills):
    options = [f"--data.num_workers={workers}", f"--trainer.devices={ranks}"]
    whole, broken = f"whole-{workers}-{ranks}", f"broken-{workers}-{ranks}"
    if ranks == 1:
        assert main(world.arguments("fit", whole, *OPTIONS, *options, "--trainer.callbacks+=key_log.KeyLog")) == 0
    else:
        code, printed = fit(world, whole, *options)
        assert code == 0, printed[-3000:]

    starts, resume, halves = [0], [], []
    for kill in kills:
        code, printed = fit(world, broken, *options, *resume, kill_at=kill)
        assert code == -signal.SIGKILL, printed[-3000:]
        checkpoint = TinyRun(world.folder / broken).checkpoint()
        assert checkpoint["global_step"] == kill - kill % 2  # the last that was saved
        starts.append(checkpoint["global_step"])
        state = checkpoint["SpeechDataModule"]
        halves.append(half_packed(state))
        assert len(json.dumps(state)) < 1_000_000 * ranks
        resume = ["--ckpt_path=last"]
    code, printed = fit(world, broken, *options, *resume)
    assert code == 0, printed[-3000:]
    assert any(halves)

    for rank in range(ranks):
        expected = trained_on(world, whole, rank)
        assert [step for step, _, _ in expected] == list(range(STEPS))
        read = trained_on(world, broken, rank)
        runs = zip(starts, [*kills, STEPS], strict=True)
        assert read == [expected[step] for start, stop in runs for step in range(start, stop)]
    if ranks == 2:  # each its own share
        assert trained_on(world, whole, 0) != trained_on(world, whole, 1)


def test_another_number_of_workers_only_where_it_is_allowed(world, capfd, caplog):
    one_row = "--data.rows_per_batch=1"  # less than an epoch is read
    code, printed = fit(world, "resharded", "--data.num_workers=2", one_row, kill_at=6)
    assert code == -signal.SIGKILL, printed[-3000:]
    before = trained_on(world, "resharded", 0)
    other = world.arguments("fit", "resharded", *OPTIONS, one_row, "--data.num_workers=1", "--ckpt_path=last")
    assert main(other) == 2
    assert "set `data.allow_reshard: true`" in capfd.readouterr().err
    assert main([*other, "--data.allow_reshard=true", "--trainer.callbacks+=key_log.KeyLog"]) == 0
    assert "goes on with 1 × 1 readers (processes × workers) in place of 1 × 2" in caplog.text
    again = re.search(r"once more, at most: (\d+) of 'speech', (\d+) of 'text'", caplog.text)
    after = trained_on(world, "resharded", 0)[len(before) :]
    assert [step for step, _, _ in after] == list(range(6, STEPS))
    counts = Counter(key for _, keys, _ in before + after for key in keys)
    assert max(counts.values()) <= 2
    for source, most in zip(("speech", "text"), again.groups(), strict=True):
        assert 0 < sum(count - 1 for key, count in counts.items() if key.startswith(source)) <= int(most)


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint_before(world, capfd):
    """A limit on the size of files stands in for the disk: the write itself fails in either case."""
    options = [*OPTIONS, "--trainer.max_steps=2"]
    assert main(world.arguments("fit", "full", *options)) == 0
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = main(world.arguments("fit", "full", *options, "--trainer.max_steps=6", "--ckpt_path=last"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 2
    assert "the checkpoint cannot be written (File too large)" in capfd.readouterr().err
    run = TinyRun(world.folder / "full")
    assert run.checkpoint()["global_step"] == 2
    assert not list(run.folder.rglob("*.part"))


class _Harm:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("option", ["--ckpt_path", "--model.init_from"])
@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_runs_no_code(world, tmp_path, capfd, subcommand, option):
    torch.save({"state_dict": {}, "extra": _Harm(tmp_path / "harm")}, tmp_path / "x.ckpt")
    code = main(world.arguments(subcommand, "harmed", f"{option}={tmp_path / 'x.ckpt'}"))
    assert not (tmp_path / "harm").exists()
    assert code == 2
    assert "the checkpoint cannot be read" in capfd.readouterr().err


ACCUMULATED = ["--trainer.accumulate_grad_batches=3", "--trainer.max_steps=4", "--trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def accumulated(world):
    """An unbroken run of micro-batches."""
    options = ["--data.num_workers=2", *ACCUMULATED, "--trainer.callbacks+=key_log.KeyLog"]
    assert main(world.arguments("fit", "accumulated", *OPTIONS, *options)) == 0
    return TinyRun(world.folder / "accumulated")


@pytest.mark.parametrize(
    ("moment", "batch", "steps"),
    [
        ("on_train_batch_end", 1, 0),  # of 0 to 11: before the first step
        ("on_train_batch_end", 6, 2),
        ("on_train_batch_end", 7, 2),
        ("on_train_batch_end", 8, 3),  # the step has just been taken
        ("on_train_batch_start", 7, 2),
        ("on_train_batch_start", 9, 3),
        ("on_before_backward", 7, 2),
        ("on_before_optimizer_step", 8, 2),
    ],
)
def test_saved_within_a_step(world, accumulated, moment, batch, steps):
    """The clock and signals ask for checkpoints at any micro-batch; the step at hand is then begun anew."""
    name = f"{moment}-{batch}"
    saving = ["--trainer.callbacks+=key_log.SaveAndEnd", f"--trainer.callbacks.moment={moment}",
              f"--trainer.callbacks.batch={batch}"]  # fmt: skip
    options = ["--data.num_workers=2", *ACCUMULATED]
    code, printed = fit(world, name, *options, *saving)
    assert code == -signal.SIGKILL, printed[-3000:]
    run = TinyRun(world.folder / name)
    checkpoint = run.checkpoint()
    assert checkpoint["global_step"] == steps
    read = len(trained_on(world, name, 0))
    arguments = world.arguments(
        "fit", name, *OPTIONS, *options, "--ckpt_path=last", "--trainer.callbacks+=key_log.KeyLog"
    )
    assert main(arguments) == 0

    expected = trained_on(world, "accumulated", 0)
    assert [step for step, _, _ in expected] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert trained_on(world, name, 0)[read:] == expected[3 * steps :]
    rows = [row for row in run.metrics() if "train/loss" in row][-(4 - steps) :]
    whole = [row for row in accumulated.metrics() if "train/loss" in row][steps:]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(row["step"], row["train/loss"]) for row in whole]
    assert run.results("fit.json")["tokens"] == accumulated.results("fit.json")["tokens"]
