"""Does an independent recognizer understand the synthetic speech? Broken speech must not pass for hard content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.text import char_error_rate
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer

from salad_lightning.data.format import decode, read_shard
from salad_lightning.errors import UserError

__all__ = ["CTCRecognizer", "character_error_rates", "spelled"]


class CTCRecognizer:
    """Any Hugging Face CTC model, decoded greedily.

    Args:
        path: Folder or hub name with model, feature extractor and tokenizer.
        device: Where it runs.

    Raises:
        UserError: If one of them cannot be loaded.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        try:
            self._extractor: Any = AutoFeatureExtractor.from_pretrained(path)  # type: ignore[no-untyped-call]
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            self._model = AutoModelForCTC.from_pretrained(path).eval().to(device)
        except (OSError, ValueError, KeyError) as error:
            first = str(error).partition("\n")[0]
            raise UserError(
                f"no CTC recognizer can be loaded ({first})",
                where=f"score.recognizer: {path}",
                cure="give a folder with a CTC model, its feature extractor and its tokenizer",
            ) from error
        self.sample_rate_hz = int(self._extractor.sampling_rate)
        # Hugging Face's CTC models have the padding token for a blank.
        self._blank = int(self._model.config.pad_token_id or 0)

    @torch.no_grad()
    def transcribe(self, audio: NDArray[Any]) -> str:
        """What is said in ``[L]`` samples at ``sample_rate_hz``."""
        inputs = self._extractor(audio, sampling_rate=self.sample_rate_hz, return_tensors="pt")
        logits: Tensor = self._model(**inputs.to(self._model.device)).logits
        ids = torch.unique_consecutive(logits[0].argmax(-1))
        pieces = self._tokenizer.convert_ids_to_tokens([i for i in ids.tolist() if i != self._blank])
        # Spelled here: a CTC tokenizer's own decode would merge letters that are doubled in the text.
        delimiter = getattr(self._tokenizer, "word_delimiter_token", None) or "|"
        return "".join(pieces).replace(delimiter, " ").replace("▁", " ").replace("Ġ", " ")


def spelled(text: str) -> str:
    """Letters, digits and single spaces, in lower case: what error rates are counted on."""
    return " ".join("".join(char if char.isalnum() else " " for char in text.casefold().replace("'", "")).split())


def character_error_rates(shards: Sequence[Path], recognizer: CTCRecognizer) -> dict[str, float]:
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
        target = spelled(utterance.text)
        heard = spelled(recognizer.transcribe(utterance.audio))
        rates[utterance.key] = float(char_error_rate([heard], [target])) if target else 1.0
    return rates
