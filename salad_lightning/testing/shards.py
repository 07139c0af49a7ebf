"""Small real shards: FLAC audio in which every word is a tone of its own pitch, with exact word times."""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from salad_lightning.data.audio import encode_flac
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.testing.tiny import SENTENCES

__all__ = ["random_text", "save_choice_shards", "save_speech_shards", "save_text_shards", "speak_tones"]


def random_text(rng: random.Random, num_words: int) -> str:
    """Words of the sentences that the tiny tokenizers know, with a capital and a full stop."""
    words = [word.strip(".,:!") for sentence in SENTENCES for word in sentence.split()]
    return " ".join(rng.choice(words) for _ in range(num_words)).capitalize() + "."


def speak_tones(
    text: str, *, sample_rate_hz: int = 16_000, seed: int = 0
) -> tuple[NDArray[np.float32], list[tuple[str, float, float]]]:
    """A tone for every word, 0.1 to 0.3 s long, its pitch given by the word, and a little noise.

    Returns:
        Audio ``[L]`` in [-1, 1], and ``(word, start_s, end_s)`` of every word.
    """
    rng = np.random.default_rng([seed, zlib.crc32(text.encode())])
    parts, words, start = [], [], 0
    for word in text.split():
        length = int(rng.uniform(0.1, 0.3) * sample_rate_hz)
        pitch = 120 + zlib.crc32(word.lower().encode()) % 2000
        tone = 0.3 * np.sin(2 * np.pi * pitch * np.arange(length) / sample_rate_hz)
        parts.append((tone + 0.01 * rng.standard_normal(length)).astype(np.float32))
        words.append((word.strip(".,:!?"), start / sample_rate_hz, (start + length) / sample_rate_hz))
        start += length
    return np.concatenate(parts), words


def save_speech_shards(
    folder: str | Path,
    *,
    num_samples: int = 12,
    samples_per_shard: int = 4,
    num_words: tuple[int, int] = (6, 12),
    timed: bool = True,
    sample_rate_hz: int = 16_000,
    seed: int = 0,
    fields: dict[str, Any] | None = None,
) -> Path:
    """Save spoken samples with keys ``speech000000`` and so on.

    Args:
        folder: Where to; made if missing.
        num_samples: In all shards together.
        samples_per_shard: In each but the last.
        num_words: Fewest and most words of a sample.
        timed: Whether the shards hold word times.
        sample_rate_hz: Of the audio.
        seed: For texts and audio.
        fields: Further JSON fields of every sample.

    Returns:
        ``folder``.
    """
    rng = random.Random(seed)
    with ShardWriter(folder, "speech", samples_per_shard) as writer:
        for number in range(num_samples):
            text = random_text(rng, rng.randint(*num_words))
            audio, words = speak_tones(text, sample_rate_hz=sample_rate_hz, seed=seed)
            record = {"text": text, "speaker": f"s{number % 3}", **(fields or {})}
            if timed:
                record["words"] = words
            writer.write(f"speech{number:06d}", record, encode_flac(audio, sample_rate_hz))
    return Path(folder)


def save_text_shards(
    folder: str | Path,
    *,
    num_samples: int = 12,
    samples_per_shard: int = 4,
    num_words: tuple[int, int] = (6, 40),
    seed: int = 1,
) -> Path:
    """Save plain-text samples with keys ``text000000`` and so on; arguments as in `save_speech_shards`."""
    rng = random.Random(seed)
    with ShardWriter(folder, "text", samples_per_shard) as writer:
        for number in range(num_samples):
            writer.write(f"text{number:06d}", {"text": random_text(rng, rng.randint(*num_words))})
    return Path(folder)


def save_choice_shards(folder: str | Path, *, num_samples: int = 6, num_choices: int = 4, seed: int = 2) -> Path:
    """Save spoken prompts with fields ``choices``, ``answer`` (an index) and ``domain``."""
    rng = random.Random(seed)
    with ShardWriter(folder, "choice", num_samples) as writer:
        for number in range(num_samples):
            text = random_text(rng, rng.randint(4, 8))
            audio, words = speak_tones(text, seed=seed)
            record = {
                "text": text,
                "words": words,
                "choices": [random_text(rng, 1 + choice % 2) for choice in range(num_choices)],
                "answer": number % num_choices,
                "domain": f"d{number % 2}",
            }
            writer.write(f"choice{number:06d}", record, encode_flac(audio, 16_000))
    return Path(folder)
