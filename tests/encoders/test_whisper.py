from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperModel

from salad_lightning.encoders.whisper import WhisperEncoder
from salad_lightning.errors import UserError
from salad_lightning.testing.tiny_encoders import save_tiny_whisper

SECOND = 16_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_whisper(tmp_path_factory.mktemp("whisper"))


def _audio(num_samples: int) -> torch.Tensor:
    swell = torch.sin(torch.arange(num_samples) / 9000).abs()
    return 0.2 * swell * torch.randn(num_samples, generator=torch.Generator().manual_seed(num_samples))


@pytest.mark.parametrize("num_samples", [1, 150, 319, SECOND // 3, 5 * SECOND + 77, 30 * SECOND - 100, 30 * SECOND])
def test_log_mel_equals_hugging_face_on_the_clip(folder, num_samples):
    audio = _audio(num_samples)
    expected = WhisperFeatureExtractor.from_pretrained(folder)(audio.numpy(), sampling_rate=SECOND)["input_features"]
    actual = WhisperEncoder(folder).log_mel(audio[None], torch.tensor([num_samples]))[0]
    assert actual.shape == (2 * -(-num_samples // 320), 80)
    np.testing.assert_allclose(actual.T, expected[0, :, : len(actual)], rtol=0, atol=1e-4)


def test_a_burst_at_the_very_end_sets_the_maximum(folder):
    """Only windows centred past the last frame hear it whole; Hugging Face's maximum does."""
    audio = 0.001 * _audio(SECOND)
    audio[-40:] = 0.9
    expected = WhisperFeatureExtractor.from_pretrained(folder)(audio.numpy(), sampling_rate=SECOND)["input_features"]
    actual = WhisperEncoder(folder).log_mel(audio[None], torch.tensor([SECOND]))[0]
    np.testing.assert_allclose(actual.T, expected[0, :, :100], rtol=0, atol=1e-4)


def test_thirty_seconds_equal_hugging_face(folder):
    audio = torch.stack([_audio(30 * SECOND), _audio(30 * SECOND).flip(0)])
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    features = extractor(list(audio.numpy()), sampling_rate=SECOND, return_tensors="pt")["input_features"]
    reference = WhisperModel.from_pretrained(folder).encoder.eval()
    with torch.no_grad():
        expected = reference(features, output_hidden_states=True)
    lengths = torch.tensor([30 * SECOND, 30 * SECOND])
    last = WhisperEncoder(folder)(audio, lengths).frames
    every = WhisperEncoder(folder, layers="all")(audio, lengths).frames
    torch.testing.assert_close(last[:, :, 0], expected.last_hidden_state, rtol=0, atol=2e-4)
    assert every.shape[2] == len(expected.hidden_states) == 3
    torch.testing.assert_close(every, torch.stack(expected.hidden_states, 2), rtol=0, atol=2e-4)


def test_a_shorter_clip_equals_hugging_face_with_as_many_positions(folder):
    audio = _audio(3 * SECOND)
    reference = WhisperModel.from_pretrained(folder).encoder.eval()
    positions = torch.nn.Embedding.from_pretrained(reference.embed_positions.weight[:150].detach())
    reference.embed_positions, reference.config.max_source_positions = positions, 150
    encoder = WhisperEncoder(folder)
    lengths = torch.tensor([3 * SECOND])
    with torch.no_grad():
        expected = reference(encoder.log_mel(audio[None], lengths).transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(encoder(audio[None], lengths).frames[:, :, 0], expected, rtol=0, atol=1e-5)


def test_a_longer_clip_is_refused(folder):
    with pytest.raises(UserError, match=r"a clip of 30\.\d s is longer than the 30 s"):
        WhisperEncoder(folder)(torch.zeros(1, 30 * SECOND + 1), torch.tensor([30 * SECOND + 1]))


def test_positions_of_the_model_decide_the_longest_clip(tmp_path):
    encoder = WhisperEncoder(save_tiny_whisper(tmp_path, max_source_positions=50))
    assert encoder(_audio(SECOND)[None], torch.tensor([SECOND])).frames.shape[1] == 50
    with pytest.raises(UserError, match="longer than the 1 s"):
        encoder(_audio(SECOND + 1)[None], torch.tensor([SECOND + 1]))


def test_a_cast_to_bfloat16_stays_close(folder):
    audio, lengths = torch.stack([_audio(SECOND), _audio(SECOND).flip(0)]), torch.tensor([SECOND, SECOND // 2])
    encoder = WhisperEncoder(folder)
    expected = encoder(audio, lengths).frames
    actual = encoder.to(torch.bfloat16)(audio, lengths).frames
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
