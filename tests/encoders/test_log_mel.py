from __future__ import annotations

import math

import pytest
import torch
import torchaudio

from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.errors import UserError


def test_equals_torchaudio_on_audio_padded_on_the_left():
    encoder = LogMelEncoder()
    audio = 0.1 * torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    frames = encoder(audio, torch.tensor([16_000, 16_000])).frames[:, :, 0]
    mel = torchaudio.transforms.MelSpectrogram(
        16_000, n_fft=400, hop_length=160, center=False, n_mels=80, norm="slaney", mel_scale="slaney"
    )(torch.nn.functional.pad(audio, (240, 0)))
    expected = mel.transpose(1, 2).clamp(min=1e-8).log10() / 4 + 1
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-4)


def test_a_tone_is_loudest_in_its_own_band():
    encoder = LogMelEncoder(num_mels=40)
    seconds = torch.arange(8_000) / 16_000
    frames = encoder(torch.sin(2 * math.pi * 1000 * seconds)[None], torch.tensor([8_000])).frames[0, -5:, 0]
    # slaney's mel scale is linear to 1000 Hz at 15 mel, and 45.2 mel at 8000 Hz
    band = round(15 / 45.245 * 41) - 1
    assert ((frames.argmax(-1) - band).abs() <= 1).all()


def test_silence_is_minus_one():
    assert (LogMelEncoder()(torch.zeros(1, 800), torch.tensor([800])).frames == -1).all()


def test_what_lies_beyond_a_length_is_not_heard():
    encoder = LogMelEncoder()
    audio = 0.1 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    clean = audio.clone()
    clean[:, 500:] = 0
    lengths = torch.tensor([500])
    torch.testing.assert_close(encoder(audio, lengths).frames, encoder(clean, lengths).frames, rtol=0, atol=0)


def test_neither_a_cast_nor_autocast_touches_the_features():
    audio, lengths = 0.1 * torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)), torch.tensor([4000])
    expected = LogMelEncoder()(audio, lengths).frames
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = LogMelEncoder().to(torch.bfloat16)(audio, lengths).frames
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("frame_rate_hz", [33.0, 40_000.0])
def test_a_rate_that_does_not_divide_is_refused(frame_rate_hz):
    with pytest.raises(UserError, match=r"frame_rate_hz: .*does not divide sample_rate_hz 16000"):
        LogMelEncoder(frame_rate_hz=frame_rate_hz)
