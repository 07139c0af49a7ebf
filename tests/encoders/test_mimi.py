from __future__ import annotations

import pytest
import torch
from transformers import MimiModel

from salad_lightning.encoders.mimi import MimiEncoder
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Stored
from salad_lightning.testing.tiny_encoders import save_tiny_mimi


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_mimi(tmp_path_factory.mktemp("mimi"))


@pytest.fixture(scope="module")
def audio():
    return 0.1 * torch.randn(2, 25 * 1920, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_quantizers", [1, 2, 8])
def test_codes_and_latents_equal_hugging_face(folder, audio, num_quantizers):
    reference = MimiModel.from_pretrained(folder).eval()
    lengths = torch.full((2,), audio.shape[1])
    encoder = MimiEncoder(folder, num_quantizers=num_quantizers)
    with torch.no_grad():
        codes = reference.encode(audio[:, None], num_quantizers=num_quantizers).audio_codes
        latents = reference.quantizer.decode(codes)
    stored = encoder.encode(audio, lengths)
    assert torch.equal(stored.data, codes.transpose(1, 2))
    assert len(stored.data.unique()) > 8  # the codebooks are used: the comparison means something
    torch.testing.assert_close(encoder.embed(stored).frames[:, :, 0], latents.transpose(1, 2), rtol=0, atol=1e-5)


def test_latents_are_what_the_decoder_reads(folder, audio):
    reference = MimiModel.from_pretrained(folder).eval()
    encoder = MimiEncoder(folder, num_quantizers=8)
    latents = encoder(audio, torch.full((2,), audio.shape[1])).frames[:, :, 0]
    with torch.no_grad():
        expected = reference(audio[:, None]).audio_values
        actual = reference.decoder(latents.transpose(1, 2)).audio_values
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_codes_as_layers_add_up_to_the_latents(folder, audio):
    lengths = torch.tensor([audio.shape[1], 5000])
    latents = MimiEncoder(folder, num_quantizers=3)(audio, lengths).frames
    by_codebook = MimiEncoder(folder, input="codes", num_quantizers=3)(audio, lengths).frames
    assert by_codebook.shape[2] == 3
    assert (by_codebook[:, :, 0] - by_codebook[:, :, 1]).abs().max() > 0.1
    torch.testing.assert_close(by_codebook.sum(2, keepdim=True), latents, rtol=0, atol=1e-5)


def test_codes_may_be_stored_in_16_bits(folder, audio):
    encoder = MimiEncoder(folder, num_quantizers=3)
    stored = encoder.encode(audio, torch.tensor([audio.shape[1], 5000]))
    small = encoder.embed(Stored(stored.data.to(torch.int16), stored.lengths))
    torch.testing.assert_close(small.frames, encoder.embed(stored).frames, rtol=0, atol=0)


def test_the_transformer_forgets_beyond_its_sliding_window(folder, audio):
    """The clip is far longer than the window (8 steps of 25 Hz in 2 layers), so the window is at work and causal."""
    encoder = MimiEncoder(folder, input="codes", num_quantizers=4)
    lengths = torch.full((2,), audio.shape[1])
    changed = audio.clone()
    changed[:, :1920] = 0
    before, after = encoder(audio, lengths).frames, encoder(changed, lengths).frames
    assert (before[:, :4] - after[:, :4]).abs().max() > 0.1
    torch.testing.assert_close(after[:, 12:], before[:, 12:], rtol=0, atol=1e-5)


def test_codebooks_follow_a_cast(folder, audio):
    encoder = MimiEncoder(folder, num_quantizers=4)
    lengths = torch.full((2,), audio.shape[1])
    stored = encoder.encode(audio, lengths)
    expected = encoder.embed(stored).frames
    encoder.to(torch.bfloat16)
    actual = encoder.embed(stored).frames
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.1)
    assert encoder.encode(audio, lengths).data.shape == stored.data.shape


def test_the_decoder_is_dropped(folder):
    whole = sum(parameter.numel() for parameter in MimiModel.from_pretrained(folder).parameters())
    assert sum(parameter.numel() for parameter in MimiEncoder(folder, num_quantizers=2).parameters()) < 0.7 * whole


@pytest.mark.parametrize("num_quantizers", [0, 9])
def test_more_codebooks_than_there_are_is_refused(folder, num_quantizers):
    with pytest.raises(UserError, match=r"MimiEncoder.num_quantizers: the model has 8 codebooks"):
        MimiEncoder(folder, num_quantizers=num_quantizers)


def test_a_mimi_that_is_not_causal_is_refused(tmp_path):
    with pytest.raises(UserError, match="not causal"):
        MimiEncoder(save_tiny_mimi(tmp_path, use_causal_conv=False), num_quantizers=2)
