"""Does an independent recognizer understand the synthetic speech? Broken speech must not pass for hard content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchmetrics.functional.text import char_error_rate
from tqdm import tqdm  # type: ignore[import-untyped]

from salad_lightning.data.format import decode, read_shard
from salad_lightning.evaluation.recognizer import Recognizer
from salad_lightning.evaluation.transcription import normalise

__all__ = ["character_error_rates"]


def character_error_rates(shards: Sequence[Path], recognizer: Recognizer) -> dict[str, float]:
    """Character error rate of every spoken text, by key; 0 is perfect, more than 1 is possible.

    Args:
        shards: With audio.
        recognizer: Independent of the model that is studied.
    """
    rates: dict[str, float] = {}
    samples = (raw for path in shards for raw in read_shard(path))
    for raw in tqdm(samples, desc="transcribe", unit=" texts"):
        utterance = decode(raw, source="", sample_rate_hz=recognizer.sample_rate_hz)
        assert utterance.audio is not None
        target = normalise(utterance.text)
        heard = normalise(recognizer.transcribe([utterance.audio])[0])
        rates[utterance.key] = float(char_error_rate([heard], [target])) if target else 1.0
    return rates
