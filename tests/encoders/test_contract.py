"""Every built-in encoder meets the contract that plugins meet."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel

from salad_lightning.encoders.causal_conv import CausalConvEncoder
from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.encoders.mimi import MimiEncoder
from salad_lightning.encoders.ssl import SelfSupervisedEncoder
from salad_lightning.encoders.whisper import WhisperEncoder
from salad_lightning.errors import UserError
from salad_lightning.testing.contracts.encoder import EncoderContract
from salad_lightning.testing.tiny_encoders import (
    save_tiny_causal_conv,
    save_tiny_hubert,
    save_tiny_mimi,
    save_tiny_wav2vec2,
    save_tiny_wavlm,
    save_tiny_whisper,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


class OfTransformers(EncoderContract):
    """Inside, Mimi's looks whether positions begin anew within a row, the others whether all clips are equally long."""

    device_reads = 1


class TestLogMel(EncoderContract):
    def make_encoder(self):
        return LogMelEncoder()


class TestLogMel24kHz(EncoderContract):
    def make_encoder(self):
        return LogMelEncoder(sample_rate_hz=24_000, num_mels=40, frame_rate_hz=25)


class TestCausalConv(EncoderContract):
    def make_encoder(self):
        return CausalConvEncoder(save_tiny_causal_conv(self.folder))


class TestCausalConv25Hz(EncoderContract):
    def make_encoder(self):
        return CausalConvEncoder(save_tiny_causal_conv(self.folder, strides=(4, 1), kernel_size=4, num_blocks=3))


class TestMimiLatents(OfTransformers):
    def make_encoder(self):
        return MimiEncoder(save_tiny_mimi(self.folder), num_quantizers=3)


class TestMimiCodes(OfTransformers):
    def make_encoder(self):
        return MimiEncoder(save_tiny_mimi(self.folder), input="codes", num_quantizers=4)


class TestWhisperLast(EncoderContract):
    def make_encoder(self):
        return WhisperEncoder(save_tiny_whisper(self.folder))


class TestWhisperAll(EncoderContract):
    def make_encoder(self):
        return WhisperEncoder(save_tiny_whisper(self.folder, num_mel_bins=128), layers="all")


class TestWav2Vec2GroupNorm(OfTransformers):
    def make_encoder(self):
        return SelfSupervisedEncoder(save_tiny_wav2vec2(self.folder, norm="group"))


class TestWav2Vec2LayerNorm(OfTransformers):
    def make_encoder(self):
        return SelfSupervisedEncoder(save_tiny_wav2vec2(self.folder, norm="layer"))


class TestHubertGroupNorm(OfTransformers):
    def make_encoder(self):
        return SelfSupervisedEncoder(save_tiny_hubert(self.folder, norm="group"))


class TestHubertBatchNorm(OfTransformers):
    def make_encoder(self):
        return SelfSupervisedEncoder(save_tiny_hubert(self.folder, norm="layer", conv_pos_batch_norm=True))


class TestWavLMGroupNorm(EncoderContract):
    def make_encoder(self):
        return SelfSupervisedEncoder(save_tiny_wavlm(self.folder, norm="group"))


class TestWavLMLayerNorm(EncoderContract):
    def make_encoder(self):
        return SelfSupervisedEncoder(save_tiny_wavlm(self.folder, norm="layer"), normalize=False)


@pytest.mark.parametrize(
    ("encoder_class", "save"),
    [(WhisperEncoder, save_tiny_whisper), (SelfSupervisedEncoder, save_tiny_wav2vec2),
     (SelfSupervisedEncoder, save_tiny_wavlm)],
)  # fmt: skip
def test_bfloat16_is_another_encoder_with_nearly_the_same_frames(tmp_path, encoder_class, save):
    """Also where the weights themselves are numbers of bfloat16, so that rounding them changes nothing."""
    folder = save(tmp_path)
    rounded = AutoModel.from_pretrained(folder)
    for weight in rounded.parameters():
        weight.data = weight.data.bfloat16().float()
    rounded.save_pretrained(folder)
    exact, half = encoder_class(folder), encoder_class(folder, dtype="bfloat16")
    audio = 0.1 * torch.randn(2, 12_000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([12_000, 7_000])
    expected, frames = exact(audio, lengths).frames, half(audio, lengths).frames
    assert frames.dtype == torch.bfloat16
    assert (frames.float() - expected).norm() < 0.03 * expected.norm()
    assert not frames[1, int(half.output_lengths(7_000)) :].any()
    assert exact.identity() != half.identity()


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(UserError, match="int8"):
        WhisperEncoder(save_tiny_whisper(tmp_path), dtype="int8")
