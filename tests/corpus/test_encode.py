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
    ]:
        assert main(["encode", *arguments]) == 2
        assert word in capfd.readouterr().err
    assert not list(Path(output).glob("*.tar")) if Path(output).exists() else True
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_bytes_do_not_depend_on_reading_ahead(tmp_path):
    save_speech_shards(tmp_path / "audio", num_samples=9)
    for name, workers in (("none", 0), ("two", 2)):
        encode_shards(str(tmp_path / "audio"), tmp_path / name, LogMelEncoder(), num_workers=workers)
    for path in (tmp_path / "none").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()
    with tarfile.open(tmp_path / "two" / "speech-000000.tar") as tar:
        assert tar.getnames()[:2] == ["speech000000.frames.npy", "speech000000.json"]
