import argparse
import hashlib
import io
import json
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from salad_lightning.cli import main
from salad_lightning.corpus.prepare import add_arguments, prepare, run
from salad_lightning.data.format import decode, read_shard
from salad_lightning.errors import UserError
from salad_lightning.testing.shards import speak_tones

TEXTS = ["seven bright stars", "the lazy dog", "a small boat", "bread and cheese", "the warm sun"]


@pytest.fixture
def corpus(tmp_path):
    """Five WAV files of 8 kHz in a folder, listed in a TSV and a JSONL."""
    folder = tmp_path / "corpus"
    (folder / "audio").mkdir(parents=True)
    rows = []
    for number, text in enumerate(TEXTS):
        audio, words = speak_tones(text, sample_rate_hz=8000)
        soundfile.write(folder / "audio" / f"x.{number}.wav", audio, 8000)
        rows.append({"audio": f"audio/x.{number}.wav", "text": text, "words": words, "speaker": f"s{number}",
                     "choices": ["a", "b"], "answer": 1})  # fmt: skip
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = [list(rows[0])] + [[v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows]
    (folder / "m.tsv").write_text("".join("\t".join(cells) + "\n" for cells in table))
    return folder


def _samples(output, rate=16_000):
    return [
        decode(raw, source="s", sample_rate_hz=rate)
        for path in sorted(output.glob("*.tar"))
        for raw in read_shard(path)
    ]


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_recordings_become_shards(corpus, tmp_path, kind):
    index = prepare(corpus / f"m.{kind}", tmp_path / "digits", samples_per_shard=2)
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == [
        "README.md", "digits-000000.tar", "digits-000001.tar", "digits-000002.tar", "index.json"]  # fmt: skip
    assert index == json.loads((tmp_path / "digits" / "index.json").read_text())
    samples = _samples(tmp_path / "digits", 8000)
    assert [sample.text for sample in samples] == TEXTS
    for number, sample in enumerate(samples):
        assert sample.key == f"audio_x_{number}"
        expected, _ = soundfile.read(corpus / "audio" / f"x.{number}.wav", dtype="float32")
        np.testing.assert_array_equal(sample.audio, expected)  # 16-bit both: lossless
        assert sample.fields["speaker"] == f"s{number}"
        assert sample.fields["answer"] == 1
        assert sample.words[0].word == TEXTS[number].split()[0]
    assert index["num_samples"] == 5
    assert index["seconds"] == pytest.approx(sum(len(sample.audio) / 8000 for sample in samples), abs=1e-3)
    assert [shard["num_samples"] for shard in index["shards"]] == [2, 2, 1]
    for shard in index["shards"]:
        content = (tmp_path / "digits" / shard["name"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()


def test_the_same_input_gives_the_same_bytes_and_a_sample_rate_resamples(corpus, tmp_path):
    first = prepare(corpus / "m.tsv", tmp_path / "a" / "x", sample_rate_hz=16_000)
    second = prepare(corpus / "m.jsonl", tmp_path / "b" / "x", sample_rate_hz=16_000)
    assert first == second
    (raw, *_) = read_shard(tmp_path / "a" / "x" / "x-000000.tar")
    assert soundfile.info(io.BytesIO(raw.members["flac"])).samplerate == 16_000


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_plain_text_becomes_shards_without_audio(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"body": text, "url": "u"}) + "\n\n" for text in TEXTS))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "url": ["u"] * 5}), path)
    index = prepare(path, tmp_path / "out", kind="text", source="web", text_column="body", samples_per_shard=3)
    samples = _samples(tmp_path / "out")
    assert [sample.text for sample in samples] == TEXTS
    assert all(sample.audio is None and sample.fields == {"url": "u"} for sample in samples)
    assert [shard["name"] for shard in index["shards"]] == ["web-000000.tar", "web-000001.tar"]


