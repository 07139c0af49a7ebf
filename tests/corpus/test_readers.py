import gzip
import io
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from salad_lightning.corpus.prepare import prepare
from salad_lightning.data.format import decode, read_shard
from salad_lightning.errors import UserError
from salad_lightning.testing.shards import speak_tones

TEXTS = ["seven bright stars", "the lazy dog", "a small boat"]


def _encoded(audio, kind="FLAC", rate=8000):
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format=kind, **({"subtype": "PCM_16"} if kind in ("FLAC", "WAV") else {}))
    return buffer.getvalue()


def _spoken(number):
    return speak_tones(TEXTS[number], sample_rate_hz=8000)[0]


def _samples(folder):
    paths = sorted(folder.glob("*.tar"))
    return [decode(raw, source="s", sample_rate_hz=8000) for path in paths for raw in read_shard(path)]


def _same(samples, keys, numbers=range(3)):
    assert [sample.key for sample in samples] == keys
    for number, sample in zip(numbers, samples, strict=True):
        expected, _ = soundfile.read(io.BytesIO(_encoded(_spoken(number))), dtype="float32")
        np.testing.assert_array_equal(sample.audio, expected)
        assert sample.text == TEXTS[number]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_hugging_face_folder_with_bytes_and_with_paths(tmp_path, kind):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "two.flac").write_bytes(_encoded(_spoken(2)))
    audio = [{"bytes": _encoded(_spoken(n)), "path": f"{n}.flac"} for n in range(2)]
    audio.append({"bytes": None, "path": "two.flac"})
    kinds = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table(
        {"audio": pyarrow.array(audio, type=kinds), "sentence": TEXTS, "speaker_id": [4, 5, 6]}
    )  # fmt: skip
    if kind == "parquet":  # two rows a group: rows are found again in the right one
        pyarrow.parquet.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=2)
    else:
        with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
            for batch in table.to_batches(max_chunksize=2):
                writer.write_batch(batch)
    index = prepare(tmp_path, tmp_path / "out", kind="hf", text_column="sentence")
    assert index["num_samples"] == 3
    samples = _samples(tmp_path / "out")
    _same(samples, ["0", "1", "two"])
    assert [sample.fields["speaker_id"] for sample in samples] == [4, 5, 6]


