from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, Wav2Vec2FeatureExtractor

from salad_lightning.encoders.ssl import SelfSupervisedEncoder
from salad_lightning.errors import UserError
from salad_lightning.testing.tiny_encoders import save_tiny_hubert, save_tiny_wav2vec2, save_tiny_wavlm

SAVERS = [save_tiny_wav2vec2, save_tiny_hubert, save_tiny_wavlm]


def _audio(num_samples: int) -> torch.Tensor:
    return 0.05 + 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(num_samples))


def _reference(folder: str, audio: torch.Tensor) -> torch.Tensor:
    """Hugging Face on one clip alone, without a mask: ``[T, K, D]``."""
    model = AutoModel.from_pretrained(folder).eval()
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    values = extractor(audio.numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"]
    with torch.no_grad():
        return torch.stack(model(values, output_hidden_states=True).hidden_states, 2)[0]


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_every_layer_of_a_padded_batch_equals_hugging_face_alone(tmp_path, save, norm):
    folder = save(tmp_path, norm=norm)
    encoder = SelfSupervisedEncoder(folder)
    clips = [_audio(num_samples) for num_samples in (16_000, 5_123, 400)]
    output = encoder(torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), torch.tensor([16_000, 5_123, 400]))
    assert encoder.num_layers == 3
    for clip, frames, num_frames in zip(clips, output.frames, output.lengths.tolist(), strict=True):
        expected = _reference(folder, clip)
        assert len(expected) == num_frames
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(frames[:num_frames], expected, rtol=0, atol=1e-4)


def test_hugging_face_itself_hears_padding_in_group_norm_models(tmp_path):
    """Why the encoder masks statistics; should this fail, the library was mended and the masking can go."""
    folder = save_tiny_wav2vec2(tmp_path, norm="group")
    model = AutoModel.from_pretrained(folder).eval()
    audio = _audio(8000)
    mask = torch.zeros(1, 16_000, dtype=torch.long)
    mask[:, :8000] = 1
    with torch.no_grad():
        alone = model(audio[None]).last_hidden_state
        padded = model(torch.nn.functional.pad(audio, (0, 8000))[None], attention_mask=mask).last_hidden_state
    assert (padded[:, : alone.shape[1]] - alone).abs().max() > 0.01


@pytest.mark.parametrize("normalize", [True, False])
def test_normalisation_follows_the_folder_unless_told(tmp_path, normalize):
    folder = save_tiny_wav2vec2(tmp_path, norm="layer")
    audio, lengths = 0.01 * _audio(4000)[None], torch.tensor([4000])
    as_saved = SelfSupervisedEncoder(folder)(audio, lengths).frames
    told = SelfSupervisedEncoder(folder, normalize=normalize)(audio, lengths).frames
    assert torch.equal(as_saved, told) == normalize  # the folder says True


def test_a_folder_that_does_not_say_asks(tmp_path):
    folder = save_tiny_wav2vec2(tmp_path)
    Path(folder, "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"SelfSupervisedEncoder\.normalize"):
        SelfSupervisedEncoder(folder)
    assert SelfSupervisedEncoder(folder, normalize=True).sample_rate_hz == 16_000


def test_lengths_equal_hugging_face(tmp_path):
    folder = save_tiny_hubert(tmp_path)
    model = AutoModel.from_pretrained(folder)
    num_samples = torch.arange(400, 30_000, 37)
    expected = model._get_feat_extract_output_lengths(num_samples)
    assert torch.equal(SelfSupervisedEncoder(folder).output_lengths(num_samples), expected)


def test_an_adapter_is_left_out(tmp_path):
    folder = save_tiny_wav2vec2(tmp_path, add_adapter=True, num_adapter_layers=1)
    frames = SelfSupervisedEncoder(folder)(_audio(8000)[None], torch.tensor([8000])).frames
    torch.testing.assert_close(frames[0], _reference(folder, _audio(8000)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_a_cast_to_bfloat16_stays_close(tmp_path, norm):
    encoder = SelfSupervisedEncoder(save_tiny_wavlm(tmp_path, norm=norm))
    audio, lengths = torch.stack([_audio(8000), _audio(8000).flip(0)]), torch.tensor([8000, 5000])
    expected = encoder(audio, lengths).frames
    actual = encoder.to(torch.bfloat16)(audio, lengths).frames
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
