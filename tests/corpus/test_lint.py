import io
import json
import tarfile

import numpy as np
import pytest
import soundfile

from salad_lightning import cli
from salad_lightning.corpus.lint import lint
from salad_lightning.corpus.prepare import prepare
from salad_lightning.data.arrays import encode_array
from salad_lightning.data.audio import encode_flac
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.testing.shards import save_speech_shards, save_text_shards, speak_tones
from salad_lightning.testing.tiny import save_tiny_tokenizer


def _problems(report):
    return {(problem["key"], problem["problem"]) for problem in report["problems"]}


def test_clean_shards_are_counted(tmp_path):
    save_speech_shards(tmp_path / "s", fields={"language": "en"})
    save_tiny_tokenizer(tmp_path / "tokenizer")
    report, lengths = lint(str(tmp_path / "s"), tokenizer=str(tmp_path / "tokenizer"), positions_per_second=10)
    assert report["problems"] == []
    assert (report["shards"], report["samples"], report["samples_with_word_times"]) == (3, 12, 12)
    assert report["languages"] == {"en": 12}
    assert report["speakers"] == 3
    assert report["seconds"] == pytest.approx(sum(lengths), abs=1e-3)
    assert report["hours"] == pytest.approx(report["seconds"] / 3600, abs=1e-3)
    assert report["tokens"] > report["words"]
    read = report["tokens"] / report["seconds"]
    assert report["positions_per_second"]["read"] == pytest.approx(read, abs=1e-3)
    assert report["positions_per_second"]["interleaved"] == pytest.approx(2 / 3 * read + 10 / 3, abs=1e-3)


def _faulty(folder):
    """Shards with one fault of each kind, and a good sample after each."""
    good = encode_flac(speak_tones("hello")[0], 16_000)
    nan = np.full(1600, np.nan, dtype=np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, nan, 16_000, format="WAV", subtype="FLOAT")
    faults = {
        "no_text": ({"text": " "}, good, "flac"),
        "no_sound": ({"text": "hello"}, b"fLaC nonsense", "flac"),
        "silent": ({"text": "hello"}, encode_flac(np.zeros(1600, dtype=np.float32), 16_000), "flac"),
        "nan": ({"text": "hello"}, buffer.getvalue(), "wav"),
        "late": ({"text": "hello", "words": [["hello", 0, 9.0]]}, good, "flac"),
        "backwards": ({"text": "hello", "words": [["hello", 2, 1]]}, good, "flac"),
        "other": ({"text": "hello", "words": [["goodbye", 0, 0.1]]}, good, "flac"),
        "stored": ({"text": "hello", "encoded": {}}, encode_array(np.zeros((4, 2), dtype=np.float32)), "frames.npy"),
    }
    with ShardWriter(folder, "faulty", 100) as writer:
        for name, (record, content, extension) in faults.items():
            writer.write(name, record, content, extension)
            writer.write(f"{name}_good", {"text": "hello"}, good)
    return set(faults)


def test_every_fault_is_found_and_named(tmp_path):
    names = _faulty(tmp_path)
    report, _ = lint(str(tmp_path))
    assert {problem["key"] for problem in report["problems"]} == names
    assert {problem["shard"] for problem in report["problems"]} == {str(tmp_path / "faulty-000000.tar")}
    found = dict(_problems(report))
    assert "no `text`" in found["no_text"]
    assert "cannot be decoded" in found["no_sound"]
    assert "silent" in found["silent"]
    assert "NaN" in found["nan"]
    assert "ends at 9.0 s" in found["late"]
    assert "backwards" in found["backwards"]
    assert "do not spell" in found["other"]
    assert "encoder" in found["stored"]