def test_hugging_face_paths_that_name_no_file(tmp_path):
    kinds = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    audio = [{"bytes": _encoded(_spoken(n)), "path": path} for n, path in enumerate((".", "/"))]
    table = pyarrow.table({"audio": pyarrow.array(audio, type=kinds), "text": TEXTS[:2]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    prepare(tmp_path, tmp_path / "out", kind="hf")
    _same(_samples(tmp_path / "out"), ["000000000", "000000001"], range(2))


def test_hugging_face_splits_are_not_mixed(tmp_path):
    for split in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(UserError, match="more than one split") as caught:
        prepare(tmp_path, tmp_path / "out", kind="hf")
    assert f"--hf '{tmp_path}/test*'" in str(caught.value)
    with pytest.raises(UserError, match="no column is audio"):
        prepare(f"{tmp_path}/test*", tmp_path / "out", kind="hf")


def _cut(path, *, start=0.0, supervisions, duration):
    recording = {
        "id": "r",
        "sources": [{"type": "file", "channels": [0], "source": path}],
        "sampling_rate": 8000,
        "num_samples": 1,
        "duration": 1.0,
    }
    return {"id": "c", "start": start, "duration": duration, "channel": 0, "supervisions": supervisions,
            "recording": recording, "type": "MonoCut"}  # fmt: skip


def test_lhotse_cuts_keep_words_and_their_times(tmp_path):
    """One long recording, a cut that begins inside it, two supervisions inside the cut."""
    spoken = [speak_tones(text, sample_rate_hz=8000) for text in TEXTS]
    soundfile.write(tmp_path / "long.flac", np.concatenate([audio for audio, _ in spoken]), 8000)
    lengths = [len(audio) / 8000 for audio, _ in spoken]
    supervisions, at = [], 0.0
    for number in (1, 2):
        words = [[word, round(at + start, 4), round(end - start, 4), 0.9] for word, start, end in spoken[number][1]]
        supervisions.append(
            {"id": f"s{number}", "recording_id": "r", "start": at, "duration": lengths[number], "channel": 0,
             "text": TEXTS[number], "language": "en", "speaker": "x", "alignment": {"word": words}}
        )  # fmt: skip
        at += lengths[number]
    # LibriHeavy's way of giving the transcript.
    supervisions[1] |= {"text": None, "custom": {"texts": [TEXTS[2], TEXTS[2].upper()]}}
    cut = _cut("long.flac", start=lengths[0], supervisions=supervisions, duration=at)
    with gzip.open(tmp_path / "cuts.jsonl.gz", "wt") as file:
        file.write(json.dumps(cut) + "\n")
    prepare(tmp_path / "cuts.jsonl.gz", tmp_path / "out", kind="lhotse")
    samples = _samples(tmp_path / "out")
    _same(samples, ["s1", "s2"], (1, 2))
    for number, sample in zip((1, 2), samples, strict=True):
        assert [word.word for word in sample.words] == [word for word, _, _ in spoken[number][1]]
        times = [(word.start_s, word.end_s) for word in sample.words]
        np.testing.assert_allclose(times, [(start, end) for _, start, end in spoken[number][1]], atol=2e-3)
        assert sample.fields["language"] == "en"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cut: cut["recording"]["sources"][0].update(type="command"), "only sources of type `file`"),
        (lambda cut: cut["supervisions"][0].pop("start"), "does not parse"),
        (lambda cut: cut["supervisions"][0].update(duration=float("nan")), "the supervision lasts nan s"),
        (lambda cut: cut["supervisions"][0].update(duration=-1.0), "the supervision lasts -1.0 s"),
        (lambda cut: cut.update(start=float("inf")), "the cut begins at inf s"),
        (lambda cut: cut.update(supervisions=["x"]), "supervision 0 is not an object"),
        (
            lambda cut: cut["supervisions"][0].update(alignment={"word": [["x", 40.0, 1.0]]}),
            "lie outside of the supervision",
        ),
        (lambda cut: cut.pop("recording"), "not a cut of one recording"),
    ],
)
def test_lhotse_cuts_that_cannot_be_read_are_named(tmp_path, change, message):
    cut = _cut("x.flac", supervisions=[{"id": "s", "start": 0.0, "duration": 1.0, "text": "x"}], duration=1.0)
    change(cut)
    (tmp_path / "cuts.jsonl").write_text(json.dumps(cut) + "\n")
    with pytest.raises(UserError, match=message) as caught:
        prepare(tmp_path / "cuts.jsonl", tmp_path / "out", kind="lhotse")
    assert "cuts.jsonl, line 1" in str(caught.value)


def test_a_compressed_line_without_end_is_not_read_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr("salad_lightning.corpus.lhotse._LONGEST_LINE", 1000)
    with gzip.open(tmp_path / "cuts.jsonl.gz", "wt") as file:
        file.write("[" + " " * 10**7)
    with pytest.raises(UserError, match=r"cuts\.jsonl\.gz, line 1: not JSON .*char 1000"):
        prepare(tmp_path / "cuts.jsonl.gz", tmp_path / "out", kind="lhotse")


def test_librispeech_folders(tmp_path):
    for number, text in enumerate(TEXTS):
        folder = tmp_path / "corpus" / f"{number}" / "7"
        folder.mkdir(parents=True)
        (folder / f"{number}-7.trans.txt").write_text(f"{number}-7-0000 {text}\n")
        (folder / f"{number}-7-0000.flac").write_bytes(_encoded(_spoken(number)))
    prepare(tmp_path / "corpus", tmp_path / "out", kind="librispeech")
    samples = _samples(tmp_path / "out")
    _same(samples, [f"{number}-7-0000" for number in range(3)])
    assert [sample.fields["speaker"] for sample in samples] == ["0", "1", "2"]
    with pytest.raises(UserError, match=r"no \*\.trans\.txt"):
        prepare(tmp_path / "out", tmp_path / "out2", kind="librispeech")


