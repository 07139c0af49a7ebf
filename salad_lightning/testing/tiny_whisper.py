"""A small Whisper that transcribes, in the form that the published ones have: random weights, all of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from salad_lightning.testing.tiny_encoders import WHISPER_SIZES

__all__ = ["save_tiny_whisper_recognizer"]

_CONTROL = (
    "startoftranscript",
    "en",
    "transcribe",
    "translate",
    "startoflm",
    "startofprev",
    "nospeech",
    "notimestamps",
)


def save_tiny_whisper_recognizer(folder: Path, *, seed: int = 0, **config: Any) -> Path:
    """Save model, feature extractor, tokenizer and generation settings; it writes at most 16 bytes of text.

    Args:
        folder: Where to; made if missing.
        seed: For the weights.
        **config: For ``WhisperConfig``.

    Returns:
        ``folder``.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*letters, "<|endoftext|>"])}
    tokenizer: Any = WhisperTokenizer(vocab=vocab, merges=[])
    names = {name: f"<|{name}|>" for name in _CONTROL}
    tokenizer.add_special_tokens({"additional_special_tokens": list(names.values())})
    tokenizer.add_tokens([f"<|{step * 0.02:.2f}|>" for step in range(1501)])
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    settings: dict[str, Any] = {
        **WHISPER_SIZES,
        "vocab_size": len(tokenizer),
        "max_target_positions": 24,
        "decoder_start_token_id": ids["startoftranscript"],
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), tokenizer.eos_token_id),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = WhisperForConditionalGeneration(WhisperConfig(**{**settings, **config}))
    # Made anew: what comes from the model's configuration is replaced by it again when the folder is loaded.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        is_multilingual=True,
        no_timestamps_token_id=ids["notimestamps"],
        lang_to_id={"<|en|>": ids["en"]},
        task_to_id={name: ids[name] for name in ("transcribe", "translate")},
        decoder_start_token_id=ids["startoftranscript"],
        max_length=20,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), tokenizer.eos_token_id),
    )
    model.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)  # type: ignore[no-untyped-call]
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)  # type: ignore[no-untyped-call]
    return folder