def test_overwrite_replaces_only_what_an_earlier_run_wrote(corpus, tmp_path):
    output = tmp_path / "x"
    prepare(corpus / "m.tsv", output, samples_per_shard=1)
    with pytest.raises(UserError, match="--overwrite"):
        prepare(corpus / "m.tsv", output)
    prepare(corpus / "m.tsv", output, overwrite=True)
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "index.json", "x-000000.tar"]
    (output / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match=r"mine\.txt"):
        prepare(corpus / "m.tsv", output, overwrite=True)
    assert (output / "mine.txt").exists()
    assert (output / "index.json").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"audio": "none.wav", "text": "x"}, r"none\.wav cannot be read"),
        ({"audio": "m.tsv", "text": "x"}, "cannot be decoded"),
        ({"audio": "audio/x.0.wav", "text": " "}, "no text"),
        ({"text": "x"}, "no `audio`"),
        ({"audio": "audio/x.1.wav", "text": "x"}, "keys must be new"),
        ({"audio": "audio/x.0.wav", "text": "x", "words": [["x", 0, 99]]}, "last word ends"),
        ({"audio": "audio/x.0.wav", "text": "x", "words": "x"}, "must be a list"),
        ([], "not a JSON object"),
        ("{", "not a JSON object"),
    ],
)
def test_bad_rows_are_named_and_leave_nothing(corpus, tmp_path, line, message):
    good = json.dumps({"audio": "audio/x.1.wav", "text": "the lazy dog"})
    (corpus / "bad.jsonl").write_text(f"{good}\n{json.dumps(line)}\n")
    with pytest.raises(UserError, match=message) as caught:
        prepare(corpus / "bad.jsonl", tmp_path / "out", samples_per_shard=1)
    assert "bad.jsonl, line 2" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_failed_overwrite_keeps_the_earlier_shards(corpus, tmp_path):
    prepare(corpus / "m.tsv", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (corpus / "bad.jsonl").write_text('{"audio": "none.wav", "text": "x"}\n')
    with pytest.raises(UserError):
        prepare(corpus / "bad.jsonl", tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.doc", "a", "not a .tsv"),
        ("x.csv", 'audio,text\n"a"b,c\n', "line 2.*does not parse"),
        ("none.tsv", None, "does not exist"),
        ("none.xyz", None, "does not exist"),
        ("none", None, "does not exist"),
        ("x.tsv", "audio\ttext\nonly one\n", "line 2.*1 cells under 2"),
        ("x.tsv", "audio\ttext\twords\na\tb\t[\n", "line 2.*`words` does not parse"),
        ("x.tsv", "audio\ttext\n", "no row"),
        ("x.jsonl", "{\n", "line 1.*not JSON"),
        ("x.parquet", "nonsense", "not a readable parquet"),
    ],
)
def test_unreadable_manifests_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / name, tmp_path / "out", kind="manifest" if name.endswith("sv") else "text")
    assert not (tmp_path / "out").exists()


def test_an_unusable_name_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="--source"):
        prepare(corpus / "m.tsv", tmp_path / "out", source="a.b")


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--samples-per-shard", "0", "1 or more"),
        ("--workers", "-1", "1 or more"),
        ("--sample-rate", "16", "1000 to 192000 Hz"),
        ("--sample-rate", "100000000", "1000 to 192000 Hz"),
        ("--loudness", "23", "-120 to 0 dBFS"),
        ("--min-level", "60", "-120 to 0 dBFS"),
        ("--max-bad-fraction", "7", "0 to 1"),
        ("--max-bad-fraction", "-1", "0 to 1"),
        ("--max-clipped", "5", "0 to 1"),
        ("--min-seconds", "-1", "0 or more s"),
        ("--max-seconds", "nan", "more than 0 s"),
        ("--max-seconds", "0", "more than 0 s"),
        ("--min-chars-per-second", "inf", "0 or more"),
        ("--max-chars-per-second", "-3", "more than 0"),
    ],
)
def test_impossible_numbers_are_refused(corpus, tmp_path, capsys, option, value, allowed):
    command = ["prepare", "--manifest", str(corpus / "m.tsv"), "--output", str(tmp_path / "out")]
    assert main([*command, f"{option}={value}"]) == 2
    message = capsys.readouterr().err
    assert f"{option}: " in message
    assert f"give {allowed}\n" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("audio", ["", ".", "/", "audio", ".."])
