"""Configurations of small language models, to be trained from nothing: for the miniature, benchmarks and tests."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config

__all__ = ["small_qwen2"]


def small_qwen2(width: int, num_layers: int, **changes: Any) -> Qwen2Config:
    """Qwen2 with 4 heads, 2 of them for keys and values, and tied embeddings.

    Args:
        width: Hidden size; a multiple of 8.
        num_layers: Blocks.
        changes: Further settings (``vocab_size``, ``eos_token_id``, ``intermediate_size``: twice the width by default).
    """
    settings: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    return Qwen2Config(**settings | changes)
