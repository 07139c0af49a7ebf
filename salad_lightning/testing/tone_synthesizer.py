"""A synthesizer that says every word as a tone of its own, and can be told to fail."""

from __future__ import annotations

import numpy as np

from salad_lightning.errors import UserError
from salad_lightning.interfaces import Speech, Synthesizer, TimedWord
from salad_lightning.testing.shards import speak_tones

__all__ = ["ToneSynthesizer"]


class ToneSynthesizer(Synthesizer):
    """Speaks as `speak_tones` does; texts with some word go wrong, as real synthesizers do.

    Args:
        raises_at: Texts with one of these words raise an error.
        silent_at: They give silence.
        mumbles_at: They give noise, as loud and as long as the speech would be.
    """

    sample_rate_hz = 16_000

    def __init__(
        self,
        raises_at: list[str] | None = None,
        silent_at: list[str] | None = None,
        mumbles_at: list[str] | None = None,
    ) -> None:
        self._raises_at, self._silent_at = set(raises_at or ()), set(silent_at or ())
        self._mumbles_at = set(mumbles_at or ())

    def speak(self, text: str, *, seed: int = 0) -> Speech:
        """Say ``text``.

        Raises:
            UserError: If it is empty.
            RuntimeError: If it has a word to raise at.
        """
        said = text.split()
        if not said:
            raise UserError("nothing to say", cure="give a text")
        if self._raises_at & set(said):
            raise RuntimeError("the engine failed")
        audio, words = speak_tones(text, sample_rate_hz=self.sample_rate_hz, seed=seed)
        if self._silent_at & set(said):
            audio = np.zeros_like(audio)
        if self._mumbles_at & set(said):
            audio = (0.2 * np.random.default_rng(seed).standard_normal(len(audio))).clip(-1, 1).astype(np.float32)
        return Speech(
            audio, [TimedWord(word, start_s, end_s) for word, (_, start_s, end_s) in zip(said, words, strict=True)]
        )
