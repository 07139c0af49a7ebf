"""Pre-encoded shards: the same training as from audio, and refusals where it would not be."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml

from salad_lightning.cli import main
from salad_lightning.corpus.encode import encode_shards
from salad_lightning.data.arrays import encode_array
from salad_lightning.data.format import decode, read_shard
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.errors import UserError
from salad_lightning.testing.runs import save_tiny_world
from salad_lightning.testing.shards import save_speech_shards
from salad_lightning.testing.tiny_encoders import save_tiny_mimi, save_tiny_wav2vec2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_tiny_world(tmp_path_factory.mktemp("world"))


def _encoder_file(world, name, encoder):
    """An overlay that names another encoder."""
    path = world.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"model": {"init_args": {"encoder": encoder}}}))
    return path


def _losses(world, name, speech, *options):
    sources = [{"shards": str(path), "name": "speech", "documents": documents} for path, documents in speech]
    overlay = world.folder / f"{name}-data.yaml"
    overlay.write_text(yaml.safe_dump({"data": {"init_args": {"train": sources}}}))
    run = world.run("fit", name, *options, "--config", str(overlay), "--trainer.max_steps=4")
    return run.column("train/loss")


INTERLEAVE = {"class_path": "InterleaveDocuments", "init_args": {"text_words": [1, 4], "speech_words": [2, 5]}}
TEMPLATE = {"class_path": "TemplateDocuments", "init_args": {"template": "{speech} {speaker}: {answer}"}}


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [("mel", "float32", 1e-6), ("mel", "float16", 1e-2), ("latents", "float16", 0.0), ("codes", "float16", 0.0)],
)
def test_training_gives_the_same_loss_as_from_audio(world, tmp_path, kind, dtype, tolerance):
    encoder = {"class_path": "LogMelEncoder"}
    if kind != "mel":
        path = save_tiny_mimi(tmp_path / "mimi")
        encoder = {"class_path": "MimiEncoder", "init_args": {"path": path, "input": kind, "num_quantizers": 4}}
    overlay = _encoder_file(world, f"{kind}-{dtype}", encoder)
    options = ["--config", str(world.config), "--config", str(overlay), "--dtype", dtype]
    assert main(["encode", str(world.folder / "speech"), "--output", str(tmp_path / "encoded"), *options]) == 0
    name = f"{kind}-{dtype}"
    from_audio = _losses(world, f"{name}-a", [(world.folder / "speech", INTERLEAVE)], "--config", str(overlay))
    encoded = _losses(world, f"{name}-e", [(tmp_path / "encoded", INTERLEAVE)], "--config", str(overlay))
    assert len(from_audio) == 4
    np.testing.assert_allclose(encoded, from_audio, rtol=tolerance)


def test_audio_and_encoded_speech_mix_in_one_batch(world, tmp_path):
    encode_shards(str(world.folder / "speech"), tmp_path / "encoded", LogMelEncoder(), dtype="float32")
    shards = sorted((world.folder / "speech").glob("*.tar"))
    half = tmp_path / "half"
    half.mkdir()
    for index, shard in enumerate(shards):
        source = shard if index % 2 else tmp_path / "encoded" / shard.name
        (half / shard.name).symlink_to(source)
    plain = _losses(world, "plain", [(world.folder / "speech", INTERLEAVE)])
    mixed = _losses(world, "mixed", [(half, INTERLEAVE)])
    np.testing.assert_allclose(mixed, plain, rtol=1e-5)


def test_what_is_kept(tmp_path):
    save_speech_shards(tmp_path / "audio", num_samples=6, fields={"domain": "d"})
    index = encode_shards(str(tmp_path / "audio"), tmp_path / "encoded", LogMelEncoder())
    assert index is not None
    assert index["num_samples"] == 6
    assert json.loads((tmp_path / "encoded" / "index.json").read_text()) == index
    assert sorted(path.name for path in (tmp_path / "encoded").iterdir()) == [
        "index.json", "speech-000000.tar", "speech-000001.tar",
    ]  # fmt: skip
    before = [raw for path in sorted((tmp_path / "audio").glob("*.tar")) for raw in read_shard(path)]
    after = [raw for path in sorted((tmp_path / "encoded").glob("*.tar")) for raw in read_shard(path)]
    for old, new in zip(before, after, strict=True):
        was = decode(old, source="s", sample_rate_hz=16_000)
        utterance = decode(new, source="s", sample_rate_hz=16_000)
        assert (utterance.key, utterance.text, utterance.words) == (was.key, was.text, was.words)
        assert utterance.fields == was.fields
        assert utterance.num_samples == was.num_samples == len(was.audio)
        assert utterance.audio is None
        frames = LogMelEncoder().encode(torch.from_numpy(was.audio)[None], torch.tensor([len(was.audio)])).data[0]
        np.testing.assert_allclose(utterance.encoded.data, frames.numpy(), atol=2e-3)


def test_codes_take_a_byte_each(tmp_path):
    from salad_lightning.encoders.mimi import MimiEncoder

    save_speech_shards(tmp_path / "audio", num_samples=2, sample_rate_hz=24_000)
    encoder = MimiEncoder(save_tiny_mimi(tmp_path / "mimi"), num_quantizers=4)
    encode_shards(str(tmp_path / "audio"), tmp_path / "encoded", encoder)
    (raw, *_) = read_shard(tmp_path / "encoded" / "speech-000000.tar")
    codes = np.load(io.BytesIO(raw.members["codes.npy"]), allow_pickle=False)
    assert codes.dtype == np.uint8
    assert codes.shape[1] == 4


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    save_speech_shards(tmp_path / "audio", num_samples=600, samples_per_shard=20)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": {"init_args": {"encoder": {"class_path": "LogMelEncoder"}}}}))
    command = [sys.executable, "-m", "salad_lightning", "encode", str(tmp_path / "audio"), "--config", str(recipe)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert subprocess.run([*command, "--output", str(whole)], capture_output=True, check=False).returncode == 0
    process = subprocess.Popen(
        [*command, "--output", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    partial = killed / ".partial"
    while len(list(partial.glob("*.tar.json"))) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(killed.glob("*.tar"))  # nothing under a final name
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    assert subprocess.run([*command, "--output", str(killed)], capture_output=True, check=False).returncode == 0
    assert not partial.exists()
    for path in sorted(whole.iterdir()):
        assert (killed / path.name).read_bytes() == path.read_bytes()
    kept = [name for name, stamp in finished.items() if (killed / name).stat().st_mtime_ns == stamp]
    assert len(kept) >= 5


def _documents(world, shards, *options):
    return main(world.arguments("fit", "refused", "--config", str(shards), "--trainer.max_steps=1", *options))


def _refusal(world, capfd, path, documents, *options):
    overlay = world.folder / "refusal.yaml"
    overlay.write_text(
        yaml.safe_dump({"data": {"init_args": {"train": [{"shards": str(path), "documents": documents}]}}})
    )
    assert _documents(world, overlay, *options) == 2
    return capfd.readouterr().err


def test_another_encoder_is_refused(world, tmp_path, capfd):
    encode_shards(str(world.folder / "speech"), tmp_path / "encoded", LogMelEncoder(num_mels=40))
    message = _refusal(world, capfd, tmp_path / "encoded", INTERLEAVE)
    assert "speech-0000" in message
    assert "encoded by LogMelEncoder-" in message
    assert "encode the shards again" in message


def test_spans_are_not_cut_out_of_frames_that_hear_what_follows(world, tmp_path, capfd):
    encoder = {"class_path": "SelfSupervisedEncoder", "init_args": {"path": save_tiny_wav2vec2(tmp_path / "w2v2")}}
    overlay = _encoder_file(world, "w2v2", encoder)
    save_speech_shards(tmp_path / "audio", num_samples=8, fields={"answer": "bread"})
    audio, encoded = str(tmp_path / "audio"), str(tmp_path / "encoded")
    assert main(["encode", audio, "--output", encoded, "--config", str(overlay), "--dtype", "float32"]) == 0
    options = ("--config", str(overlay))
    message = _refusal(world, capfd, encoded, INTERLEAVE, *options)
    assert "hear what follows" in message
    # Whole utterances are what was encoded.
    from_audio = _losses(world, "w2v2-a", [(audio, TEMPLATE)], *options)
    np.testing.assert_allclose(_losses(world, "w2v2-e", [(encoded, TEMPLATE)], *options), from_audio, rtol=1e-4)


def test_encoded_speech_cannot_be_muted(world, tmp_path, capfd):
    encode_shards(str(world.folder / "speech"), tmp_path / "encoded", LogMelEncoder())
    muted = {"class_path": "InterleaveDocuments", "init_args": {"control": "muted"}}
    assert "cannot be muted" in _refusal(world, capfd, tmp_path / "encoded", muted)


@pytest.mark.parametrize(
    ("content", "about"),
    [
        (b"not numpy", {"by": "x", "num_samples": 9}),
        (encode_array(np.zeros((0, 4), np.float32)), {"by": "x", "num_samples": 9}),
        (encode_array(np.zeros((3, 4), np.int64)), {"by": "x", "num_samples": 9}),
        (encode_array(np.zeros((3, 4), np.float32)), None),
        (encode_array(np.zeros((3, 4), np.float32)), {"by": "x", "num_samples": "many"}),
    ],
)
def test_a_broken_member_is_named(tmp_path, content, about):
    with ShardWriter(tmp_path, "a") as writer:
        writer.write("k", {"text": "x", "encoded": about}, content, "frames.npy")
    (raw,) = read_shard(tmp_path / "a-000000.tar")
    with pytest.raises(UserError, match=r"a-000000.tar: k.frames.npy") as error:
        decode(raw, source="s", sample_rate_hz=16_000)
    assert "encode" in str(error.value)


def test_pickles_are_never_loaded(tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    buffer = io.BytesIO()
    np.save(buffer, np.array([Harm()], dtype=object), allow_pickle=True)
    with ShardWriter(tmp_path, "a") as writer:
        writer.write("k", {"text": "x", "encoded": {"by": "x", "num_samples": 1}}, buffer.getvalue(), "frames.npy")
    (raw,) = read_shard(tmp_path / "a-000000.tar")
    with pytest.raises(UserError):
        decode(raw, source="s", sample_rate_hz=16_000)
    assert not (tmp_path / "harm").exists()


def test_mistakes_of_the_command_line(world, tmp_path, capfd):
    speech, config = str(world.folder / "speech"), str(world.config)
    empty = tmp_path / "empty.yaml"
    empty.write_text("trainer: {max_steps: 1}\n")
    unknown = tmp_path / "unknown.yaml"
    unknown.write_text("model: {init_args: {encoder: {class_path: NoSuchEncoder}}}\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    output = str(tmp_path / "out")
    for arguments, word in [
        ([speech, "--output", output, "--config", str(empty)], "encoder"),
        ([speech, "--output", output, "--config", str(unknown)], "NoSuchEncoder"),
        ([speech, "--output", output, "--config", str(tmp_path / "none.yaml")], "none.yaml"),
        ([speech, "--output", str(tmp_path / "full"), "--config", config, "--overwrite"], "notes.txt"),
        ([str(world.folder / "text"), "--output", output, "--config", config], "no audio"),
        ([str(tmp_path / "nowhere"), "--output", output, "--config", config], "nowhere"),
        ([speech, "--output", output, "--config", config, "--batch-seconds", "0"], "batch-seconds"),
        ([speech, "--output", output, "--config", config, "--batch-seconds", "inf"], "batch-seconds"),
        ([speech, "--output", output, "--config", config, "--workers", "-1"], "--workers: -1 is out of range"),
        ([speech, "--output", output, "--config", config, "--devices", "-3"], "--devices 1 or more"),
        ([speech, "--output", output, "--config", config, "--accelerator", "abacus"], "abacus"),
    ]:
        assert main(["encode", *arguments]) == 2
        assert word in capfd.readouterr().err
        assert not Path(output).exists()
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_bytes_do_not_depend_on_reading_ahead(tmp_path):
    save_speech_shards(tmp_path / "audio", num_samples=9)
    for name, workers in (("none", 0), ("two", 2)):
        encode_shards(str(tmp_path / "audio"), tmp_path / name, LogMelEncoder(), num_workers=workers)
    for path in (tmp_path / "none").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()
    with tarfile.open(tmp_path / "two" / "speech-000000.tar") as tar:
        assert tar.getnames()[:2] == ["speech000000.frames.npy", "speech000000.json"]


class CountedEncoder(LogMelEncoder):
    """Counts how often its weights are read."""

    identities = 0

    def identity(self):
        CountedEncoder.identities += 1
        return super().identity()


def test_the_encoder_is_identified_once(tmp_path):
    save_speech_shards(tmp_path / "audio", num_samples=6, samples_per_shard=2)
    CountedEncoder.identities = 0
    encode_shards(str(tmp_path / "audio"), tmp_path / "encoded", CountedEncoder())
    assert CountedEncoder.identities == 1


def _with_other_text(path):
    """Write a shard again with a text of the same length: tars are padded, so the size stays."""
    before = path.stat().st_size
    raws = list(read_shard(path))
    with ShardWriter(path.parent, path.stem, 0) as writer:
        for raw in raws:
            record = json.loads(raw.members["json"])
            writer.write(raw.key, record | {"text": record["text"].upper()}, raw.members["flac"])
    assert path.stat().st_size == before


def _texts(folder):
    return [
        json.loads(raw.members["json"])["text"] for path in sorted(folder.glob("*.tar")) for raw in read_shard(path)
    ]


def test_a_text_corrected_after_a_kill_is_not_lost(tmp_path, monkeypatch):
    save_speech_shards(tmp_path / "audio", num_samples=6, samples_per_shard=2)
    folder, output = tmp_path / "audio", tmp_path / "encoded"
    last = sorted(folder.glob("*.tar"))[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:1000])  # it ends here, as after a kill: what is finished is kept
    monkeypatch.setattr("salad_lightning.corpus.workspace._WORTH_KEEPING", 0)
    with pytest.raises(UserError):
        encode_shards(str(folder), output, LogMelEncoder())
    last.write_bytes(whole)
    kept = {path.name: path.stat().st_ino for path in output.glob(".partial/*.tar")}
    assert len(kept) == 2
    _with_other_text(folder / "speech-000000.tar")
    encode_shards(str(folder), output, LogMelEncoder())
    assert _texts(output) == _texts(folder)
    assert {name for name, node in kept.items() if (output / name).stat().st_ino != node} == {"speech-000000.tar"}


def _interrupted_publication(monkeypatch, shards, output):
    """All is encoded and about to move into place."""
    with monkeypatch.context() as patch:
        patch.setattr("salad_lightning.corpus.workspace._publish", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            encode_shards(str(shards), output, LogMelEncoder(), accelerator="cpu")
    assert (output / ".partial" / "publish.json").exists()


def test_a_text_corrected_while_files_move_is_not_lost(tmp_path, monkeypatch):
    save_speech_shards(tmp_path / "audio", num_samples=4, samples_per_shard=2)
    _interrupted_publication(monkeypatch, tmp_path / "audio", tmp_path / "encoded")
    _with_other_text(tmp_path / "audio" / "speech-000000.tar")
    encode_shards(str(tmp_path / "audio"), tmp_path / "encoded", LogMelEncoder(), overwrite=True)
    assert _texts(tmp_path / "encoded") == _texts(tmp_path / "audio")


@pytest.mark.slow
@pytest.mark.parametrize("left", ["a publication", "one shard"])
def test_all_ranks_go_the_way_of_the_first(tmp_path, monkeypatch, left):
    """Under torchrun all of them look into the folder, and the first one changes it meanwhile."""
    save_speech_shards(tmp_path / "audio", num_samples=6, samples_per_shard=2)
    encode_shards(str(tmp_path / "audio"), tmp_path / "whole", LogMelEncoder(), accelerator="cpu")
    output = tmp_path / "encoded"
    _interrupted_publication(monkeypatch, tmp_path / "audio", output)
    if left == "one shard":
        for name in ("publish.json", "speech-000001.tar.json"):
            (output / ".partial" / name).unlink()
    script = tmp_path / "encode.py"
    script.write_text(
        "import os, sys, time\n"
        "from salad_lightning.corpus.encode import encode_shards\n"
        "from salad_lightning.encoders.log_mel import LogMelEncoder\n"
        "time.sleep(3 * int(os.environ['RANK']))\n"  # the first one is ahead
        "index = encode_shards(sys.argv[1], sys.argv[2], LogMelEncoder(), accelerator='cpu', devices=2)\n"
        "assert (index is None) == (os.environ['RANK'] == '1')\n"
        "os._exit(0)\n"  # threads of torch.distributed seldom, but do abort a process that ends
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path / "audio"), str(output)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


def test_a_rank_that_is_late_needs_no_report(tmp_path, monkeypatch):
    """The first rank has published and removed them by then."""
    save_speech_shards(tmp_path / "audio", num_samples=2)
    trainer = Mock(is_global_zero=False, world_size=2)
    monkeypatch.setattr("salad_lightning.corpus.encode.pl.Trainer", lambda **options: trainer)
    assert encode_shards(str(tmp_path / "audio"), tmp_path / "encoded", LogMelEncoder()) is None
    assert trainer.predict.call_count == 1
