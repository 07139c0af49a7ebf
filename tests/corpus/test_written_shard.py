"""What the commands that write shards have in common: a full disk, a kill in the last moment, and several processes."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import yaml

from salad_lightning.cli import main
from salad_lightning.corpus import workspace
from salad_lightning.data.format import read_shard
from salad_lightning.testing.shards import save_speech_shards
from salad_lightning.testing.tiny_ctc import save_tiny_ctc

SYNTHESIZER = "salad_lightning.testing.tone_synthesizer.ToneSynthesizer"


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Command lines that each make three shards, without ``--output``."""
    root = tmp_path_factory.mktemp("inputs")
    save_speech_shards(root / "audio", num_samples=60, samples_per_shard=20)
    texts = [f"one two three four number {number}" for number in range(60)]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    encoder = {"class_path": "LogMelEncoder"}
    (root / "recipe.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"encoder": encoder}}}))
    model = save_tiny_ctc(root / "ctc", ["one", "two"], steps=1)
    size = ["--samples-per-shard", "20"]
    return {
        "encode": ["encode", str(root / "audio"), "--config", str(root / "recipe.yaml"), "--accelerator", "cpu"],
        "align": ["align", str(root / "audio"), "--model", str(model), "--device", "cpu"],
        "prepare": ["prepare", "--tars", str(root / "audio"), *size, "--source", "x"],
        "synthesize": [
            *("synthesize", "--manifest", str(root / "texts.jsonl"), "--synthesizer", SYNTHESIZER),
            *(*size, "--source", "x"),
        ],
    }


@pytest.fixture
def small_disk():
    """A limit on the size of files stands in for the disk: the write itself fails in either case."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["encode", "align", "prepare", "synthesize"])
def test_a_full_disk_is_told_and_leaves_nothing_that_looks_complete(commands, tmp_path, capfd, small_disk, name):
    assert main([*commands[name], "--output", str(tmp_path / "out")]) == 2
    message = capfd.readouterr().err
    assert "the shards cannot be written (File too large)" in message
    assert "make room" in message
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".partial"}
    assert not list((tmp_path / "out").rglob("*.tar"))


@pytest.mark.parametrize("name", ["encode", "align", "prepare", "synthesize"])
@pytest.mark.parametrize("stop", [0, 2, 3])
def test_killed_while_files_move_into_place(commands, tmp_path, monkeypatch, name, stop):
    """The next run ends with the same files, whichever move it was."""
    assert main([*commands[name], "--output", str(tmp_path / "whole" / "x")]) == 0
    moves, replace, output = itertools.count(), os.replace, tmp_path / "killed" / "x"

    def failing(source, target):
        if os.path.dirname(target) == str(output) and next(moves) == stop:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(workspace.os, "replace", failing)
    assert main([*commands[name], "--output", str(output)]) == 130
    monkeypatch.undo()
    assert not (output / "index.json").exists()
    assert main([*commands[name], "--output", str(output)]) == 0
    assert _files(output) == _files(tmp_path / "whole" / "x")
    assert len(list(output.glob("*.tar"))) == 3


@pytest.mark.slow
def test_two_processes_encode_the_same_bytes(commands, tmp_path):
    assert main([*commands["encode"], "--output", str(tmp_path / "one")]) == 0
    command = [*commands["encode"], "--output", str(tmp_path / "two"), "--devices", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "salad_lightning", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert _files(tmp_path / "two") == _files(tmp_path / "one")
    assert sum(1 for path in (tmp_path / "two").glob("*.tar") for _ in read_shard(path)) == 60
