"""A user's mistakes through the real command line: one message with place and cure, exit code 2, nothing left."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import soundfile
import yaml

from salad_lightning.cli import main
from salad_lightning.testing.runs import save_tiny_world
from salad_lightning.testing.shards import save_speech_shards
from salad_lightning.testing.tiny import save_tiny_llm, save_tiny_tokenizer
from salad_lightning.testing.tiny_encoders import save_tiny_mimi


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def refused(world, capsys, tmp_path):
    """Run a command that must be refused; its message."""

    def run(*argv):
        capsys.readouterr()
        assert main([str(part) for part in argv]) == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err
        message = err[err.index("salad-lightning: ") :].removeprefix("salad-lightning: ")
        assert len(message.splitlines()) <= 8, message
        return message

    return run


@pytest.fixture
def fit(world, refused, tmp_path):
    """Refuse a ``fit`` of the good configuration, changed by a function of its settings; nothing may be saved."""

    def run(change, *options):
        settings = yaml.safe_load(world.config.read_text())
        change(settings["model"]["init_args"], settings["data"]["init_args"], settings["trainer"])
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        out = tmp_path / "out"
        message = refused("fit", "--config", path, f"--trainer.default_root_dir={out}", *options)
        left = [entry for entry in out.rglob("*") if entry.suffix in (".ckpt", ".json", ".part")]
        assert left == []
        return message

    return run


# Data


@pytest.mark.parametrize(
    ("shards", "words"),
    [("speech/speech-000099.tar", "the shard does not exist"), ("nowhere", "the shard does not exist"),
     ("empty", "holds no .tar shard"), ("speech/*.zip", "no shard matches")],
)  # fmt: skip
@pytest.mark.parametrize("part", ["train", "val"])
def test_missing_shards(world, fit, shards, words, part):
    (world.folder / "empty").mkdir(exist_ok=True)
    path = str(world.folder / shards)

    def change(model, data, trainer):
        data[part][0]["shards"] = path

    message = fit(change)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert "→" in message


def test_a_damaged_shard(world, fit, tmp_path):
    broken = shutil.copytree(world.folder / "speech", tmp_path / "broken")
    path = sorted(broken.glob("*.tar"))[0]
    path.write_bytes(path.read_bytes()[:3000])

    def change(model, data, trainer):
        data["train"] = [{**data["train"][0], "shards": str(path)}]

    assert str(path) in fit(change)


def test_no_word_times(world, fit, tmp_path):
    save_speech_shards(tmp_path / "untimed", num_samples=3, timed=False)

    def change(model, data, trainer):
        data["train"] = [{**data["train"][0], "shards": str(tmp_path / "untimed")}]

    for options in ([], ["--data.num_workers=1"]):
        message = fit(change, *options)
        assert re.search(r"untimed/speech-000000.tar.*speech00000\d", message)
        assert "has no word times, which interleaving needs" in message
        assert "→ add `words` to the shard, or use TemplateDocuments" in message


def test_a_context_too_short_for_one_span(fit):
    def change(model, data, trainer):
        model["context"] = 8

    message = fit(change)
    assert re.search(r"a (speech|text) span of \d+ words fills \d+ positions, and `context` is 8", message)
    assert re.search(r"→ raise `context`, or lower `(speech|text)_words`", message)


def test_no_training_data(fit):
    def without(model, data, trainer):
        del data["train"]

    def empty(model, data, trainer):
        data["train"] = []

    assert fit(without).startswith("data.train: there is nothing to train on")
    assert "data.train: there is no source" in fit(empty)


# Names and keys


def test_unknown_part(fit):
    def change(model, data, trainer):
        model["connector"]["class_path"] = "MPLConnector"

    message = fit(change)
    assert re.match(r"\S+run.yaml:\d+ \(model.connector\): ", message)
    assert "did you mean MLPConnector?" in message
    assert re.search("known connectors: .*CausalTransformerConnector, ConvConnector", message)


def test_typo_in_a_key_of_the_data(fit):
    def change(model, data, trainer):
        data["rows_per_bach"] = data.pop("rows_per_batch")

    message = fit(change)
    assert "rows_per_bach" in message
    assert "did you mean 'rows_per_batch'?" in message


def test_typo_in_a_source(fit):
    def change(model, data, trainer):
        data["train"][0]["wieght"] = 1

    assert "wieght" in fit(change)


# Models


def test_a_model_folder_without_weights(fit, tmp_path):
    save_tiny_llm(tmp_path / "empty-llm", weights=False)

    def change(model, data, trainer):
        model["llm"] = str(tmp_path / "empty-llm")

    message = fit(change)
    assert message.startswith(f"{tmp_path / 'empty-llm'}: the folder does not hold weights of a language model")
    assert "config.json" in message


def test_no_model_folder(fit, tmp_path):
    def change(model, data, trainer):
        model["llm"] = str(tmp_path / "nowhere")

    message = fit(change)
    assert "nowhere: no such folder" in message
    assert "check model.llm" in message


def test_an_encoder_folder_without_weights(fit, tmp_path):
    folder = save_tiny_mimi(tmp_path / "mimi")
    (tmp_path / "mimi" / "model.safetensors").unlink()

    def change(model, data, trainer):
        model["encoder"] = {"class_path": "MimiEncoder", "init_args": {"path": folder, "num_quantizers": 2}}

    assert folder in fit(change)


def test_tokenizer_and_llm_of_different_vocabularies(world, fit, tmp_path):
    other = shutil.copytree(world.folder / "llm", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 5000}))

    def change(model, data, trainer):
        model["llm"] = str(other)

    message = fit(change)
    assert re.search(r"different vocabularies: \d+ tokens, 5000 embedding rows", message)
    assert "→ put the tokenizer that the LLM was trained with" in message


def test_teacher_of_another_vocabulary(world, fit, tmp_path):
    """A KL between two vocabularies means nothing, whatever their sizes."""
    other = shutil.copytree(world.folder / "llm", tmp_path / "other")
    save_tiny_tokenizer(other, ["entirely other words make entirely other pieces"] * 3)

    def change(model, data, trainer):
        model["teacher"] = str(other)

    message = fit(change)
    assert "teacher" in message
    assert "vocabular" in message


@pytest.mark.parametrize("rate", [0, -16000])
def test_a_sample_rate_that_no_encoder_takes(fit, rate):
    def change(model, data, trainer):
        model["encoder"] = {"class_path": "LogMelEncoder", "init_args": {"sample_rate_hz": rate}}

    message = fit(change)
    assert "sample_rate_hz" in message
    assert str(rate) in message


# Trainer


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_steps", None, "max_steps"),
        ("max_steps", -1, "trainer.max_steps is not set"),
        ("limit_train_batches", 0.5, "limit_train_batches is a fraction"),
        ("precision", "bf16-true", "precision 'bf16-true' is not supported"),
        ("precision", "16-true", "precision '16-true' is not supported"),
    ],
)
def test_trainer_settings(fit, key, value, words):
    def change(model, data, trainer):
        if value is None:
            del trainer[key]
        else:
            trainer[key] = value

    message = fit(change)
    assert words in message
    assert "→" in message


@pytest.mark.parametrize(("key", "value"), [("warmup_steps", -1), ("decay_fraction", 1.5)])
def test_schedule(fit, key, value):
    def change(model, data, trainer):
        model["schedule"][key] = value

    assert key in fit(change)


# prepare


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"audio": "missing.wav", "text": "hello"}, ["manifest.jsonl, line 2", "missing.wav", "check the path"]),
        ({"audio": "notes.txt", "text": "hello"}, ["manifest.jsonl, line 2", "notes.txt", "cannot be decoded"]),
        ({"audio": "good.wav"}, ["manifest.jsonl, line 2", "there is no text"]),
        ({"text": "hello"}, ["manifest.jsonl, line 2", "there is no `audio`"]),
        ({"audio": "good.wav", "text": "x", "words": [["x", 0.5, 0.1]]}, ["manifest.jsonl, line 2", "backwards"]),
        ({"audio": "good.wav", "text": "hello", "words": [["hello", 0.0, 9.0]]}, ["manifest.jsonl, line 2", "9.0 s"]),
        ("not json", ["manifest.jsonl, line 2"]),
    ],
)
def test_prepare(refused, tmp_path, row, words):
    tone = 0.1 * np.sin(np.arange(8000) / 20)
    soundfile.write(tmp_path / "good.wav", tone, 16_000)
    (tmp_path / "notes.txt").write_text("no audio")
    lines = [
        json.dumps({"audio": "good.wav", "text": "good", "key": "a"}),
        row if isinstance(row, str) else json.dumps(row),
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    message = refused("prepare", "--manifest", tmp_path / "manifest.jsonl", "--output", tmp_path / "shards")
    assert [word for word in words if word not in message] == [], message
    assert not (tmp_path / "shards").exists()
