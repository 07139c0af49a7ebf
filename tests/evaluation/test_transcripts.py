"""The cache of transcripts: what is left of a killed run, other weights, and samples that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest

from salad_lightning.data.audio import encode_flac
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.data.tolerance import Tolerance
from salad_lightning.errors import UserError
from salad_lightning.evaluation.fingerprint import fingerprint, model_name
from salad_lightning.evaluation.transcripts import Transcripts
from salad_lightning.testing.shards import speak_tones


def shards(folder, broken=()):
    with ShardWriter(folder, "s", 0) as writer:
        for number, text in enumerate(("the cat", "the dog", "a star")):
            audio = b"no audio" if number in broken else encode_flac(speak_tones(text)[0], 16_000)
            writer.write(f"k{number}", {"text": text}, audio)
    return str(folder)


def cache(folder, text="größer\u2028als", heard=None):
    """Hears the same in every clip, and notes each."""

    def hear(audio):
        (heard if heard is not None else []).append(len(audio))
        return text

    return Transcripts(folder, "someone", hear, 16_000)


def test_what_is_left_of_a_killed_run_is_read(tmp_path):
    path = shards(tmp_path / "s")
    assert [sample.heard for sample in cache(tmp_path / "cache").of(path, "s")] == ["größer\u2028als"] * 3
    file = tmp_path / "cache" / "s.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[: content.rindex("ö".encode()) + 1])  # in the middle of a character
    heard = []
    again = [sample.heard for sample in cache(tmp_path / "cache", heard=heard).of(path, "s")]
    assert again == ["größer\u2028als"] * 3
    assert len(heard) == 1


def test_other_weights_at_the_same_path_have_another_name(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("first")
    before = model_name(model)
    assert before == model_name(str(model))
    assert before.startswith(f"{model} ")
    (model / "weights").write_text("second")
    assert model_name(model) != before
    assert model_name("openai/whisper-small") == "openai/whisper-small"
    assert fingerprint(["openai/whisper-small"]) == ["openai/whisper-small"]


def test_what_cannot_be_decoded_is_skipped_where_that_is_allowed(tmp_path):
    path = shards(tmp_path / "s", broken={1})
    with pytest.raises(UserError, match="cannot be decoded"):
        list(cache(tmp_path / "a").of(path, "s"))
    kept = cache(tmp_path / "b").of(path, "s", tolerance=Tolerance("s", 0.5))
    assert [sample.raw.key for sample in kept] == ["k0", "k2"]


def test_commands_are_run_where_that_is_allowed(tmp_path):
    (shard,) = (tmp_path / "s").glob("*.tar") if shards(tmp_path / "s") else ()
    command = f"pipe:cat {shard}"
    with pytest.raises(UserError):
        list(cache(tmp_path / "a").of(command, "s"))
    kept = list(cache(tmp_path / "b").of(command, "s", allow_pipe=True))
    assert [sample.raw.key for sample in kept] == ["k0", "k1", "k2"]
    assert all(np.isfinite(sample.utterance.audio).all() for sample in kept)