@pytest.mark.parametrize("cut", ["between", "inside"])
def test_faults_of_whole_shards(tmp_path, cut):
    folder = save_text_shards(tmp_path / "t", num_samples=40, samples_per_shard=10)
    paths = sorted(folder.glob("*.tar"))
    content = paths[1].read_bytes()
    # A tar that ends between two headers passes for a whole one elsewhere.
    paths[1].write_bytes(content[: 512 * 8 if cut == "between" else 512 * 8 + 600])
    paths[2].write_bytes(paths[0].read_bytes())  # the same keys again
    with tarfile.open(paths[3], "w") as tar:
        for name in ("x.json", "y.json", "x.json"):
            entry = tarfile.TarInfo(name)
            entry.size = len(record := b'{"text": "one"}')
            tar.addfile(entry, io.BytesIO(record))
    report, _ = lint([str(folder)])
    by_shard = {}
    for problem in report["problems"]:
        by_shard.setdefault(problem["shard"], []).append(problem["problem"])
    assert set(by_shard) == {str(path) for path in paths[1:]}
    assert "cut off" in by_shard[str(paths[1])][0] or "not a readable shard" in by_shard[str(paths[1])][0]
    assert len(by_shard[str(paths[2])]) == 10
    assert str(paths[0]) in by_shard[str(paths[2])][0]
    assert by_shard[str(paths[3])] == ["the key occurs twice"]


def test_shards_are_held_against_their_index(tmp_path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(6)))
    prepare(manifest, tmp_path / "x", kind="text", samples_per_shard=2)
    assert lint(str(tmp_path / "x"))[0]["problems"] == []
    (tmp_path / "x" / "x-000000.tar").write_bytes((tmp_path / "x" / "x-000001.tar").read_bytes())
    (tmp_path / "x" / "x-000002.tar").rename(tmp_path / "x" / "y.tar")
    problems = {
        entry["shard"].rpartition("/")[2]: entry["problem"] for entry in lint(str(tmp_path / "x"))[0]["problems"]
    }
    assert "SHA-256" in problems["x-000000.tar"]
    assert "missing" in problems["x-000002.tar"]
    assert "does not list" in problems["y.tar"]
    # One shard by itself is not told that the others are missing.
    assert lint(str(tmp_path / "x" / "y.tar"))[0]["problems"] != []
    assert lint(str(tmp_path / "x" / "x-000001.tar"))[0]["problems"] == []


def test_the_command_line(tmp_path, capsys):
    save_speech_shards(tmp_path / "s")
    assert cli.main(["lint", str(tmp_path / "s"), "--plot", str(tmp_path / "plot.png")]) == 0
    assert "no problem" in capsys.readouterr().out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    _faulty(tmp_path / "f")
    assert cli.main(["lint", str(tmp_path / "f"), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 8
    assert cli.main(["lint", str(tmp_path / "f")]) == 1
    assert f"{tmp_path}/f/faulty-000000.tar: silent: the audio is silent" in capsys.readouterr().out


def test_bad_input(tmp_path, capsys):
    save_text_shards(tmp_path / "t")
    for arguments, words in (
        (["nowhere"], "nowhere"),
        ([str(tmp_path / "t"), "--tokenizer", str(tmp_path)], "no tokenizer"),
        ([str(tmp_path / "t"), "--plot", str(tmp_path / "x.nonsense")], "plot"),
    ):
        assert cli.main(["lint", *arguments]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_workers_find_the_same(tmp_path):
    save_speech_shards(tmp_path / "s")
    _faulty(tmp_path)
    paths = [str(tmp_path / "s"), str(tmp_path)]
    assert lint(paths, workers=2) == lint(paths)


def test_plain_text_beside_speech_adds_no_seconds(tmp_path):
    save_speech_shards(tmp_path / "speech", num_samples=3)
    save_text_shards(tmp_path / "text", num_samples=5)
    alone, seconds = lint(str(tmp_path / "speech"))
    both, mixed = lint([str(tmp_path / "speech"), str(tmp_path / "text")])
    assert both["seconds"] == alone["seconds"] == pytest.approx(sum(seconds), abs=1e-3)
    assert mixed == seconds
