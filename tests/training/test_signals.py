"""Told to stop at any moment, one process or several: all end together, and the run goes on where it stood."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from salad_lightning.cli import main
from salad_lightning.testing.ranks import start_ranks
from salad_lightning.testing.runs import TinyRun

pytestmark = pytest.mark.slow
OPTIONS = [
    "--trainer.max_steps=5",
    "--trainer.accumulate_grad_batches=3",
    "--trainer.log_every_n_steps=1",
    "--trainer.val_check_interval=6",
    "--data.rows_per_batch=1",
    "--trainer.callbacks+=SigtermCheckpoint",
]
MODULE = '''
import os, signal
from lightning.pytorch import Callback


class Tell(Callback):
    """Sends its own process a signal."""

    def __init__(self, number: int, moment: str, batch: int, ranks: list[int]):
        def tell(trainer, *_):
            at = trainer.fit_loop.epoch_loop.batch_idx
            if at == batch and trainer.global_rank in ranks and not trainer.sanity_checking and not self.told:
                self.told = True
                os.kill(os.getpid(), number)

        self.told = False
        setattr(self, moment, tell)
'''


@pytest.fixture(scope="module", autouse=True)
def tell(world):
    (world.folder / "tell.py").write_text(MODULE)


def options(number, moment, batch, ranks=(0,)):
    values = {"number": int(number), "moment": moment, "batch": batch, "ranks": list(ranks)}
    return ["--trainer.callbacks+=tell.Tell", *(f"--trainer.callbacks.{key}={value}" for key, value in values.items())]


def start(world, name, count, *more):
    """Exit codes of the run's processes."""
    arguments = world.arguments("fit", name, *OPTIONS, f"--trainer.devices={count}", *more)
    if count > 1:
        arguments.append("--trainer.strategy=ddp")
    # A shell's background job ignores Ctrl-C, and so would the child of tests that run in one.
    run = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from salad_lightning.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    processes = start_ranks(world.folder, count, "-c", run, *arguments, name=name)
    try:
        return [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def unbroken(world):
    runs = {}
    for count in (1, 2):
        assert start(world, f"unbroken{count}", count) == [0] * count
        runs[count] = TinyRun(world.folder / f"unbroken{count}")
    return runs


def assert_same_end(ours, theirs, steps):
    """Losses and validations of the steps that were left, and what was seen in all."""
    for name in ("train/loss", "val/speech/nll"):
        expected = {row["step"]: row[name] for row in theirs.metrics() if name in row}
        found = [(row["step"], row[name]) for row in ours.metrics() if name in row]
        assert dict(found) == pytest.approx(expected, rel=1e-5), name
        assert len(found) - len(expected) in (0, 1), name  # the step that was broken off may be there twice
    assert [row["step"] for row in ours.metrics() if "train/loss" in row][-(5 - steps) :] == list(range(steps, 5))
    for name in ("tokens", "audio_seconds"):
        assert ours.results("fit.json")[name] == pytest.approx(theirs.results("fit.json")[name])


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)])
def test_several_processes_end_together(world, unbroken, ranks):
    """Schedulers tell all of them, not at once; people tell one. Lightning alone hangs, or ends without saving."""
    name = f"told{ranks}"
    codes = start(world, name, 2, *options(signal.SIGTERM, "on_before_backward", 7, ranks))
    logs = "\n".join((world.folder / f"{name}-{rank}.log").read_text()[-2000:] for rank in range(2))
    assert codes == [128 + signal.SIGTERM] * 2, logs
    assert TinyRun(world.folder / name).checkpoint()["global_step"] in (2, 3)
    steps = TinyRun(world.folder / name).checkpoint()["global_step"]
    assert start(world, name, 2, "--ckpt_path=last") == [0, 0]
    assert_same_end(TinyRun(world.folder / name), unbroken[2], steps)


@pytest.mark.parametrize(("count", "presses"), [(1, 1), (2, 1), (1, 2)])
def test_ctrl_c(world, unbroken, count, presses):
    """In a terminal all processes of a run get it."""
    name = f"interrupted{count}{presses}"
    told = [line for _ in range(presses) for line in options(signal.SIGINT, "on_before_backward", 7, range(count))]
    codes = start(world, name, count, *told)
    logs = "\n".join((world.folder / f"{name}-{rank}.log").read_text()[-2000:] for rank in range(count))
    assert codes == [128 + signal.SIGINT] * count, logs
    assert "saving last.ckpt" in logs
    assert "Traceback" not in logs
    run = TinyRun(world.folder / name)
    if presses == 2:
        assert not (run.folder / "checkpoints" / "last.ckpt").exists()
        return
    steps = run.checkpoint()["global_step"]
    assert start(world, name, count, "--ckpt_path=last") == [0] * count
    assert_same_end(run, unbroken[count], steps)


