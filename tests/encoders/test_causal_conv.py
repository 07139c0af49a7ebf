from __future__ import annotations

import json

import pytest
import torch

from salad_lightning.encoders.causal_conv import CausalConvEncoder
from salad_lightning.errors import UserError
from salad_lightning.testing.tiny_encoders import save_tiny_causal_conv


def test_a_saved_encoder_loads_frozen_and_equal(tmp_path):
    torch.manual_seed(0)
    encoder = CausalConvEncoder.from_config(width=24, strides=(2, 2), num_blocks=1)
    audio, lengths = 0.1 * torch.randn(2, 9000), torch.tensor([9000, 4321])
    encoder.save_pretrained(tmp_path / "new" / "folder")
    loaded = CausalConvEncoder(str(tmp_path / "new" / "folder"))
    assert loaded.frame_rate_hz == 25.0
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(loaded(audio, lengths).frames, encoder(audio, lengths).frames, rtol=0, atol=0)


def test_the_default_is_a_12_5_hz_encoder_of_the_stated_reach():
    torch.manual_seed(0)
    encoder = CausalConvEncoder.from_config()
    assert (encoder.sample_rate_hz, encoder.frame_rate_hz, encoder.output_dim) == (16_000, 12.5, 128)
    audio = torch.randn(1, 40 * 1280).requires_grad_()
    frames, _ = encoder.features(audio, torch.tensor([40 * 1280]))
    frames[0, 30].square().sum().backward()
    heard = audio.grad[0].nonzero()
    reach_s = (31 * 1280 - int(heard.min())) / 16_000
    assert int(heard.max()) < 31 * 1280
    assert reach_s == pytest.approx(1.265, abs=0.01)


def test_features_train_every_parameter():
    torch.manual_seed(0)
    encoder = CausalConvEncoder.from_config(width=16)
    head = torch.nn.Linear(16, 3)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-2)
    seconds = torch.arange(8000) / 16_000
    audio = torch.stack([torch.sin(2 * torch.pi * pitch * seconds) for pitch in (200, 900, 3000)])
    lengths = torch.tensor([8000, 8000, 7000])
    losses = []
    for _ in range(30):
        frames, num_frames = encoder.features(audio, lengths)
        mask = torch.arange(frames.shape[1]) < num_frames[:, None]
        labels = torch.arange(3)[:, None].expand_as(mask)
        loss = torch.nn.functional.cross_entropy(head(frames[mask]), labels[mask])
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in encoder.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


def test_encode_takes_no_gradient_even_while_trainable():
    encoder = CausalConvEncoder.from_config(width=8)
    assert not encoder.encode(torch.randn(1, 3000), torch.tensor([3000])).data.requires_grad


def test_a_cast_to_bfloat16_stays_close(tmp_path):
    encoder = CausalConvEncoder(save_tiny_causal_conv(tmp_path))
    audio, lengths = 0.1 * torch.randn(1, 16_000, generator=torch.Generator().manual_seed(0)), torch.tensor([16_000])
    expected = encoder(audio, lengths).frames
    actual = encoder.to(torch.bfloat16)(audio, lengths).frames
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("lost", ["", "config.json", "model.safetensors"])
def test_a_missing_folder_or_file_is_named(tmp_path, lost):
    folder = tmp_path / "encoder"
    if lost:
        save_tiny_causal_conv(folder)
        (folder / lost).unlink()
    with pytest.raises(UserError) as caught:
        CausalConvEncoder(str(folder))
    assert str(folder) in str(caught.value)
    assert "→" in str(caught.value)
    if lost:
        assert lost in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "whisper"}, "model_type is 'whisper'"),
        ({"depth": 3}, "not a configuration of this encoder"),
        ({"strides": None}, "not a configuration of this encoder"),
        ({"kernel_size": 1}, "kernel_size 1 is below"),
        ({"mel_rate_hz": 33.0}, "does not divide"),
        ({"width": 17}, "weights do not fit"),
    ],
)
def test_a_wrong_configuration_is_refused(tmp_path, change, message):
    save_tiny_causal_conv(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        CausalConvEncoder(str(tmp_path))


def test_damaged_weights_are_refused(tmp_path):
    save_tiny_causal_conv(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="weights"):
        CausalConvEncoder(str(tmp_path))


def test_a_kernel_below_its_stride_is_refused():
    with pytest.raises(ValueError, match="kernel_size 2 is below"):
        CausalConvEncoder.from_config(strides=(4,), kernel_size=2)
