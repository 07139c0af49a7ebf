"""Shards and manifests between this package and others: webdataset, Hugging Face datasets, lhotse, strangers' tars."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import soundfile
import webdataset

from salad_lightning.cli import main
from salad_lightning.corpus.prepare import prepare
from salad_lightning.data.audio import resample
from salad_lightning.data.format import decode, read_shard
from salad_lightning.data.sources import Source
from salad_lightning.data.stream import EvaluationStream, TrainingStream
from salad_lightning.data.template import TemplateDocuments
from salad_lightning.errors import UserError
from salad_lightning.testing.shards import speak_tones

RATE = 16_000
TEXTS = ["Seven bright stars shine.", "The old miller, he sang.", "Rain fell."]


def _write_audio(target, audio, kind, rate=RATE):
    soundfile.write(target, audio, rate, format=kind, **({} if kind in ("OGG", "MP3") else {"subtype": "PCM_16"}))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """What ``prepare`` makes of three recordings, one of them without word times."""
    folder = tmp_path_factory.mktemp("corpus")
    with (folder / "m.jsonl").open("w") as manifest:
        for number, text in enumerate(TEXTS):
            audio, words = speak_tones(text)
            _write_audio(folder / f"{number}.wav", audio, "WAV")
            row = {"audio": f"{number}.wav", "text": text, "speaker": "x", "words": words}
            if number == 1:
                del row["words"]
            manifest.write(json.dumps(row) + "\n")
    prepare(folder / "m.jsonl", folder / "shards", samples_per_shard=2)
    return sorted(map(str, (folder / "shards").glob("*.tar")))


@pytest.fixture(scope="module")
def ours(shards):
    return [decode(raw, source="s", sample_rate_hz=RATE) for path in shards for raw in read_shard(path)]


def _same(key, record, content, utterance):
    assert key == utterance.key
    assert record["text"] == utterance.text
    assert record["speaker"] == "x"
    if utterance.words is None:
        assert not record.get("words")
    else:
        assert [word for word, _, _ in record["words"]] == [word.word for word in utterance.words]
        times = [word[1:] for word in record["words"]]  # Hugging Face's reader of JSON rounds in the last bit
        np.testing.assert_allclose(times, [word[1:] for word in utterance.words], rtol=1e-12)
    audio, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    assert rate == RATE
    np.testing.assert_array_equal(audio, utterance.audio)


def test_shards_open_in_plain_webdataset(shards, ours):
    dataset = webdataset.WebDataset(shards, shardshuffle=False).to_tuple("__key__", "json", "flac")
    theirs = list(dataset)
    assert len(theirs) == len(ours) == 3
    for (key, record, content), utterance in zip(theirs, ours, strict=True):
        _same(key, json.loads(record), content, utterance)


HUGGING_FACE = """
import json, pickle, sys
from datasets import Features, Json, Value, load_dataset

names = {name: Value("string") for name in ("__key__", "__url__")}
features = Features(names | {"json": Json(), "flac": Value("binary")})
rows = load_dataset("webdataset", data_files=sys.argv[2:], split="train", streaming=True, features=features)
with open(sys.argv[1], "wb") as file:
    pickle.dump([(row["__key__"], row["json"], row["flac"]) for row in rows], file)
"""


def _run_with_datasets(script, home, *arguments):
    """In a process of its own: the library reads its settings (offline, cache) when it is imported."""
    pytest.importorskip("datasets", reason="the `test` extra brings it")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_shards_open_in_hugging_face_datasets(shards, ours, tmp_path):
    _run_with_datasets(HUGGING_FACE, tmp_path, tmp_path / "rows", *shards)
    theirs = pickle.loads((tmp_path / "rows").read_bytes())
    assert len(theirs) == 3
    for (key, record, content), utterance in zip(theirs, ours, strict=True):
        _same(key, record, content, utterance)


MAKE_DATASET = """
import sys
from pathlib import Path
from datasets import Audio, Dataset

