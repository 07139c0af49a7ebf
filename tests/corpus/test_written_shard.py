"""What the commands that write shards have in common: a full disk, a kill in the last moment, and several processes."""

import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
from unittest.mock import Mock

import pytest
import yaml

from salad_lightning.cli import main
from salad_lightning.corpus import workspace
from salad_lightning.data.audio import encode_flac
from salad_lightning.data.choice import ChoiceDocuments
from salad_lightning.data.format import read_shard
from salad_lightning.data.sources import Source
from salad_lightning.errors import UserError
from salad_lightning.testing.shards import save_speech_shards, speak_tones
from salad_lightning.testing.tiny_ctc import save_tiny_ctc
from salad_lightning.training.spoken_evaluation import SpokenEvaluation

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


def _tar(path, names):
    record = {"text": "one two"}
    members = {"flac": encode_flac(speak_tones("one two")[0], 16_000), "json": json.dumps(record).encode()}
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name in names:
            for extension, content in members.items():
                entry = tarfile.TarInfo(f"{name}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def _keys(path):
    return [raw.key for raw in read_shard(path)]


@pytest.mark.parametrize("name", ["encode", "align"])
def test_keys_keep_their_folders(commands, tmp_path, name):
    keys = ["./0001", "v1.0/0001", "v1.1/0001"]
    _tar(tmp_path / "in" / "x.tar", keys)
    assert _keys(tmp_path / "in" / "x.tar") == keys
    command = [name, str(tmp_path / "in"), *commands[name][2:], "--output", str(tmp_path / "out")]
    assert main(command) == 0
    assert _keys(tmp_path / "out" / "x.tar") == keys


@pytest.mark.parametrize("name", ["encode", "align"])
def test_a_key_that_comes_again_and_a_name_that_is_no_tars_are_named(commands, tmp_path, capfd, name):
    _tar(tmp_path / "in" / "x.tar", ["a", "b", "a"])
    (tmp_path / "in" / "x.tar").rename(tmp_path / "in" / "x.wds")
    command = [name, str(tmp_path / "in" / "x.wds"), *commands[name][2:], "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "x.wds: the name does not end in .tar" in capfd.readouterr().err
    (tmp_path / "in" / "x.wds").rename(tmp_path / "in" / "x.tar")
    command[1] = str(tmp_path / "in" / "x.tar")
    assert main(command) == 2
    assert "x.tar: a: the key occurs twice" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_key_in_two_shards_of_a_test_source_is_named_before_anything_is_transcribed(tmp_path, monkeypatch):
    heard = []

    class CountingRecognizer:
        sample_rate_hz = 16_000

        def __init__(self, *_):
            pass

        def transcribe(self, clips):
            heard.extend(clips)
            return ["x"] * len(clips)

    monkeypatch.setattr("salad_lightning.training.spoken_evaluation.Recognizer", CountingRecognizer)
    for number, names in enumerate((["a", "b"], ["c", "a"])):
        _tar(tmp_path / f"part{number}" / f"{number}.tar", names)
    source = Source([str(tmp_path / "part0"), str(tmp_path / "part1")], ChoiceDocuments(), name="x")
    trainer = Mock(datamodule=Mock(test=[source]), default_root_dir=tmp_path / "out", world_size=1, is_global_zero=True)
    with pytest.raises(UserError, match=r"1\.tar: a: the key occurs twice, first in .*0\.tar"):
        SpokenEvaluation("x").setup(trainer, Mock(), "test")
    assert not heard
