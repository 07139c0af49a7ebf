"""Speech recognition by any model that Hugging Face's pipeline runs: CTC, Whisper, other encoder-decoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import pipeline

from salad_lightning.errors import UserError
from salad_lightning.evaluation.fingerprint import model_name

__all__ = ["Recognizer"]

# Longer audio than Whisper's window is decoded window by window, which it does only with time stamps.
_WHISPER_WINDOW_S = 30.0


class Recognizer:
    """Audio to text, one clip at a time: padding changes what some models hear.

    Args:
        path: Folder or hub name with model, feature extractor and tokenizer.
        device: Where it runs.
        where: Key that names it, for messages.

    Raises:
        UserError: If there is no such model.

    Attributes:
        name: The path, with a hash of what lies there.
        sample_rate_hz: Of the audio it takes.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu", where: str = "") -> None:
        self.name = model_name(path)
        try:
            built: Any = pipeline("automatic-speech-recognition", model=path, device=device)
            self.sample_rate_hz = int(built.feature_extractor.sampling_rate)
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError, TypeError) as error:
            first = str(error).strip().partition("\n")[0]
            raise UserError(
                f"no speech recognizer can be loaded ({first})",
                where=f"{where}: {path}" if where else path,
                cure="give a folder or hub name with a recognition model, its feature extractor and its tokenizer",
            ) from error
        self._pipeline = built

    def transcribe(self, clips: Sequence[NDArray[np.float32]]) -> list[str]:
        """Texts of clips ``[L]`` at ``sample_rate_hz``."""
        whisper = self._pipeline.model.config.model_type == "whisper"
        texts = []
        for clip in clips:
            inputs = {"raw": clip, "sampling_rate": self.sample_rate_hz}
            long = whisper and len(clip) > _WHISPER_WINDOW_S * self.sample_rate_hz
            texts.append(str(self._pipeline(inputs, **({"return_timestamps": True} if long else {}))["text"]).strip())
        return texts
