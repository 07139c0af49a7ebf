"""No command writes into the folder that it reads: --overwrite would remove what is read."""

import json
import shutil

import pytest
import soundfile

from salad_lightning.corpus.align import align_shards
from salad_lightning.corpus.encode import encode_shards
from salad_lightning.corpus.prepare import prepare
from salad_lightning.corpus.synthesize import synthesize
from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.errors import UserError
from salad_lightning.testing.shards import save_speech_shards, speak_tones

COMMANDS = {
    "encode": lambda shards, output, **options: encode_shards(shards, output, LogMelEncoder(), **options),
    "align": lambda shards, output, **options: align_shards(shards, output, "no-model", **options),
    "prepare": lambda shards, output, **options: prepare(shards, output, kind="tars", **options),
    "prepare text": lambda shards, output, **options: prepare(shards, output, kind="text", **options),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What an earlier run of ``prepare`` wrote: two shards, index, card, rejected rows."""
    folder = tmp_path_factory.mktemp("written")
    save_speech_shards(folder / "tars", num_samples=4, samples_per_shard=2)
    prepare(folder / "tars", folder / "x", kind="tars", samples_per_shard=2)
    return folder / "x"


@pytest.fixture
def world(written, tmp_path, monkeypatch):
    """A copy of it, as ``x``, and links to all of it and to a single shard."""
    shutil.copytree(written, tmp_path / "x")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.tar").symlink_to(tmp_path / "x" / "x-000001.tar")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _refused(folder, make, inputs, output, **options):
    before = _content(folder)
    with pytest.raises(UserError, match="the output holds its own input") as caught:
        make(inputs, output, **options)
    assert "choose another --output" in caught.value.cure
    assert "add --overwrite" not in str(caught.value)
    assert _content(folder) == before


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_onto_itself(world, command, overwrite):
    _refused(world, COMMANDS[command], str(world / "x"), world / "x", overwrite=overwrite)


@pytest.mark.parametrize(
    ("inputs", "output"),
    [("x", "link"), ("link", "x"), ("linked", "x"), ("x/x-{000000..000001}.tar", "x/../x"), ("link/*.tar", "./x")],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_links_and_relative_paths(world, command, inputs, output):
    _refused(world, COMMANDS[command], inputs, output, overwrite=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_input_inside_the_output(world, command):
    (world / "x" / "raw").mkdir()
    shutil.copy(world / "x" / "x-000000.tar", world / "x" / "raw")
    _refused(world, COMMANDS[command], str(world / "x" / "raw"), world / "x", overwrite=True)


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_a_manifest_or_its_recordings_inside_the_output(world, place):
    audio, _ = speak_tones("one two")
    (world / "x" / "audio").mkdir()
    soundfile.write(world / "x" / "audio" / "a.wav", audio, 16_000)
    soundfile.write(world / "b.wav", audio, 16_000)
    folder, recording = (world, "x/audio/a.wav") if place == "outside" else (world / "x", "../b.wav")
    rows = [{"audio": "\0", "text": "no file is called that"}, {"audio": recording, "text": "one two"}]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _refused(world, prepare, folder / "m.jsonl", world / "x", overwrite=True)


@pytest.mark.parametrize("make", [synthesize, lambda path, output, **options: prepare(path, output, kind="text")])
def test_a_list_that_the_index_names(world, make):
    """Such as the rows that an earlier run left out, put right."""
    index = json.loads((world / "x" / "index.json").read_text())
    (world / "x" / "index.json").write_text(json.dumps(index | {"files": [*index["files"], "left.jsonl"]}))
    (world / "x" / "left.jsonl").write_text('{"text": "one two"}\n')
    _refused(world, make, world / "x" / "left.jsonl", world / "x", overwrite=True)


def test_another_folder_may_be_overwritten(world):
    """Its name begins with that of the input, and its input lies beside."""
    for _ in range(2):
        index = prepare("x", "x-more", kind="tars", overwrite=True)
    assert index["num_samples"] == 4
