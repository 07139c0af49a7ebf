"""espeak-ng, in process: formant synthesis of many voices, about 600 times faster than real time."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from salad_lightning.errors import UserError
from salad_lightning.interfaces import Speech, Synthesizer, TimedWord
from salad_lightning.synthesizers import _espeak_library as library

__all__ = ["EspeakSynthesizer", "TimedPhoneme"]


class TimedPhoneme(NamedTuple):
    """A phoneme, by espeak's ASCII name without stress marks ("" for a pause), in seconds from the start."""

    name: str
    start_s: float
    end_s: float


class EspeakSynthesizer(Synthesizer):
    """Speaks with espeak-ng (https://github.com/espeak-ng/espeak-ng), whose library and voices come in a wheel.

    Words that espeak fuses in speech ("in the", "of the") are reported as one unit. Breath noise is left out of the
    voices, because it cannot be reproduced.

    Args:
        voice: A language of espeak's (``en-us``, ``gmw/en``, ``en-gb-x-rp``, ``en-029`` …), with or without a
            variant (``en-us+f2``).
        rate_wpm: Words a minute, 80 to 450.
        pitch: 0 to 99; 50 is the voice's own.

    Raises:
        UserError: If there is no such voice.
        ValueError: If rate or pitch is out of range.
    """

    sample_rate_hz: int = library.SAMPLE_RATE_HZ

    def __init__(self, voice: str = "en-us", rate_wpm: int = 175, pitch: int = 50) -> None:
        if not 80 <= rate_wpm <= 450 or not 0 <= pitch <= 99:
            raise ValueError(f"rate_wpm must be 80 to 450 and pitch 0 to 99, not {rate_wpm} and {pitch}")
        language, _, variant = voice.partition("+")
        if language.lower() not in library.languages():
            english = [name for name in library.languages() if name.startswith(("en", "gmw/en"))]
            raise UserError(
                f"espeak-ng has no language {language!r}",
                where="voice",
                cure=f"English ones are {', '.join(sorted(english))}",
            )
        if variant and variant not in library.variants():
            known = ", ".join(sorted(library.variants()))
            raise UserError(f"espeak-ng has no variant {variant!r}", where="voice", cure=f"choose one of {known}")
        self._voice = library.Voice(library.languages()[language.lower()], variant, rate_wpm, pitch)

    def speak(self, text: str, *, seed: int = 0) -> Speech:
        """Say ``text``.

        Args:
            text: What to say.
            seed: Unused: espeak has nothing random in it.

        Raises:
            UserError: If there is nothing to say in ``text``, or the engine fails.
        """
        return self.speak_with_phonemes(text)[0]

    def speak_with_phonemes(self, text: str) -> tuple[Speech, list[TimedPhoneme]]:
        """Say ``text``, and tell the phonemes too.

        Args:
            text: What to say.

        Returns:
            The speech, and phonemes and pauses that cover it from the first sound to the end.

        Raises:
            UserError: If there is nothing to say in ``text``, or the engine fails.
        """
        try:
            samples, events = library.synthesize(text, self._voice)
        except RuntimeError as error:
            raise UserError(str(error), where=f"text {text[:60]!r}", cure="check the text and the voice") from error
        phonemes = _phonemes(events, len(samples))
        words = _units(text, events, phonemes, len(samples))
        if not words:
            raise UserError("nothing to say", where=f"text {text[:60]!r}", cure="give a text with words in it")
        return Speech(_to_float(samples), words), phonemes


def _to_float(samples: NDArray[np.int16]) -> NDArray[np.float32]:
    return samples.astype(np.float32) / np.float32(32768.0)


def _phonemes(events: list[library.Event], num_samples: int) -> list[TimedPhoneme]:
    marked = [event for event in events if event.kind == library.PHONEME]
    starts = np.maximum.accumulate([min(event.sample, num_samples) for event in marked] + [num_samples])
    times = (starts / library.SAMPLE_RATE_HZ).tolist()
    names = ["" if event.phoneme.startswith("_") else event.phoneme.lstrip("',%=") for event in marked]
    return [TimedPhoneme(name, times[i], times[i + 1]) for i, name in enumerate(names)]


def _units(text: str, events: list[library.Event], phonemes: list[TimedPhoneme], num_samples: int) -> list[TimedWord]:
    """Merge words without an event of their own (or without duration) into the unit before."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    onsets = _onsets(spans, events)
    if not onsets:
        return []
    duration_s = num_samples / library.SAMPLE_RATE_HZ
    pauses = [phoneme.start_s for phoneme in phonemes if not phoneme.name]
    heads = sorted(onsets)
    heads[0] = 0  # words before the first event belong to it
    starts = [onsets[min(onsets)] / library.SAMPLE_RATE_HZ]
    kept = [0]
    for head in heads[1:]:
        start_s = onsets[head] / library.SAMPLE_RATE_HZ
        if starts[-1] < start_s < duration_s:
            kept.append(head)
            starts.append(start_s)
    words = []
    for i, head in enumerate(kept):
        last = kept[i + 1] if i + 1 < len(kept) else len(spans)
        latest_s = starts[i + 1] if i + 1 < len(kept) else duration_s
        # The pause after a unit is not part of it.
        end_s = min(
            [time for time in pauses if starts[i] < time < latest_s and _silent(phonemes, time, latest_s)],
            default=latest_s,
        )
        words.append(TimedWord(" ".join(text[a:b] for a, b in spans[head:last]), starts[i], end_s))
    return words


def _onsets(spans: list[tuple[int, int]], events: list[library.Event]) -> dict[int, int]:
    """Index of a written word → sample of its first event."""
    onsets: dict[int, int] = {}
    for event in events:
        if event.kind == library.WORD:
            index = next((i for i, (_, end) in enumerate(spans) if event.character < end), None)
            if index is not None:
                onsets.setdefault(index, event.sample)
    return onsets


def _silent(phonemes: list[TimedPhoneme], start_s: float, end_s: float) -> bool:
    """Whether nothing but pauses lies between two times."""
    return all(not phoneme.name for phoneme in phonemes if start_s <= phoneme.start_s < end_s)
