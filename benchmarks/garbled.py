"""A voice that breaks on some texts, as real synthesizers do on names, numbers and scripts they were not made for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from salad_lightning.interfaces import Speech
from salad_lightning.synthesizers.espeak import EspeakSynthesizer

__all__ = ["GarbledSynthesizer"]

_PIECE_S = 0.06


class GarbledSynthesizer(EspeakSynthesizer):
    """espeak-ng, but the sound of some texts is cut into 60 ms pieces that come in random order.

    Args:
        broken: JSONL file of the texts that break, in ``text``.
        voice: As espeak's.
        rate_wpm: As espeak's.
    """

    def __init__(self, broken: str, voice: str = "en-us", rate_wpm: int = 175) -> None:
        super().__init__(voice, rate_wpm)
        self._broken = {json.loads(line)["text"] for line in Path(broken).read_text(encoding="utf-8").splitlines()}

    def speak(self, text: str, *, seed: int = 0) -> Speech:
        """As espeak, word times included; the words are only not there."""
        speech = super().speak(text, seed=seed)
        if text not in self._broken:
            return speech
        size = int(_PIECE_S * self.sample_rate_hz)
        pieces = [speech.audio[begin : begin + size] for begin in range(0, len(speech.audio), size)]
        order = np.random.default_rng(len(text)).permutation(len(pieces))
        return speech._replace(audio=np.concatenate([pieces[index] for index in order]))
