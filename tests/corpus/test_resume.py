"""What is left of ``prepare`` when it is killed, and what comes of typing the same command again."""

import functools
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import soundfile
import webdataset

from salad_lightning.corpus import workspace
from salad_lightning.corpus.budget import Budget
from salad_lightning.corpus.prepare import prepare
from salad_lightning.corpus.rules import Rules
from salad_lightning.corpus.synthesize import synthesize
from salad_lightning.data.format import decode, read_shard
from salad_lightning.errors import UserError
from salad_lightning.testing.shards import speak_tones
from salad_lightning.testing.tone_synthesizer import ToneSynthesizer

ROWS = 240


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Recordings of which some are broken, some break the rules and some are cut."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for number in range(ROWS):
        text = " ".join(["bright", "stars", "shine", "above"][: 1 + number % 4] * (12 if number % 50 == 7 else 1))
        audio, words = speak_tones(text, sample_rate_hz=8000, seed=number)
        soundfile.write(folder / f"{number}.wav", audio, 8000)
        if number % 100 == 99:
            (folder / f"{number}.wav").write_bytes(b"RIFF, but not really")
        words = [(word, round(start, 4), round(end, 4)) for word, start, end in words]
        lines.append(json.dumps({"audio": f"{number}.wav", "text": text, "words": words}) + "\n")
    (folder / "m.jsonl").write_text("".join(lines))
    return folder / "m.jsonl"


