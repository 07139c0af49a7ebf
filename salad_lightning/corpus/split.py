"""Cutting a long recording between words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from salad_lightning.interfaces import TimedWord

__all__ = ["Segment", "spells", "split_at_pauses"]


class Segment(NamedTuple):
    """A stretch of a recording.

    Attributes:
        text: What is said in it.
        words: With times from its start.
        start_s: In the recording.
        end_s: In the recording.
    """

    text: str
    words: list[TimedWord]
    start_s: float
    end_s: float


def split_at_pauses(text: str, words: Sequence[TimedWord], duration_s: float, max_s: float) -> list[Segment] | None:
    """Cut at the longest pause in the second half of what may be left, again and again.

    Cuts lie in the middle of pauses. A segment is longer than ``max_s`` only where a single word is.

    Args:
        text: The transcript.
        words: Timed words that spell it, by letters and digits.
        duration_s: Of the recording.
        max_s: Longest segment.

    Returns:
        Segments that cover the recording, or None where the words do not spell the text.
    """
    words = [word for word in words if _letters(word.word)]
    places = _places(text, words)
    if places is None:
        return None
    firsts, cuts_s = [0], [0.0]
    while duration_s - cuts_s[-1] > max_s and firsts[-1] < len(words) - 1:
        cut = _next_cut(words, firsts[-1], cuts_s[-1], max_s)
        firsts.append(cut)
        cuts_s.append(_middle(words, cut))
    firsts.append(len(words))
    cuts_s.append(duration_s)
    places.append(len(text))
    return [
        Segment(
            text[places[first] : places[last]].strip(),
            [_shifted(word, start_s, end_s - start_s) for word in words[first:last]],
            start_s,
            end_s,
        )
        for first, last, start_s, end_s in zip(firsts, firsts[1:], cuts_s, cuts_s[1:], strict=False)
    ]


def spells(text: str, words: Sequence[TimedWord]) -> bool:
    """Whether the words spell the text, by letters and digits alone and without case."""
    return _letters(text) == [letter for word in words for letter in _letters(word.word)]


def _next_cut(words: Sequence[TimedWord], first: int, start_s: float, max_s: float) -> int:
    """Index of the word that the next segment begins with."""
    allowed = [cut for cut in range(first + 1, len(words)) if _middle(words, cut) - start_s <= max_s]
    if not allowed:
        return first + 1  # the first word alone is too long
    late = [cut for cut in allowed if _middle(words, cut) - start_s >= max_s / 2]
    return max(late or allowed, key=lambda cut: (words[cut].start_s - words[cut - 1].end_s, cut))


def _middle(words: Sequence[TimedWord], cut: int) -> float:
    return (words[cut - 1].end_s + words[cut].start_s) / 2


def _shifted(word: TimedWord, offset_s: float, duration_s: float) -> TimedWord:
    # Aligners may let words overlap by a frame.
    start_s, end_s = (min(max(time - offset_s, 0.0), duration_s) for time in (word.start_s, word.end_s))
    return TimedWord(word.word, round(start_s, 3), round(end_s, 3))


def _places(text: str, words: Sequence[TimedWord]) -> list[int] | None:
    """Character where each word's share of the text begins; white space and opening quotes go with the next word."""
    spelled = [(letter, index) for index, char in enumerate(text) for letter in _letters(char)]
    places, position = [], 0
    for word in words:
        letters = _letters(word.word)
        part = spelled[position : position + len(letters)]
        if [letter for letter, _ in part] != letters:
            return None
        first = part[0][1]
        after = spelled[position - 1][1] + 1 if position else 0
        places.append(next((index for index in range(after, first) if text[index].isspace()), first))
        position += len(letters)
    if position != len(spelled) or not places:
        return None
    places[0] = 0
    return places


def _letters(text: str) -> list[str]:
    return [letter for letter in text.casefold() if letter.isalnum()]
