"""Small, real language-model folders: a Hugging Face model with a trained tokenizer, saved to disk."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.configuration_utils import PreTrainedConfig

from salad_lightning.model.small import small_qwen2

__all__ = ["SENTENCES", "save_tiny_llm", "save_tiny_tokenizer"]

SENTENCES = [
    "the quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun",
    "a small boat crosses the wide river before the evening wind begins to blow",
    "seven bright stars shine above the quiet village and nobody is awake to count them",
    "bread, cheese and apples: that is all we need for a long walk in the hills!",
]
"""Text that the tiny tokenizers are trained on."""


def save_tiny_tokenizer(folder: Path, sentences: list[str] | None = None, vocab_size: int = 300) -> None:
    """Train a byte-level BPE tokenizer (GPT-2's kind, like Qwen's) and save it as a fast tokenizer.

    Args:
        folder: Where to; made if missing.
        sentences: Training text.
        vocab_size: At least 257: all bytes and the end-of-text token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences or SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)


def save_tiny_llm(
    folder: Path, *, config: PreTrainedConfig | None = None, seed: int = 0, weights: bool = True, width: int = 64
) -> Path:
    """Save a random causal LM with its tokenizer.

    Args:
        folder: Where to; made if missing.
        config: Any causal LM's configuration; its vocabulary is set to the tokenizer's. Qwen2 by default.
        seed: For the weights.
        weights: Whether to save weights, or the configuration alone.
        width: Hidden size of the default configuration.

    Returns:
        ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny_tokenizer(folder)
    vocab_size = len(PreTrainedTokenizerFast.from_pretrained(folder))
    if config is None:
        config = small_qwen2(width, 2, max_position_embeddings=4096)
    config.vocab_size = vocab_size
    if not weights:
        config.architectures = ["Qwen2ForCausalLM"]
        config.save_pretrained(folder)
        return folder
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        model.save_pretrained(folder)
    return folder