def test_a_row_that_names_no_file_is_a_broken_one(corpus, tmp_path, audio):
    rows = [json.dumps({"audio": audio, "text": "x"}) + "\n", (corpus / "m.jsonl").read_text()]
    (corpus / "bad.jsonl").write_text("".join(rows))
    with pytest.raises(UserError, match=r"1 broken rows.*\n.*bad\.jsonl, line 1: "):
        prepare(corpus / "bad.jsonl", tmp_path / "out")
    index = prepare(corpus / "bad.jsonl", tmp_path / "out", max_bad_fraction=0.2)
    assert sum(index["rejected"].values()) == 1
    assert index["num_samples"] == 5


def test_long_paths_get_short_distinct_keys(corpus, tmp_path):
    deep = corpus / "/".join(["folder" * 5] * 4)
    deep.mkdir(parents=True)
    rows = []
    for name in ("a", "b"):
        soundfile.write(deep / f"{name}.wav", np.zeros(800), 8000)
        rows.append(json.dumps({"audio": str((deep / f"{name}.wav").relative_to(corpus)), "text": name}) + "\n")
    (corpus / "deep.jsonl").write_text("".join(rows))
    prepare(corpus / "deep.jsonl", tmp_path / "out")
    keys = [sample.key for sample in _samples(tmp_path / "out")]
    assert len(set(keys)) == 2
    assert max(map(len, keys)) <= 80


def test_the_command_line_runs_and_its_help_needs_no_torch(corpus, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args(["--manifest", str(corpus / "m.tsv"), "--output", str(tmp_path / "out")]))
    assert "5 samples" in capsys.readouterr().out
    check = (
        "import sys, argparse; from salad_lightning.corpus.prepare import add_arguments;"
        "add_arguments(argparse.ArgumentParser()); assert not {'torch', 'numpy', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_half_of_a_surrogate_pair_is_a_broken_row(corpus, tmp_path):
    """A JSON escape can spell it, and no file of UTF-8 can hold it."""
    rows = ['{"text": "fine"}', r'{"text": "half \ud83d"}', r'{"text": "x", "title": ["\ud83d"]}']
    (tmp_path / "t.jsonl").write_text("".join(row + "\n" for row in rows))
    index = prepare(tmp_path / "t.jsonl", tmp_path / "out", kind="text", max_bad_fraction=0.9)
    assert index["rejected"] == {"broken row": 2}
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [row["where"][-6:] for row in listed] == ["line 2", "line 3"]
    assert "not Unicode text" in listed[0]["detail"]
    assert not (tmp_path / "out" / ".partial").exists()
    # In a path, where the file's name is listed too.
    audio = [r'{"audio": "\ud83d.wav", "text": "x"}', r'{"audio": "a\u0000b.wav", "text": "x"}']
    (corpus / "paths.jsonl").write_text("".join(row + "\n" for row in [*audio, (corpus / "m.jsonl").read_text()]))
    index = prepare(corpus / "paths.jsonl", tmp_path / "spoken", max_bad_fraction=0.9)
    assert index["rejected"] == {"unreadable audio": 2}
    assert r"\ud83d.wav" in (tmp_path / "spoken" / "rejected.jsonl").read_text()


@pytest.mark.parametrize("trim", [True, False])
def test_an_end_of_speech_that_is_no_number(corpus, tmp_path, trim):
    ends = [None, 0.4, "soon", float("nan"), [1]]
    rows = [
        json.loads(line) | {"speech_end_s": end} for line, end in zip((corpus / "m.jsonl").open(), ends, strict=True)
    ]
    (corpus / "ends.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = prepare(corpus / "ends.jsonl", tmp_path / "out", trim=trim, max_bad_fraction=0.9)
    assert index["rejected"] == {"broken row": 3}
    absent, given = _samples(tmp_path / "out")
    assert "speech_end_s" not in absent.fields
    assert given.fields["speech_end_s"] == pytest.approx(0.4, abs=0.1)
    assert "`speech_end_s` is 'soon', not seconds" in (tmp_path / "out" / "rejected.jsonl").read_text()
