"""Real model folders of speech encoders, small enough for a test: random weights, a few thousand parameters.

Each function saves a folder as ``save_pretrained`` does and returns its path as a string. Weights depend on ``seed``
alone, and are large enough that every part of the model bears on its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    HubertConfig,
    HubertModel,
    MimiConfig,
    MimiModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from salad_lightning.encoders.causal_conv import CausalConvEncoder

__all__ = [
    "WHISPER_SIZES",
    "save_tiny_causal_conv",
    "save_tiny_hubert",
    "save_tiny_mimi",
    "save_tiny_wav2vec2",
    "save_tiny_wavlm",
    "save_tiny_whisper",
]

Norm = Literal["group", "layer"]

# Of every small Whisper: fields of ``WhisperConfig``.
WHISPER_SIZES: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "init_std": 0.3,
}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def save_tiny_causal_conv(folder: str | Path, *, seed: int = 0, **config: Any) -> str:
    """A `CausalConvEncoder` of width 16 at 12.5 frames/s; ``config`` goes to its ``from_config``."""
    with _seeded(seed):
        CausalConvEncoder.from_config(**{"num_mels": 20, "width": 16, **config}).save_pretrained(folder)
    return str(folder)


def save_tiny_mimi(folder: str | Path, *, seed: int = 0, **config: Any) -> str:
    """Mimi at its own 24 kHz and 12.5 frames/s: width 16, 8 codebooks, a sliding window of 8 steps (25 Hz)."""
    settings: dict[str, Any] = {
        "hidden_size": 16,
        "num_filters": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "codebook_size": 32,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
        "num_quantizers": 8,
        "upsample_groups": 16,
        "sliding_window": 8,
        "initializer_range": 0.3,
        "layer_scale_initial_scale": 1.0,
    }
    with _seeded(seed):
        model: Any = MimiModel(MimiConfig(**{**settings, **config}))
        model.eval()
        _fill_codebooks(model)
        model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def _fill_codebooks(model: Any) -> None:
    """Spread the code vectors as the model's latents of noise are; a new model's are all zero."""
    latents_NDT = model.encoder(0.1 * torch.randn(1, 1, 4 * model.config.sampling_rate)).latents
    quantizer = model.quantizer
    for residual in (quantizer.semantic_residual_vector_quantizer, quantizer.acoustic_residual_vector_quantizer):
        spread_TD = residual.input_proj(latents_NDT)[0].T
        for index, layer in enumerate(residual.layers):
            codebook = layer.codebook
            vectors = spread_TD.std(0) * torch.randn(codebook.codebook_size, spread_TD.shape[1]) / 2**index
            codebook.embed_sum.copy_(vectors + (spread_TD.mean(0) if index == 0 else 0))
            codebook._embed = None


def save_tiny_whisper(folder: str | Path, *, seed: int = 0, **config: Any) -> str:
    """Whisper of width 16 with 2 encoder layers; 30 s of positions unless ``max_source_positions`` says otherwise."""
    settings: dict[str, Any] = {
        **WHISPER_SIZES,
        "vocab_size": 64,
        "max_target_positions": 16,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
    }
    with _seeded(seed):
        whisper = WhisperConfig(**{**settings, **config})
        model: Any = WhisperModel(whisper)
        model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=whisper.num_mel_bins).save_pretrained(folder)  # type: ignore[no-untyped-call]
    return str(folder)


def save_tiny_wav2vec2(folder: str | Path, *, norm: Norm = "group", seed: int = 0, **config: Any) -> str:
    """wav2vec 2.0 of width 16 with 2 layers; ``norm="layer"`` is the arrangement of the large models."""
    return _save_self_supervised(Wav2Vec2Model, Wav2Vec2Config, folder, norm=norm, seed=seed, config=config)


def save_tiny_hubert(folder: str | Path, *, norm: Norm = "group", seed: int = 0, **config: Any) -> str:
    """HuBERT of width 16 with 2 layers; ``norm="layer"`` is the arrangement of the large models."""
    return _save_self_supervised(HubertModel, HubertConfig, folder, norm=norm, seed=seed, config=config)


def save_tiny_wavlm(folder: str | Path, *, norm: Norm = "group", seed: int = 0, **config: Any) -> str:
    """WavLM of width 16 with 2 layers; ``norm="layer"`` is the arrangement of the large models."""
    return _save_self_supervised(WavLMModel, WavLMConfig, folder, norm=norm, seed=seed, config=config)


def _save_self_supervised(
    model_class: Any, config_class: Any, folder: str | Path, *, norm: Norm, seed: int, config: dict[str, Any]
) -> str:
    settings: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_dim": (8,) * 7,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": norm,
        "do_stable_layer_norm": norm == "layer",
        "conv_bias": norm == "layer",
        "initializer_range": 0.3,
    }
    with _seeded(seed):
        model = model_class(config_class(**{**settings, **config}))
        _stir_norms(model)
        model.save_pretrained(folder)
    extractor: Any = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=norm == "layer")  # type: ignore[no-untyped-call]
    extractor.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def _stir_norms(model: nn.Module) -> None:
    """Give norms random scales, shifts and running means: as created they hide what happens to padding."""
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, nn.BatchNorm1d, nn.LayerNorm)):
            module.weight.uniform_(0.7, 1.3)
            module.bias.normal_(std=0.3)
        if isinstance(module, nn.BatchNorm1d) and module.running_mean is not None:
            module.running_mean.normal_()
