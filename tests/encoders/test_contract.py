"""Every built-in encoder meets the contract that plugins meet."""

from __future__ import annotations

import pytest

from salad_lightning.encoders.causal_conv import CausalConvEncoder
from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.encoders.mimi import MimiEncoder
from salad_lightning.encoders.ssl import SelfSupervisedEncoder
from salad_lightning.encoders.whisper import WhisperEncoder
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
