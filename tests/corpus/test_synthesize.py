"""Manifest → shards of speech: what is written, what is left out, and what a kill costs (nothing)."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torchaudio

from salad_lightning.cli import main
from salad_lightning.corpus.synthesize import synthesize
from salad_lightning.data.format import decode, read_shard
from salad_lightning.synthesizers.espeak import EspeakSynthesizer
from salad_lightning.testing.shards import random_text

TONES = "salad_lightning.testing.tone_synthesizer.ToneSynthesizer"
VOICES = [{"voice": "en-us"}, {"voice": "en-us+f2"}]


@pytest.fixture
def manifest(tmp_path):
    def write(rows, name="manifest.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def texts(count, words=5):
    rng = random.Random(0)
    return [random_text(rng, words) for _ in range(count)]


def samples(folder, rate=0):
    return [
        decode(raw, source="", sample_rate_hz=rate) for path in sorted(folder.glob("*.tar")) for raw in read_shard(path)
    ]


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_shards_hold_what_the_synthesizer_says_and_the_manifests_columns(manifest, tmp_path):
    rows = [{"text": text, "key": f"k{i}", "cluster": i % 3, "misalignment": 0.5} for i, text in enumerate(texts(5))]
    index = synthesize(manifest(rows), tmp_path / "out", voices=VOICES, samples_per_shard=2)
    assert [shard["num_samples"] for shard in index["shards"]] == [2, 2, 1]
    found = samples(tmp_path / "out", rate=22_050)
    assert [(s.key, s.text) for s in found] == [(row["key"], row["text"]) for row in rows]
    for row, sample in zip(rows, found, strict=True):
        assert sample.fields["cluster"] == row["cluster"]
        assert sample.fields["misalignment"] == 0.5
        voice = sample.fields["speaker"].removeprefix("voice=")
        speech = EspeakSynthesizer(voice).speak(row["text"])
        np.testing.assert_allclose(sample.audio, speech.audio, atol=1 / 32768)  # FLAC of 16 bits
        for ours, theirs in zip(sample.words, speech.words, strict=True):
            assert ours.word == theirs.word
            assert (ours.start_s, ours.end_s) == pytest.approx((theirs.start_s, theirs.end_s), abs=1e-3)
        assert sample.fields["seconds"] == pytest.approx(len(speech.audio) / 22_050, abs=1e-3)
    assert index["seconds"] == pytest.approx(sum(s.fields["seconds"] for s in found), abs=1e-2)


def test_voices_are_drawn_by_seed_and_key_not_by_place(manifest, tmp_path):
    rows = [{"text": text, "key": f"k{i}"} for i, text in enumerate(texts(60, words=1))]
    said = {}
    for name, order, seed in (("a", rows, 0), ("b", rows[::-1], 0), ("c", rows, 1)):
        synthesize(manifest(order), tmp_path / name, voices=VOICES, seed=seed, samples_per_shard=7)
        said[name] = {sample.key: sample.fields["speaker"] for sample in samples(tmp_path / name)}
    assert said["a"] == said["b"]
    assert said["a"] != said["c"]
    assert min(Counter(said["a"].values()).values()) > 15


def test_another_rate(manifest, tmp_path):
    path = manifest([{"text": texts(1)[0]}])
    kept, halved = synthesize(path, tmp_path / "a"), synthesize(path, tmp_path / "b", sample_rate_hz=16_000)
    assert halved["seconds"] == kept["seconds"]
    (sample,) = samples(tmp_path / "b", rate=16_000)
    assert len(sample.audio) / 16_000 == pytest.approx(kept["seconds"], abs=1e-3)


@pytest.mark.slow
def test_several_processes_give_the_same_bytes(manifest, tmp_path):
    path = manifest([{"text": text} for text in texts(12)])
    for folder, workers in (("one", 1), ("two", 2)):
        synthesize(path, tmp_path / folder / "x", voices=VOICES, samples_per_shard=3, workers=workers)
    assert content(tmp_path / "one" / "x") == content(tmp_path / "two" / "x")


@pytest.mark.slow
def test_killed_twice_and_resumed_gives_the_same_bytes_and_redoes_no_shard(manifest, tmp_path):
    path = manifest([{"text": text} for text in texts(500, words=8)])
    synthesize(path, tmp_path / "whole" / "x", samples_per_shard=10, seed=5)
    out = tmp_path / "killed" / "x"
    command = [
        sys.executable, "-m", "salad_lightning", "synthesize", "--manifest", str(path), "--output", str(out),
        "--samples-per-shard", "10", "--seed", "5",
    ]  # fmt: skip
    before = {}
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(out.glob(".partial/*.tar.json"))) < len(before) + 3:
            assert process.poll() is None, "finished before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        reports = out.glob(".partial/*.tar.json")  # written after its shard
        finished = {path.stem: path.with_suffix("").stat().st_mtime_ns for path in reports}
        assert not list(out.glob("*.tar"))
        assert before.items() <= finished.items(), "a finished shard was spoken again"
        before = finished
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert content(out) == content(tmp_path / "whole" / "x")
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert before.items() <= kept.items()


def test_texts_that_cannot_be_spoken_are_listed_and_nothing_else_is_lost(manifest, tmp_path):
    rows = [{"text": "bread and apples"}, {"text": "a boom here"}, {"text": "hush now"}, {"text": ""}, {"text": "wind"}]
    voices = [{"raises_at": ["boom"], "silent_at": ["hush"]}]
    index = synthesize(manifest(rows), tmp_path / "out", synthesizer=TONES, voices=voices, max_bad_fraction=0.7)
    assert [sample.text for sample in samples(tmp_path / "out")] == ["bread and apples", "wind"]
    failed = [json.loads(line) for line in (tmp_path / "out" / "failed.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in failed] == ["the synthesizer failed", "silence", "no text"]
    assert "RuntimeError: the engine failed" in failed[0]["detail"]
    assert failed[1]["where"].endswith("manifest.jsonl, line 3")
    assert index["failed"] == {"no text": 1, "silence": 1, "the synthesizer failed": 1}
    assert index["num_samples"] + sum(index["failed"].values()) == len(rows)


def refused(capsys, *argv):
    capsys.readouterr()
    assert main(["synthesize", *map(str, argv)]) == 2
    return capsys.readouterr().err


def test_too_many_failures_end_the_run_and_leave_nothing(manifest, tmp_path, capsys):
    path = manifest([{"text": "bread"}, {"text": "boom"}])
    voice = "{raises_at: [boom]}"
    options = ("--manifest", path, "--output", tmp_path / "out", "--synthesizer", TONES, "--voice", voice)
    message = refused(capsys, *options)
    assert "1 texts could not be spoken" in message
    assert "manifest.jsonl, line 2: the synthesizer failed" in message
    assert "--max-bad-fraction" in message
    assert not (tmp_path / "out").exists()
    assert main(["synthesize", *map(str, options), "--max-bad-fraction", "0.5"]) == 0


def test_not_one_text_can_be_spoken(manifest, tmp_path, capsys):
    path = manifest([{"text": "boom"}])
    voice = "{raises_at: [boom]}"
    message = refused(
        capsys, "--manifest", path, "--output", tmp_path / "o", "--synthesizer", TONES, "--voice", voice,
        "--max-bad-fraction", "1",
    )  # fmt: skip
    assert "1 texts could not be spoken" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--synthesizer", "EspeekSynthesizer"], "did you mean EspeakSynthesizer?"),
        (["--synthesizer", "no.such.Speaker"], "no such class"),
        (["--voice", "{voice: xx-nowhere}"], "espeak-ng has no language 'xx-nowhere'"),
        (["--voice", "{pitch: 200}"], "pitch 0 to 99"),
        (["--voice", "{vioce: en-us}"], "cannot be built"),
        (["--voice", "en-us"], "--voice: not a mapping"),
        (["--workers", "0"], "--workers: 0 is out of range\n  → give 1 or more"),
        (["--sample-rate", "16"], "give 1000 to 192000 Hz"),
        (["--max-bad-fraction", "5"], "give 0 to 1"),
        (["--source", "a/b"], "cannot begin a file name"),
    ],
)
def test_settings_that_are_wrong(manifest, tmp_path, capsys, options, words):
    path = manifest([{"text": "bread"}])
    assert words in refused(capsys, "--manifest", path, "--output", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_manifests_that_are_wrong(manifest, tmp_path, capsys):
    out = ("--output", tmp_path / "out")
    assert "does not exist" in refused(capsys, "--manifest", tmp_path / "none.jsonl", *out)
    assert "there is no row" in refused(capsys, "--manifest", manifest([]), *out)
    assert "could not be spoken" in refused(capsys, "--manifest", manifest([{"sentence": "bread"}]), *out)
    twice = manifest([{"text": "bread", "key": "a"}, {"text": "wine", "key": "a"}])
    assert "'a'" in refused(capsys, "--manifest", twice, *out)


def test_a_folder_with_something_in_it_is_left_alone(manifest, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    path = manifest([{"text": "bread"}])
    assert "not empty" in refused(capsys, "--manifest", path, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_half_of_a_surrogate_pair_is_a_text_that_cannot_be_spoken(tmp_path):
    rows = ['{"text": "bread"}', r'{"text": "half \ud83d"}', r'{"text": "wine", "title": "\ud83d"}']
    (tmp_path / "m.jsonl").write_text("".join(row + "\n" for row in rows))
    index = synthesize(tmp_path / "m.jsonl", tmp_path / "out", synthesizer=TONES, max_bad_fraction=0.9)
    assert [sample.text for sample in samples(tmp_path / "out")] == ["bread"]
    assert sum(index["failed"].values()) == 2
    assert index["failed"]["broken row"] >= 1


def test_a_rate_that_would_fill_the_memory(manifest, tmp_path, capsys):
    path = manifest([{"text": "bread"}])
    options = ("--manifest", path, "--output", tmp_path / "out", "--synthesizer", TONES)
    message = refused(capsys, *options, "--sample-rate", "16001")
    assert "--sample-rate" in message
    assert "16001 Hz is no usual sample rate" in message
    assert not (tmp_path / "out").exists()


def test_the_kernel_of_a_rate_is_made_once(manifest, tmp_path, monkeypatch):
    made, kernel = [], torchaudio.functional.functional._get_sinc_resample_kernel

    def counted(*args, **options):
        made.append(args)
        return kernel(*args, **options)

    for module in (torchaudio.functional.functional, torchaudio.transforms._transforms):
        monkeypatch.setattr(module, "_get_sinc_resample_kernel", counted)
    rows = [{"text": text} for text in texts(4)]
    synthesize(manifest(rows), tmp_path / "out", synthesizer=TONES, sample_rate_hz=12_000)
    assert len(made) == 1