def _tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize(("kind", "exact"), [("WAV", True), ("FLAC", True), ("OGG", False), ("MP3", False)])
def test_tars_made_by_others(tmp_path, kind, exact):
    extension = kind.lower()
    members = [("a/x.0.txt", b"taken by another extension")]  # extension `0.txt`: not ours
    for number, text in enumerate(TEXTS):
        record = json.dumps({"text": text, "lang": "en"}).encode()
        members.append((f"a/x{number}.{extension}", _encoded(_spoken(number), kind)))
        members.append((f"a/x{number}.txt", text.encode()) if number else (f"a/x{number}.json", record))
    _tar(tmp_path / "t-0.tar", members)
    prepare(f"{tmp_path}/t-{{0..0}}.tar", tmp_path / "out", kind="tars")
    samples = _samples(tmp_path / "out")
    assert [sample.key for sample in samples] == ["a_x0", "a_x1", "a_x2"]
    assert [sample.text for sample in samples] == TEXTS
    assert samples[0].fields["lang"] == "en"
    for number, sample in enumerate(samples):
        error = np.abs(sample.audio[: len(_spoken(number))] - _spoken(number)[: len(sample.audio)]).mean()
        assert error < (1e-4 if exact else 0.05)


def test_tars_with_broken_samples_and_broken_tars(tmp_path):
    good = [(f"g{number}.wav", _encoded(_spoken(0), "WAV")) for number in range(2)]
    texts = [("g0.txt", b"fine"), ("g1.txt", b"\xff\xfe no utf-8")]
    _tar(tmp_path / "t.tar", [good[0], texts[0], good[1], texts[1]])
    index = prepare(tmp_path / "t.tar", tmp_path / "out", kind="tars", max_bad_fraction=0.5)
    assert index["rejected"] == {"broken row": 1}
    assert [sample.text for sample in _samples(tmp_path / "out")] == ["fine"]
    content = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: len(content) // 3])
    with pytest.raises(UserError, match=r"cut off|unexpected end"):
        prepare(tmp_path / "cut.tar", tmp_path / "out2", kind="tars")
    (tmp_path / "z.tar").write_bytes(gzip.compress(content))
    with pytest.raises(UserError, match="unpack it if it is compressed"):
        prepare(tmp_path / "z.tar", tmp_path / "out3", kind="tars")


@pytest.mark.parametrize("name", ["../x.wav", "/etc/x.wav", "a/../../x.json"])
def test_paths_out_of_a_tar_are_refused(tmp_path, name):
    _tar(tmp_path / "t.tar", [("g.wav", _encoded(_spoken(0), "WAV")), ("g.txt", b"fine"), (name, b"{}")])
    with pytest.raises(UserError, match="a path outside of it") as caught:
        prepare(tmp_path / "t.tar", tmp_path / "out", kind="tars")
    assert caught.value.where == str(tmp_path / "t.tar")


def test_a_sparse_member_is_not_unpacked(tmp_path):
    """A few bytes that stand for 100 GB of zeros."""
    member = tarfile.TarInfo("x.json")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**11)}
    member.size = 512
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(b"1\n0\n0\n".ljust(512, b"\0")))
    with pytest.raises(UserError, match="is sparse"):
        prepare(tmp_path / "t.tar", tmp_path / "out", kind="tars")


def test_a_part_of_absurd_length_is_refused_before_it_is_decoded(tmp_path):
    content = bytearray(_encoded(_spoken(0)))
    content[21:26] = bytes([content[21] | 0x0F, 255, 255, 255, 255])  # FLAC's count of samples: 8 × 10⁶ s
    (tmp_path / "x.flac").write_bytes(content)
    supervision = {"id": "s", "start": 0.0, "duration": 8e6, "text": "x"}
    cut = _cut("x.flac", supervisions=[supervision], duration=8e6)
    (tmp_path / "cuts.jsonl").write_text(json.dumps(cut) + "\n")
    with pytest.raises(UserError, match="the audio claims 8000000 s"):
        prepare(tmp_path / "cuts.jsonl", tmp_path / "out", kind="lhotse")


def test_plain_text_from_shards_and_folders(tmp_path):
    _tar(tmp_path / "web.tar", [("a.txt", b"one"), ("b.json", b'{"text": "two", "url": "u"}')])
    prepare(tmp_path / "web.tar", tmp_path / "out", kind="text")
    assert [sample.text for sample in _samples(tmp_path / "out")] == ["one", "two"]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.jsonl").write_text('{"text": "three"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), folder / "a.parquet")
    prepare(folder, tmp_path / "out2", kind="text")
    assert [sample.text for sample in _samples(tmp_path / "out2")] == ["one", "two", "three"]
    prepare(f"{folder}/*.jsonl", tmp_path / "out3", kind="text")
    assert [sample.text for sample in _samples(tmp_path / "out3")] == ["three"]


