"""What every synthesizer must hold, as tests."""

from __future__ import annotations

import numpy as np
import pytest

from salad_lightning.errors import UserError
from salad_lightning.interfaces import Speech, Synthesizer

__all__ = ["SynthesizerContract"]

_TEXTS = (
    "Hello.",
    "The river runs to the sea, and the sea is deep.",
    "In the beginning there was nothing; it exploded.  Then came 25 stars!",
)


class SynthesizerContract:
    """Subclass it in a test file as ``class TestMine(SynthesizerContract)`` and say how to build a synthesizer."""

    def make_synthesizer(self) -> Synthesizer:
        """A synthesizer as a user would build it."""
        raise NotImplementedError

    @pytest.mark.parametrize("text", _TEXTS)
    def test_audio(self, text: str) -> None:
        """One channel of finite float32 in [-1, 1], neither silent nor of an unlikely length."""
        synthesizer = self.make_synthesizer()
        audio = synthesizer.speak(text).audio
        assert audio.dtype == np.float32
        assert audio.ndim == 1
        assert np.isfinite(audio).all()
        assert np.abs(audio).max() <= 1
        assert np.abs(audio).max() > 0.01, "silent"
        seconds_a_word = len(audio) / synthesizer.sample_rate_hz / len(text.split())
        assert 0.1 < seconds_a_word < 2, f"{seconds_a_word:.2f} s a word: is sample_rate_hz right?"

    @pytest.mark.parametrize("text", _TEXTS)
    def test_words_spell_the_text(self, text: str) -> None:
        """Units joined by spaces are the text, so that a cut between units is a cut between words."""
        words = self.make_synthesizer().speak(text).words
        assert " ".join(unit.word for unit in words) == " ".join(text.split())

    @pytest.mark.parametrize("text", _TEXTS)
    def test_times_are_monotone_and_inside_the_audio(self, text: str) -> None:
        """Every unit has a duration, none begins before the last ended, and all lie inside the audio."""
        synthesizer = self.make_synthesizer()
        audio, words = synthesizer.speak(text)
        end_s = 0.0
        for unit in words:
            assert unit.start_s >= end_s - 1e-6, f"{unit} begins before its predecessor ends"
            assert unit.end_s > unit.start_s, f"{unit} has no duration"
            end_s = unit.end_s
        assert end_s <= len(audio) / synthesizer.sample_rate_hz + 1e-6

    def test_same_seed_same_speech(self) -> None:
        """Deterministic for a seed, whatever was said in between and by whichever instance."""
        synthesizer = self.make_synthesizer()
        first = synthesizer.speak(_TEXTS[1], seed=3)
        synthesizer.speak(_TEXTS[2], seed=4)
        self._assert_same(first, synthesizer.speak(_TEXTS[1], seed=3))
        self._assert_same(first, self.make_synthesizer().speak(_TEXTS[1], seed=3))

    @pytest.mark.parametrize("text", ["", "  \n "])
    def test_nothing_to_say(self, text: str) -> None:
        """An empty text is the user's mistake."""
        with pytest.raises(UserError):
            self.make_synthesizer().speak(text)

    @staticmethod
    def _assert_same(one: Speech, other: Speech) -> None:
        assert one.words == other.words
        np.testing.assert_array_equal(one.audio, other.audio)
