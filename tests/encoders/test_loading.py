"""What a user reads when a model folder is not what it should be."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    HubertForCTC,
    HubertModel,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Model,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from salad_lightning.encoders.mimi import MimiEncoder
from salad_lightning.encoders.ssl import SelfSupervisedEncoder
from salad_lightning.encoders.whisper import WhisperEncoder
from salad_lightning.errors import UserError
from salad_lightning.testing.tiny_encoders import (
    save_tiny_hubert,
    save_tiny_mimi,
    save_tiny_wav2vec2,
    save_tiny_whisper,
)

KINDS = [
    (MimiEncoder, save_tiny_mimi),
    (WhisperEncoder, save_tiny_whisper),
    (SelfSupervisedEncoder, save_tiny_wav2vec2),
]


def _message(encoder_class, path) -> str:
    with pytest.raises(UserError) as caught:
        encoder_class(str(path))
    message = str(caught.value)
    assert str(path) in message
    assert caught.value.cure
    return message


@pytest.mark.parametrize(("encoder_class", "save"), KINDS)
def test_a_folder_that_is_not_there(encoder_class, save, tmp_path):
    assert "the model folder is not there" in _message(encoder_class, tmp_path / "nowhere")


@pytest.mark.parametrize(("encoder_class", "save"), KINDS)
def test_a_folder_without_weights(encoder_class, save, tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "holds no weights" in _message(encoder_class, tmp_path)


@pytest.mark.parametrize(("encoder_class", "save"), KINDS)
def test_a_folder_without_configuration(encoder_class, save, tmp_path):
    save(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "holds no config.json" in _message(encoder_class, tmp_path)


@pytest.mark.parametrize(("encoder_class", "save"), KINDS)
def test_weights_cut_short(encoder_class, save, tmp_path):
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "the weights cannot be loaded" in _message(encoder_class, tmp_path)


@pytest.mark.parametrize(("encoder_class", "save"), KINDS)
def test_weights_of_half_the_model(encoder_class, save, tmp_path):
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    lost = (
        next(name for name in weights if name.startswith("encoder") and name.endswith("fc1.weight"))
        if (save is not save_tiny_wav2vec2)
        else "encoder.layers.0.feed_forward.output_dense.weight"
    )
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    assert "lack 1 of the encoder's parameters" in _message(encoder_class, tmp_path)


@pytest.mark.parametrize(("encoder_class", "save"), [(KINDS[i][0], KINDS[i - 1][1]) for i in range(3)])
def test_a_model_of_another_type(encoder_class, save, tmp_path):
    save(tmp_path)
    model_type = json.loads(Path(tmp_path, "config.json").read_text())["model_type"]
    assert f"model_type is '{model_type}', not " in _message(encoder_class, tmp_path)


def test_an_unknown_model_type(tmp_path):
    save_tiny_mimi(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    assert "config.json cannot be used" in _message(MimiEncoder, tmp_path)


def test_a_name_that_is_no_folder_while_offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = _message(MimiEncoder, "nobody/no-such-mimi")
    assert "HF_HUB_OFFLINE" in message
    assert "hf download nobody/no-such-mimi" in message


@pytest.mark.parametrize(
    ("encoder_class", "save", "base_class", "whole_class", "base"),
    [
        (WhisperEncoder, save_tiny_whisper, WhisperModel, WhisperForConditionalGeneration, "model"),
        (SelfSupervisedEncoder, save_tiny_hubert, HubertModel, HubertForCTC, "hubert"),
        (SelfSupervisedEncoder, save_tiny_wav2vec2, Wav2Vec2Model, Wav2Vec2ForPreTraining, "wav2vec2"),
    ],
)
def test_a_model_saved_with_its_head_loads_too(tmp_path, encoder_class, save, base_class, whole_class, base):
    """That is how most are published (``openai/whisper-small``, ``facebook/hubert-large-ls960-ft``)."""
    folder = save(tmp_path)
    audio, lengths = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)), torch.tensor([8000])
    expected = encoder_class(folder)(audio, lengths).frames
    model = base_class.from_pretrained(folder)
    whole = whole_class(model.config)
    setattr(whole, base, model)
    whole.save_pretrained(folder)
    assert any(name.startswith(f"{base}.") for name in load_file(Path(folder, "model.safetensors")))
    torch.testing.assert_close(encoder_class(folder)(audio, lengths).frames, expected, rtol=0, atol=0)


def test_half_precision_weights_load_in_float32(tmp_path):
    """As ``openai/whisper-large-v3`` is stored."""
    folder = save_tiny_whisper(tmp_path)
    WhisperModel.from_pretrained(folder).half().save_pretrained(folder)
    assert {parameter.dtype for parameter in WhisperEncoder(folder).parameters()} == {torch.float32}