RULES = Rules(min_seconds=0.15, max_seconds=3.0)
OPTIONS = ["--min-seconds", "0.15", "--max-seconds", "3.0", "--samples-per-shard", "8", "--source", "x"]


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def unbroken(manifest, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "out"
    prepare(manifest, output, rules=RULES, samples_per_shard=8, source="x")
    return _files(output)


def _command(manifest, output, workers):
    command = [sys.executable, "-m", "salad_lightning", "prepare", "--manifest", str(manifest), "--output", str(output)]
    return [*command, *OPTIONS, "--workers", str(workers)]


def test_the_corpus_is_worth_the_test(unbroken):
    index = json.loads(unbroken["index.json"])
    assert index["num_rows"] == ROWS
    assert set(index["rejected"]) == {"too short", "unreadable audio"}
    assert len(index["shards"]) == ROWS // 8
    assert b'"recording"' in unbroken["x-000000.tar"]  # row 7 was cut


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bytes(manifest, unbroken, tmp_path):
    """With two workers, as the unbroken run in one process."""
    workers = 2
    output = tmp_path / "out"
    done = 0
    for more in (2, 9):
        process = subprocess.Popen(_command(manifest, output, workers), stderr=subprocess.DEVNULL)
        children = set()
        while (found := len(list(output.glob(".partial/*.tar.json")))) < done + more:
            assert process.poll() is None, "it ended before it could be killed"
            children |= _children(process.pid)
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = found
        assert not list(output.glob("*.tar"))  # nothing under its final name
        _gone(children)
    reports = sorted(output.glob(".partial/*.tar.json"))  # a shard without one is not known to be finished
    kept = {path.stem: path.with_suffix("").stat().st_mtime_ns for path in reports}
    assert len(kept) >= 10
    # A finished shard that was damaged meanwhile is made again.
    damaged = reports[1].with_suffix("")
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    subprocess.run(_command(manifest, output, workers), check=True, stderr=subprocess.DEVNULL)
    assert _files(output) == unbroken
    remade = {name for name, time_ns in kept.items() if (output / name).stat().st_mtime_ns != time_ns}
    assert remade == {damaged.name}


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_at_once(manifest, unbroken, tmp_path):
    """A terminal sends it to all of them; a worker that it ended within a queue left the others waiting for ever."""
    output = tmp_path / "out"
    for done in (1, 6):
        process = subprocess.Popen(
            _command(manifest, output, 2),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell's background job ignores Ctrl-C, and so would the child of tests that run in one.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        while len(list(output.glob(".partial/*.tar.json"))) < done:
            assert process.poll() is None, "it ended before it could be interrupted"
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGINT)
        _, printed = process.communicate(timeout=30)
        assert process.returncode == 128 + signal.SIGINT
        assert "Traceback" not in printed
        assert "interrupted" in printed
    subprocess.run(_command(manifest, output, 2), check=True, stderr=subprocess.DEVNULL)
    assert _files(output) == unbroken


def _children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return {int(child) for child in file.read().split()}
    except OSError:
        return set()


def _gone(children):
    """Workers end with their parent."""
    for _ in range(200):
        if not any(os.path.exists(f"/proc/{child}") and "Z" not in _state(child) for child in children):
            return
        time.sleep(0.05)
    raise AssertionError(f"still there: {children}")


def _state(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2]
    except OSError:
        return "Z"


@pytest.mark.parametrize(("stop", "overwrite"), [(0, True), (17, False), (31, True), (32, False)])
def test_killed_while_files_move_into_place(manifest, unbroken, tmp_path, monkeypatch, stop, overwrite):
    """The next run ends with the same files, whichever move it was; the last one is the index."""
    output, options = tmp_path / "out", {"rules": RULES, "source": "x"}
    prepare(manifest, output, samples_per_shard=80, **options)  # an older version, to be replaced
    moves, replace = itertools.count(), os.replace

    def failing(source, target):
        if os.path.dirname(target) == str(output) and next(moves) == stop:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(workspace.os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(manifest, output, samples_per_shard=8, overwrite=True, **options)
    monkeypatch.undo()
    assert len(unbroken) == 33
    assert not (output / "index.json").exists()  # a set without an index is known to be incomplete
    # What is moved is decided already: no --overwrite is needed to end it.
    prepare(manifest, output, samples_per_shard=8, overwrite=overwrite, **options)
    assert _files(output) == unbroken


def test_a_changed_input_is_not_mistaken_for_the_old_one(manifest, tmp_path, monkeypatch):
    """Finished shards are kept after an interruption, but only where their rows and options are the same."""
    lines = manifest.read_text().splitlines(keepends=True)[:40]
    changed = manifest.with_name("changed.jsonl")
    changed.write_text("".join(lines))
    output = tmp_path / "out"
    write_aside = workspace.write_aside

    def failing(path, text):
        write_aside(path, text)
        if path.name == "x-000003.tar.json":
            raise KeyboardInterrupt

    monkeypatch.setattr("salad_lightning.corpus.written_shard.write_aside", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(changed, output, samples_per_shard=8, source="x", max_bad_fraction=1)
    monkeypatch.undo()
    kept = {path.name: path.stat().st_ino for path in output.glob(".partial/*.tar")}
    assert len(kept) == 4
    record = json.loads(lines[9]) | {"speaker": "new"}  # in the second shard
    changed.write_text("".join([*lines[:9], json.dumps(record) + "\n", *lines[10:]]))
    prepare(changed, output, samples_per_shard=8, source="x", max_bad_fraction=1)
    assert {name for name, node in kept.items() if (output / name).stat().st_ino != node} == {"x-000001.tar"}
    prepare(changed, tmp_path / "fresh", samples_per_shard=8, source="x", max_bad_fraction=1)
    assert _files(output) == _files(tmp_path / "fresh")


def test_much_work_outlives_a_mistake_in_the_input(tmp_path):
    lines = [json.dumps({"text": f"text {number}"}) + "\n" for number in range(1500)]
    path, output = tmp_path / "t.jsonl", tmp_path / "out"
    path.write_text("".join([*lines, "no JSON\n"]))
    with pytest.raises(UserError, match="line 1501"):
        prepare(path, output, kind="text", samples_per_shard=100)
    kept = {file.name: file.stat().st_ino for file in output.glob(".partial/*.tar")}
    assert len(kept) == 15
    path.write_text("".join(lines))
    prepare(path, output, kind="text", samples_per_shard=100)
    assert {file.name: file.stat().st_ino for file in output.glob("*.tar")} == kept


def _recordings(folder, count):
    """As many rows as it takes for finished shards to be kept; one of them has a recording of its own."""
    for name in ("a.wav", "b.wav"):
        soundfile.write(folder / name, speak_tones("one two", sample_rate_hz=8000)[0], 8000)
    rows = [{"key": f"k{number}", "audio": "b.wav" if number == 350 else "a.wav"} for number in range(count)]
    (folder / "m.jsonl").write_text("".join(json.dumps(row | {"text": "one two"}) + "\n" for row in rows))
    return folder / "m.jsonl"


@pytest.mark.parametrize("cause", ["no file", "no right"])
def test_a_recording_that_was_put_right_is_read_again(tmp_path, monkeypatch, cause):
    """Of what is finished, only the shard of the broken row is made again."""
    path, output, recording = _recordings(tmp_path, 1300), tmp_path / "out", tmp_path / "b.wav"
    content = recording.read_bytes()
    make = functools.partial(prepare, path, output, samples_per_shard=100, max_bad_fraction=0)
    with monkeypatch.context() as patch:
        if cause == "no file":
            recording.unlink()
        else:  # which changes neither size nor time
            patch.setattr("salad_lightning.corpus.recordings.Path.read_bytes", _forbidden("b.wav"))
        patch.setattr(Budget, "check", _at_the_end(1300))
        with pytest.raises(UserError, match=r"1 broken rows.*\n.*line 351: unreadable audio"):
            make()
    kept = _nodes(output / ".partial")
    assert len(kept) == 12
    assert "out-000003.tar" not in kept
    if cause == "no file":
        recording.write_bytes(content)
    assert make()["num_samples"] == 1300
    assert _nodes(output).items() >= kept.items()


def _nodes(folder):
    return {path.name: path.stat().st_ino for path in folder.glob("*.tar")}


def _forbidden(name):
    read = Path.read_bytes

    def read_bytes(self):
        if self.name == name:
            raise PermissionError(13, "Permission denied")
        return read(self)

    return read_bytes


def _at_the_end(num_rows):
    """A budget that is spent when all rows were read, as where they break late."""
    check = Budget.check
    return lambda self, bad, seen: check(self, bad, seen) if seen == num_rows else None


def test_a_recording_replaced_after_an_interruption_is_read_again(tmp_path, monkeypatch):
    path, output = _recordings(tmp_path, 600), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(workspace.Workspace, "publish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(path, output, samples_per_shard=100)
    kept = _nodes(output / ".partial")
    assert len(kept) == 6
    soundfile.write(tmp_path / "b.wav", speak_tones("nine ten", sample_rate_hz=8000)[0], 8000)
    prepare(path, output, samples_per_shard=100)
    now = _nodes(output)
    assert {name for name, node in kept.items() if now[name] != node} == {"out-000003.tar"}
    prepare(path, tmp_path / "fresh" / "out", samples_per_shard=100)
    assert _files(output) == _files(tmp_path / "fresh" / "out")


def test_texts_that_a_mended_synthesizer_can_speak_are_spoken(tmp_path, monkeypatch):
    path, output = tmp_path / "texts.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps({"text": f"word{number}"}) + "\n" for number in range(1200)))
    name = "salad_lightning.testing.tone_synthesizer.ToneSynthesizer"
    make = functools.partial(synthesize, path, output, synthesizer=name, samples_per_shard=100, max_bad_fraction=0)
    with monkeypatch.context() as patch:
        patch.setattr(ToneSynthesizer, "speak", _failing("word1150"))
        with pytest.raises(UserError, match="1 texts could not be spoken"):
            make()
    assert len(_nodes(output / ".partial")) == 11
    assert make()["num_samples"] == 1200


def _failing(text):
    speak = ToneSynthesizer.speak

    def failing(self, said, **options):
        if said == text:
            raise RuntimeError("out of order")
        return speak(self, said, **options)

    return failing


def test_two_commands_in_one_folder(manifest, tmp_path):
    with workspace.open_workspace(tmp_path / "out", overwrite=False), pytest.raises(UserError, match="another command"):
        prepare(manifest, tmp_path / "out")


@pytest.mark.slow
def test_a_full_disk_is_told_and_finished_shards_are_kept(manifest, tmp_path):
    """A limit on the size of files stands in for the disk: the write itself fails in either case."""
    output = tmp_path / "out"
    command = _command(manifest, output, 1)
    limited = subprocess.run(
        [*command, "--overwrite"], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000)),
    )  # fmt: skip
    assert limited.returncode == 2, limited.stderr
    assert "cannot be written" in limited.stderr
    assert "finished shards are kept" in limited.stderr
    assert not list(output.glob("*.tar"))
    assert not [path for path in output.rglob("*.tar") if path.parent.name != ".partial"]


def test_shards_open_unchanged_in_plain_webdataset(unbroken, tmp_path):
    for name, content in unbroken.items():
        (tmp_path / name).write_bytes(content)
    paths = sorted(map(str, tmp_path.glob("*.tar")))
    dataset = webdataset.WebDataset(paths, shardshuffle=False).decode().to_tuple("__key__", "json")
    theirs = {key: record["text"] for key, record in dataset}
    ours = {raw.key: decode(raw, source="", sample_rate_hz=0).text for path in paths for raw in read_shard(path)}
    assert theirs == ours
    (first, *_) = webdataset.WebDataset(paths, shardshuffle=False)
    assert {name for name in first if not name.startswith("__")} == {"json", "flac"}


@pytest.mark.parametrize("make", [functools.partial(prepare, kind="text"), synthesize], ids=["prepare", "synthesize"])
@pytest.mark.parametrize("texts", [["ten cats"], ["ten dogs", "two cats"]], ids=["same", "changed"])
def test_a_manifest_changed_while_files_move_is_read_again(tmp_path, monkeypatch, make, texts):
    manifest = tmp_path / "texts.jsonl"
    manifest.write_text(json.dumps({"text": "ten cats"}) + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(workspace, "_publish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(manifest, tmp_path / "out")
    manifest.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    # What was about to be moved is moved first; only another manifest has something to overwrite.
    index = make(manifest, tmp_path / "out", overwrite=len(texts) > 1)
    assert index["num_samples"] == len(texts)