folder, *files = map(Path, sys.argv[1:])
rows = {
    "audio": [{"bytes": file.read_bytes() if file != files[-1] else None, "path": str(file)} for file in files],
    "sentence": [file.with_suffix(".txt").read_text() for file in files],
    "speaker_id": list(range(len(files))),
}
dataset = Dataset.from_dict(rows).cast_column("audio", Audio(sampling_rate=16000))
dataset.save_to_disk(folder / "saved")
(folder / "parquet").mkdir()
dataset.to_parquet(folder / "parquet" / "train-00000-of-00001.parquet", batch_size=2)
"""


@pytest.mark.slow
def test_folders_written_by_hugging_face_datasets_are_prepared(tmp_path):
    """Both its ways to disk; audio as bytes, and as the path of a file."""
    files = [tmp_path / f"{number}.wav" for number in range(3)]
    for file, text in zip(files, TEXTS, strict=True):
        _write_audio(file, speak_tones(text)[0], "WAV")
        file.with_suffix(".txt").write_text(text)
    _run_with_datasets(MAKE_DATASET, tmp_path, tmp_path, *files)
    for kind in ("saved", "parquet"):
        output = tmp_path / f"{kind}-out"
        command = ["prepare", "--hf", str(tmp_path / kind), "--output", str(output), "--text-column", "sentence"]
        assert main(command) == 0
        samples = [
            decode(raw, source="s", sample_rate_hz=RATE) for raw in read_shard(output / f"{kind}-out-000000.tar")
        ]
        assert [sample.text for sample in samples] == TEXTS
        assert [sample.fields["speaker_id"] for sample in samples] == [0, 1, 2]
        for sample, file in zip(samples, files, strict=True):
            assert sample.key.endswith(file.stem)
            np.testing.assert_array_equal(sample.audio, soundfile.read(file, dtype="float32")[0])


# Tars made by others


def _tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _strangers_tar(path, kind, texts):
    """Audio with the transcript in ``.txt``, ``.json``, or both."""
    members = []
    for number, text in enumerate(TEXTS):
        buffer = io.BytesIO()
        _write_audio(buffer, speak_tones(text)[0], kind)
        members.append((f"a/x{number}.{kind.lower()}", buffer.getvalue()))
        if texts in ("txt", "both"):
            members.append((f"a/x{number}.txt", f"{text}\n".encode()))
        if texts in ("json", "both"):
            record = {"text": text, "lang": "en"} if texts == "json" else {"lang": "en"}
            members.append((f"a/x{number}.json", json.dumps(record).encode()))
    _tar(path, members)


@pytest.mark.parametrize("texts", ["txt", "json", "both"])
@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_tars_made_by_others_stream_without_conversion(tmp_path, make_spec, kind, texts):
    _strangers_tar(tmp_path / "theirs.tar", kind, texts)
    utterances = [decode(raw, source="s", sample_rate_hz=RATE) for raw in read_shard(tmp_path / "theirs.tar")]
    assert [utterance.key for utterance in utterances] == ["a/x0", "a/x1", "a/x2"]
    assert [utterance.text for utterance in utterances] == TEXTS
    assert [utterance.fields for utterance in utterances] == [{} if texts == "txt" else {"lang": "en"}] * 3
    for utterance, text in zip(utterances, TEXTS, strict=True):
        expected = speak_tones(text)[0]
        length = min(len(expected), len(utterance.audio))
        assert length > 0.95 * len(expected)
        error = np.abs(utterance.audio[:length] - expected[:length]).mean()
        assert error < (1e-4 if kind in ("WAV", "FLAC") else 0.05)
    source = Source(str(tmp_path), TemplateDocuments("{speech} {text}"))  # interleaving would need word times
    batches = list(EvaluationStream(source, make_spec(), rows_per_batch=2))
    assert sorted(info.key for batch in batches for info in batch.documents) == ["a/x0", "a/x1", "a/x2"]
    batch = next(iter(TrainingStream([source], make_spec(), rows_per_batch=2, shuffle_block=3, lookahead=3)))
    assert {info.key for info in batch.documents} == {"a/x0", "a/x1", "a/x2"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"txt": "Füße".encode("latin-1")}, r"\.txt is not UTF-8"),
        ({"txt": b"fine", "json": b"[1]"}, r"\.json beside it"),
        ({"txt": b" \n"}, "no `text`"),
    ],
)
def test_texts_that_are_none_are_named(tmp_path, extra, message):
    _tar(tmp_path / "x.tar", [(f"k.{extension}", content) for extension, content in extra.items()])
    (raw,) = read_shard(tmp_path / "x.tar")
    with pytest.raises(UserError, match=message):
        decode(raw, source="", sample_rate_hz=0)


# lhotse


@pytest.mark.parametrize("kind", ["whole", "pieces", "supervisions", "resampled"])
def test_cut_set_written_by_lhotse_keeps_words_and_times(tmp_path, kind):
    """Of one recording of 44.1 kHz with three supervisions: lhotse leaves alignments at the times of the recording."""
    lhotse = pytest.importorskip("lhotse", reason="the `test` extra brings it")
    rate = 44_100
    spoken = [speak_tones(text, sample_rate_hz=rate) for text in TEXTS]
    soundfile.write(tmp_path / "long.flac", np.concatenate([audio for audio, _ in spoken]), rate)
    recording = lhotse.Recording.from_file(tmp_path / "long.flac")
    lengths = [len(audio) / rate for audio, _ in spoken]
    starts = [sum(lengths[:number]) for number in range(3)]
    supervisions = [
        lhotse.SupervisionSegment(
            f"s{number}",
            recording.id,
            starts[number],
            lengths[number],
            text=text,
            language="en",
            speaker="x",
            alignment={
                "word": [
                    lhotse.supervision.AlignmentItem(word, starts[number] + start, end - start, 0.5)
                    for word, start, end in spoken[number][1]
                ]
            },
        )
        for number, text in enumerate(TEXTS)
    ]
    (whole,) = lhotse.CutSet.from_manifests(
        lhotse.RecordingSet.from_recordings([recording]), lhotse.SupervisionSet.from_segments(supervisions)
    )
    cuts = {
        "whole": [whole],
        # The first alone, and a cut of two that begins a little before the first of them.
        "pieces": [
            whole.truncate(offset=0.0, duration=starts[1], keep_excessive_supervisions=False),
            whole.truncate(offset=starts[1] - 0.05, keep_excessive_supervisions=False),
        ],
        "supervisions": list(whole.trim_to_supervisions()),
        "resampled": list(whole.resample(8000).trim_to_supervisions()),
    }[kind]
    lhotse.CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    prepare(tmp_path / "cuts.jsonl.gz", tmp_path / "out", kind="lhotse", sample_rate_hz=RATE)
    paths = sorted((tmp_path / "out").glob("*.tar"))
    samples = [decode(raw, source="s", sample_rate_hz=RATE) for path in paths for raw in read_shard(path)]
    assert sorted(sample.key for sample in samples) == ["s0", "s1", "s2"]
    for sample in samples:
        number = int(sample.key[1])
        assert sample.text == TEXTS[number]
        assert (sample.fields["language"], sample.fields["speaker"]) == ("en", "x")
        assert len(sample.audio) / RATE == pytest.approx(lengths[number], abs=2e-3)
        assert [word.word for word in sample.words] == [word for word, _, _ in spoken[number][1]]
        times = [(word.start_s, word.end_s) for word in sample.words]
        np.testing.assert_allclose(times, [(start, end) for _, start, end in spoken[number][1]], atol=2e-3)
        # What is heard at these times is what was said there.
        original = resample(spoken[number][0], rate, RATE)
        length = min(len(original), len(sample.audio))
        likeness = np.corrcoef(original[:length], sample.audio[:length])[0, 1]
        assert likeness > (0.9 if kind == "resampled" else 0.99)  # there, cuts begin at samples of 8 kHz


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cut: cut.perturb_speed(1.1), "changed on the fly (Speed)"),
        (lambda cut: cut.truncate(duration=0.4), "ends inside the supervision"),
        (lambda cut: cut.pad(5.0), "not a cut of one recording"),
    ],
)
def test_cuts_whose_text_is_not_what_the_file_says_are_named(tmp_path, change, message):
    lhotse = pytest.importorskip("lhotse", reason="the `test` extra brings it")
    audio, _ = speak_tones(TEXTS[0])
    soundfile.write(tmp_path / "x.flac", audio, RATE)
    recording = lhotse.Recording.from_file(tmp_path / "x.flac")
    supervision = lhotse.SupervisionSegment("s", recording.id, 0.0, recording.duration, text=TEXTS[0])
    cut = change(lhotse.MonoCut("c", 0.0, recording.duration, 0, [supervision], recording=recording))
    lhotse.CutSet.from_cuts([cut]).to_file(tmp_path / "cuts.jsonl")
    with pytest.raises(UserError, match=re.escape(message)):
        prepare(tmp_path / "cuts.jsonl", tmp_path / "out", kind="lhotse")