@pytest.mark.parametrize(
    ("moment", "batch", "steps"), [("on_validation_batch_start", 5, 2), ("on_validation_end", 5, 2)]
)
def test_told_within_a_validation(world, unbroken, moment, batch, steps):
    """It may take longer than the time that is left, so it is broken off."""
    name = moment
    assert start(world, name, 1, *options(signal.SIGTERM, moment, batch)) == [128 + signal.SIGTERM]
    assert TinyRun(world.folder / name).checkpoint()["global_step"] == steps
    assert start(world, name, 1, "--ckpt_path=last") == [0]
    assert_same_end(TinyRun(world.folder / name), unbroken[1], steps)


@pytest.mark.parametrize("count", [1, 2])
def test_slurm_requeues(world, unbroken, count, monkeypatch, tmp_path):
    """The recipes' line: a signal before the time is over, then the same command once more."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nkill -TERM $PPID\n')  # as SLURM then does
    scontrol.chmod(0o755)
    name = f"slurm{count}"
    arguments = world.arguments("fit", name, *OPTIONS, f"--trainer.devices={count}", "--ckpt_path=last")
    if count > 1:
        arguments.append("--trainer.strategy=ddp")
    told = options(signal.SIGUSR1, "on_before_backward", 7, (count - 1,))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": str(count), "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0",
             "SLURM_NTASKS_PER_NODE": str(count), "PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_PORT": "31999",
             "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "salad_lightning", *arguments, *told],
            env=os.environ | slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            cwd=world.folder,
            stdout=(tmp_path / f"{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    printed = "\n".join((tmp_path / f"{rank}.log").read_text()[-3000:] for rank in range(count))
    assert codes == [128 + signal.SIGTERM] * count, printed
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    run = TinyRun(world.folder / name)
    assert len(list(run.folder.glob("hpc_ckpt_*.ckpt"))) == 1
    (run.folder / "checkpoints" / "last.ckpt").unlink()  # SLURM may leave no time for it
    (saved,) = run.folder.glob("hpc_ckpt_*.ckpt")
    steps = torch.load(saved, weights_only=True)["global_step"]
    assert steps in (2, 3)
    assert start(world, name, count, "--ckpt_path=last") == [0] * count
    assert_same_end(run, unbroken[count], steps)


def test_a_trial_leaves_the_real_run_alone(world, capsys):
    """fast_dev_run promises to keep nothing."""
    callbacks = [f"--trainer.callbacks+={name}" for name in ("PreDecayCheckpoint", "FinalCheckpoint")]
    run = world.run("fit", "real", *OPTIONS, *callbacks)
    world.run("test", "real")
    with pytest.warns(UserWarning, match="final.ckpt is of a finished run"):
        run = world.run("fit", "real", *OPTIONS, *callbacks)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    world.run("fit", "real", *OPTIONS, *callbacks, "--trainer.fast_dev_run=true")
    world.run("test", "real", "--trainer.fast_dev_run=true")
    assert before.keys() >= {run.folder / name for name in ("fit.json", "test.json", "checkpoints/final.ckpt")}
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_ends_early_keeps_where_it_stood(world):
    keep = [*OPTIONS, "--trainer.callbacks+=FinalCheckpoint"]
    run = world.run("fit", "early", *keep, "--trainer.max_steps=100000", "--trainer.max_time=00:00:00:02")
    steps = run.checkpoint()["global_step"]
    assert 0 < steps < 100_000
    assert not (run.folder / "checkpoints" / "final.ckpt").exists()
    world.run("fit", "early", *keep, f"--trainer.max_steps={steps + 2}", "--ckpt_path=last")
    assert run.checkpoint("final.ckpt")["global_step"] == steps + 2


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("trainer.overfit_batches=1", "max_steps"),
        ("trainer.max_epochs=1", "max_steps"),
        ("trainer.accumulate_grad_batches=0", "give 1 or more"),
        ("model.llm_lr=-1", "give 0 or more"),
        ("model.context=-4", "give 1 or more"),
        ("data.num_workers=-1", "give 0 or more"),
    ],
)
def test_what_no_run_can_be_of(world, capsys, option, words):
    assert main(world.arguments("fit", "x", f"--{option}")) == 2
    message = capsys.readouterr().err
    assert option.partition("=")[0] in message
    assert words in message
    assert "Traceback" not in message


def test_measuring_what_was_not_trained(world):
    with pytest.warns(UserWarning, match="the connector has random weights"):
        world.run("test", "untrained")


def test_no_log(world):
    assert world.run("fit", "silent", "--trainer.max_steps=2", "--trainer.log_every_n_steps=0").results("fit.json")