def test_csv_manifests_may_quote(tmp_path):
    soundfile.write(tmp_path / "x.wav", _spoken(0), 8000)
    (tmp_path / "m.csv").write_text('audio,text,words\nx.wav,"seven, bright","[[""seven"", 0, 0.1]]"\n')
    prepare(tmp_path / "m.csv", tmp_path / "out")
    (sample,) = _samples(tmp_path / "out")
    assert sample.text == "seven, bright"
    assert sample.words == [("seven", 0.0, 0.1)]


def test_a_manifest_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"audio": "x.wav", "text": "\xff"}\n')
    with pytest.raises(UserError, match=r"line 1.*not JSON"):
        prepare(tmp_path / "m.jsonl", tmp_path / "out")
    lines = ["audio,text", *["x.wav,coffee"] * 5000, "x.wav,café"]  # more than is decoded at once
    table = "\n".join(lines)
    for name, content, place in (
        ("m.csv", table.encode("latin-1"), "line 5002: not UTF-8 (byte 0xe9)"),
        ("m.tsv", table.replace(",", "\t").encode("latin-1"), "line 5002: not UTF-8 (byte 0xe9)"),
        ("utf-16.csv", table.encode("utf-16"), "line 1: not UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            prepare(tmp_path / name, tmp_path / "out", samples_per_shard=9999)
        assert f"{name}, {place}" in str(caught.value)
        assert f"iconv -f {'utf-16' if 'utf-16' in name else 'latin1'} -t utf-8" in caught.value.cure


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cut: cut.update(supervisions=None), "`supervisions` is not a list"),
        (lambda cut: cut["supervisions"][0].update(custom=["x"]), "does not parse"),
        (lambda cut: cut["supervisions"][0].update(alignment=["x"]), "does not parse"),
        (lambda cut: cut["supervisions"][0].update(text=None, custom={"texts": {"a": "x"}}), "does not parse"),
    ],
)
def test_lhotse_fields_of_another_shape_are_named(tmp_path, change, message):
    test_lhotse_cuts_that_cannot_be_read_are_named(tmp_path, change, message)


def test_damaged_compressed_cuts_are_named(tmp_path):
    content = bytearray(gzip.compress(json.dumps({"x": "y" * 1000}).encode()))
    content[10:20] = b"\xff" * 10  # behind the header
    (tmp_path / "cuts.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"cuts\.jsonl\.gz, line 0: not JSON .*decompressing"):
        prepare(tmp_path / "cuts.jsonl.gz", tmp_path / "out", kind="lhotse")


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("kind", ["text", "lhotse"])
def test_json_too_deep_to_be_read_is_named(tmp_path, kind):
    (tmp_path / "deep.jsonl").write_text(f'{{"text": {DEEP}}}\n')
    with pytest.raises(UserError, match=r"deep\.jsonl, line 1: not JSON .*recursion"):
        prepare(tmp_path / "deep.jsonl", tmp_path / "out", kind=kind)


def test_json_too_deep_in_a_cell_or_a_tar_is_named(tmp_path):
    (tmp_path / "deep.csv").write_text(f"audio,text,words\nx.wav,x,{DEEP[:100_000]}\n")
    with pytest.raises(UserError, match=r"line 2: `words` does not parse"):
        prepare(tmp_path / "deep.csv", tmp_path / "out")
    _tar(tmp_path / "deep.tar", [("a.txt", b"fine"), ("b.json", f'{{"text": {DEEP}}}'.encode())])
    index = prepare(tmp_path / "deep.tar", tmp_path / "out", kind="text", max_bad_fraction=0.5)
    assert index["rejected"] == {"broken row": 1}


def test_librispeech_transcripts_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "1-7.trans.txt").write_bytes("1-7-0000 café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"1-7\.trans\.txt: not UTF-8") as caught:
        prepare(tmp_path, tmp_path / "out", kind="librispeech")
    assert caught.value.cure == "convert it to UTF-8"
