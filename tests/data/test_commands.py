"""Shards that a command writes: only where the source allows it."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from salad_lightning.cli import main
from salad_lightning.data.commands import CommandFile
from salad_lightning.data.format import read_shard
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.sources import Source, shard_paths
from salad_lightning.data.stream import EvaluationStream, TrainingStream
from salad_lightning.errors import UserError
from salad_lightning.testing.shards import save_speech_shards


@pytest.fixture
def folder(tmp_path):
    return save_speech_shards(tmp_path / "speech", num_samples=12, samples_per_shard=4)


def _source(shards, **changes):
    return Source(shards, InterleaveDocuments((1, 4), (2, 6)), name="speech", **changes)


def test_a_stream_from_commands_is_the_one_from_files(folder, make_spec):
    sources = [
        _source(str(folder)),
        _source(f"pipe:cat {folder}/speech-{{000000..000002}}.tar", allow_pipe=True),
        _source([f"pipe:gzip -c {path} | gunzip" for path in sorted(folder.glob("*.tar"))], allow_pipe=True),
    ]
    read, trained = [], []
    for source in sources:
        read.append([i.key for b in EvaluationStream(source, make_spec(), rows_per_batch=2) for i in b.documents])
        stream = TrainingStream([source], make_spec(), rows_per_batch=2, shuffle_block=5)
        trained.append({i.key for b in itertools.islice(stream, 6) for i in b.documents})
    assert read[0] == read[1] == read[2]
    assert sorted(read[0]) == sorted(trained[0]) == sorted(trained[1])


@pytest.mark.parametrize("pattern", ["pipe:touch {mark}", "pipe: touch {mark}; cat {shard}"])
def test_nothing_is_run_where_it_is_not_allowed(folder, tmp_path, capsys, pattern):
    mark = tmp_path / "mark"
    command = pattern.format(mark=mark, shard=folder / "speech-000000.tar")
    with pytest.raises(UserError, match="allow_pipe"):
        shard_paths(_source(command))
    with pytest.raises(UserError, match="allow_pipe"):
        list(read_shard(command))
    for arguments in (["lint", command], ["prepare", "--tars", command, "--output", str(tmp_path / "out")]):
        assert main(arguments) == 2
        assert "it runs a command" in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("exit 3", "ended with code 3"),
        ("head -c 20000 {shard}", r"cut off|unexpected end"),
        ("no-such-command-at-all", "ended with code 127"),
        ("true", "empty"),
        ("cat {shard}; exit 3", "ended with code 3"),
        ("cat {shard} {shard}", "a second tar follows"),
    ],
)
def test_a_command_that_fails_is_a_bad_shard(folder, tmp_path, make_spec, command, message):
    path = "pipe:" + command.format(shard=folder / "speech-000000.tar")
    with pytest.raises(UserError, match=message) as caught:
        list(read_shard(path, allow_pipe=True))
    assert caught.value.where == path
    # And skipped like one.
    source = _source([str(folder), path], allow_pipe=True)
    stream = TrainingStream([source], make_spec(), rows_per_batch=2, skipped=tmp_path / "skipped.jsonl")
    keys = {info.key for batch in itertools.islice(stream, 20) for info in batch.documents}
    assert keys == {f"speech{number:06d}" for number in range(12)}
    assert (tmp_path / "skipped.jsonl").read_text().count("\n") == 1


def test_a_reader_that_stops_early_ends_all_of_the_command(folder, tmp_path):
    ended = tmp_path / "pid"
    with CommandFile(f"pipe:sleep 60 & echo $! > {ended}; cat {folder}/speech-000000.tar; wait") as file:
        assert file.read(512)
    sleeping = Path("/proc") / ended.read_text().strip() / "stat"
    deadline = time.monotonic() + 5
    while sleeping.exists() and sleeping.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "it is still running"
        time.sleep(0.05)


def test_a_reader_that_stops_early_does_not_read_to_the_end(folder):
    """Nor does it wait for a command that goes on."""
    begin = time.monotonic()
    samples = read_shard(f"pipe:cat {folder}/speech-000000.tar; sleep 60", allow_pipe=True)
    next(samples)
    samples.close()
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "command", [r"awk '{print $1,$2}' x", "cat {a,b}.tar", r"sed 's/\.x{1,2}/\\/' x", "cat {x", "echo ${HOME}"]
)
def test_a_command_is_the_shells_own(command):
    assert shard_paths(_source(f"pipe:{command}", allow_pipe=True)) == [f"pipe:{command}"]
    numbered = [f"pipe:cat {number:02d}.tar; {command}" for number in (9, 10)]
    assert shard_paths(_source(f"pipe:cat {{09..10}}.tar; {command}", allow_pipe=True)) == numbered


def test_a_command_takes_nothing_of_what_is_typed(folder):
    script = "import sys; from salad_lightning.data.commands import CommandFile; print(CommandFile('pipe:cat').read(9))"
    read, write = os.pipe()  # which nobody closes, like a terminal
    os.write(write, b"typed")
    try:
        told = subprocess.run([sys.executable, "-c", script], stdin=read, capture_output=True, timeout=60, check=True)
    finally:
        os.close(read)
        os.close(write)
    assert told.stdout.decode().strip() == "b''"
