"""Self-supervised speech encoders: wav2vec 2.0, HuBERT, WavLM."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModel

from salad_lightning.encoders._audio import fit_samples, valid_mask, zero_beyond
from salad_lightning.encoders._loading import load_config, load_frozen
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Encoder, EncoderOutput, LengthT, Stored

__all__ = ["SelfSupervisedEncoder"]


class SelfSupervisedEncoder(Encoder):
    """wav2vec 2.0 (arXiv 2006.11477), HuBERT (arXiv 2106.07447) or WavLM (arXiv 2110.13900), every layer out.

    The layers are Hugging Face's hidden states: the input of each Transformer layer and the output of the last. Their
    mix is trained with the connector. Each clip hears all of itself and nothing of its padding: where the first
    convolution is followed by a group norm over time, its statistics are taken over the clip alone (Hugging Face takes
    them over the padding too, under an attention mask as well).

    Args:
        path: Folder or Hugging Face name, such as ``microsoft/wavlm-large``; its ``model_type`` says which it is.
        normalize: Whether each clip is brought to zero mean and unit variance first. By default as the model's
            ``preprocessor_config.json`` says (``do_normalize``).
        dtype: Of weights and products. ``bfloat16`` takes a fraction of the time on a GPU; its frames differ from those
            of ``float32`` by one or two per cent, and shards encoded by the one are refused by the other.

    Raises:
        UserError: If the model cannot be loaded, or nothing says whether to normalise.
    """

    causal = False

    def __init__(
        self, path: str, normalize: bool | None = None, dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> None:
        super().__init__()
        path, config = load_config(path, ["wav2vec2", "hubert", "wavlm"])
        self.sample_rate_hz, self._normalize = _preprocessing(path, normalize)
        self._convolutions = list(zip(config.conv_kernel, config.conv_stride, strict=True))
        self.frame_rate_hz = self.sample_rate_hz / math.prod(config.conv_stride)
        self.output_dim, self.num_layers = config.hidden_size, config.num_hidden_layers + 1
        self._min_samples = 1
        for kernel, stride in reversed(self._convolutions):
            self._min_samples = (self._min_samples - 1) * stride + kernel
        not_needed = r"^masked_spec_embed$|^adapter\."
        self.model: Any = load_frozen(AutoModel, path, config, not_needed=not_needed, dtype=dtype)
        if hasattr(self.model, "adapter"):
            self.model.adapter = None  # runs after the hidden states; not used
        self._norms = _mask_norms(self.model)
        self.eval()

    def output_lengths(self, num_samples: LengthT) -> LengthT:
        """Outputs of the convolutions; clips shorter than their reach (400 samples) are completed to it."""
        if isinstance(num_samples, Tensor):
            return self._conv_lengths(num_samples.clamp(min=self._min_samples), len(self._convolutions))
        return self._conv_lengths(max(num_samples, self._min_samples), len(self._convolutions))

    def _conv_lengths(self, lengths: LengthT, num_convolutions: int) -> LengthT:
        for kernel, stride in self._convolutions[:num_convolutions]:
            lengths = (lengths - kernel) // stride + 1
        return lengths

    @torch.no_grad()
    def encode(self, audio_NL: Tensor, lengths_N: Tensor) -> Stored:
        """Frames of all layers, ``[N, T, K, D]``."""
        filled_N = lengths_N.clamp(min=self._min_samples)
        audio_NL = fit_samples(audio_NL, lengths_N, max(audio_NL.shape[1], self._min_samples))
        if self._normalize:
            audio_NL = _zero_mean_unit_variance(audio_NL, lengths_N)
        num_frames_N = self.output_lengths(lengths_N)
        for norm in self._norms:
            norm.lengths_N = self._conv_lengths(filled_N, 1) if isinstance(norm, _ClipGroupNorm) else num_frames_N
        with warnings.catch_warnings():
            # WavLM in transformers gives torch a boolean mask beside its float position bias, every step.
            warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")
            output = self.model(
                audio_NL.to(next(self.model.parameters()).dtype),
                attention_mask=valid_mask(filled_N, audio_NL.shape[1]).long(),
                output_hidden_states=True,
                return_dict=True,
            )
        frames_NTKD = torch.stack(output.hidden_states, dim=2)
        return Stored(zero_beyond(frames_NTKD, num_frames_N), num_frames_N)

    def settings(self) -> dict[str, object]:
        """See `Encoder.settings`."""
        return super().settings() | {"normalize": self._normalize}

    def embed(self, stored: Stored) -> EncoderOutput:
        """The same frames."""
        return EncoderOutput(stored.data, stored.lengths)


class _ClipGroupNorm(nn.GroupNorm):
    """One group a channel, normalised over the valid steps of each clip."""

    lengths_N: Tensor

    def forward(self, input: Tensor) -> Tensor:
        mask_N1T = valid_mask(self.lengths_N, input.shape[2]).unsqueeze(1)
        normed = _normalize_over_time(input.float(), mask_N1T, self.eps)
        return (normed * self.weight[:, None] + self.bias[:, None]).to(input.dtype)


class _ClipBatchNorm(nn.BatchNorm1d):
    """Zero beyond each clip, where the convolution that follows expects its zero padding."""

    lengths_N: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * valid_mask(self.lengths_N, input.shape[2]).unsqueeze(1)


def _mask_norms(model: nn.Module) -> list[_ClipGroupNorm | _ClipBatchNorm]:
    """Give the norms that would hear padding the clips' lengths to go by.

    Their class is changed in place, so that their parameters keep their identity and names.
    """
    norms: list[_ClipGroupNorm | _ClipBatchNorm] = []
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = _ClipGroupNorm
        elif type(module) is nn.BatchNorm1d:
            module.__class__ = _ClipBatchNorm
        if isinstance(module, (_ClipGroupNorm, _ClipBatchNorm)):
            norms.append(module)
    return norms


def _normalize_over_time(values: Tensor, mask: Tensor, eps: float) -> Tensor:
    """Zero mean and unit variance over the valid part of the last axis; garbage beyond it."""
    count = mask.sum(-1, keepdim=True)
    mean = (values * mask).sum(-1, keepdim=True) / count
    variance = ((values - mean) * mask).square().sum(-1, keepdim=True) / count
    return (values - mean) * torch.rsqrt(variance + eps)


def _zero_mean_unit_variance(audio_NL: Tensor, lengths_N: Tensor) -> Tensor:
    """Hugging Face's ``Wav2Vec2FeatureExtractor``, whose constant 1e-7 keeps silence finite."""
    normed_NL = _normalize_over_time(audio_NL, valid_mask(lengths_N, audio_NL.shape[1]), 1e-7)
    return zero_beyond(normed_NL, lengths_N)


def _preprocessing(path: str, normalize: bool | None) -> tuple[int, bool]:
    """Sample rate and whether to normalise, from the model's ``preprocessor_config.json``."""
    try:
        extractor = AutoFeatureExtractor.from_pretrained(path)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, json.JSONDecodeError) as error:
        if normalize is not None:
            return 16_000, normalize
        raise UserError(
            "no preprocessor_config.json that says whether audio is normalised",
            where=path,
            cure="add the model's preprocessor_config.json, or set SelfSupervisedEncoder.normalize",
        ) from error
    return int(extractor.sampling_rate), bool(extractor.do_normalize) if normalize is None else normalize
