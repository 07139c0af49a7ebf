"""From a transcript to tokens, once, and from tokens to the spoken words that contain them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from salad_lightning.interfaces import TimedWord

__all__ = ["TokenizedText", "Unit", "bos_id", "spoken_units", "tokenize"]


class TokenizedText(NamedTuple):
    """A text as tokens, without special tokens.

    Attributes:
        ids: ``[T]`` int64.
        first_char: ``[T]`` index of each token's first character that is not white space.
        last_char: ``[T]`` index of each token's last character, which decides where the token belongs.
    """

    ids: NDArray[np.int64]
    first_char: NDArray[np.int64]
    last_char: NDArray[np.int64]


class Unit(NamedTuple):
    """A stretch of speech that is never cut: a word, or several where speech or a token fuses them.

    Attributes:
        first_token: First token of the unit.
        stop_token: One past its last token.
        start_s: Start of its first word.
        end_s: End of its last word.
        num_words: Words in it.
    """

    first_token: int
    stop_token: int
    start_s: float
    end_s: float
    num_words: int


@functools.lru_cache(maxsize=8)
def bos_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token that the tokenizer's own template puts before every text (Llama's BOS), or None."""
    with_special = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return int(bos) if bos is not None and with_special and with_special[0] == bos else None


def tokenize(text: str, tokenizer: PreTrainedTokenizerFast) -> TokenizedText:
    """Tokenise without special tokens, keeping which characters each token covers."""
    # The backend itself: no warning on texts longer than the model, which are split later, and several times faster.
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    first, last = [], []
    length = len(text)
    for start, stop in encoding.offsets:
        # Some tokenizers trim white space from offsets and leave a token of nothing else empty.
        end = stop - 1 if start < stop <= length else max(min(stop, length) - 1, min(start, length - 1), 0)
        while start < end and text[start].isspace():
            start += 1
        first.append(start if start < end else end)
        last.append(end)
    ids = np.asarray(encoding.ids, dtype=np.int64)
    # Byte-level pieces of one character share its offset; the order is kept in any case.
    last_char = np.maximum.accumulate(np.asarray(last, dtype=np.int64)) if last else np.zeros(0, dtype=np.int64)
    return TokenizedText(ids, np.asarray(first, dtype=np.int64), last_char)


def spoken_units(text: str, words: Sequence[TimedWord], tokens: TokenizedText) -> list[Unit] | None:
    """Match timed words to the text in order, and tokens to the words.

    Words are compared by letters and digits alone, without case. A token belongs to the word that contains its last
    character; white space belongs to the word after it, punctuation to the word before it. Words that share a token
    become one unit.

    Returns:
        Units that cover all tokens in order, or None where the words do not spell the text.
    """
    spelled, places = _spelled(text)
    starts: list[int] = []  # character where each entry's share of the text begins
    times: list[TimedWord] = []
    position = 0
    for word in words:
        letters = _letters(word.word)
        if not letters:  # some aligners report pauses as empty words
            continue
        if not spelled.startswith(letters, position):
            return None
        starts.append(_boundary(text, places[position - 1], places[position]) if position else 0)
        times.append(word)
        position += len(letters)
    if position != len(spelled) or not times:
        return None
    return _group(starts, times, tokens)


def _letters(text: str) -> str:
    folded = text.casefold()
    return folded if folded.isalnum() else "".join(filter(str.isalnum, folded))


def _spelled(text: str) -> tuple[str, list[int]]:
    """The letters of a text, and which character each comes from: some fold to several."""
    if text.isascii():
        return _letters(text), [index for index, char in enumerate(text) if char.isalnum()]
    parts = [_letters(char) for char in text]
    return "".join(parts), [index for index, part in enumerate(parts) for _ in part]


def _boundary(text: str, last: int, first: int) -> int:
    """Where the next word's characters begin, between the last letter of one word and the first of the next."""
    return next((index for index in range(last + 1, first) if text[index].isspace()), first)


def _group(starts: list[int], times: list[TimedWord], tokens: TokenizedText) -> list[Unit]:
    """Units from the words' first characters: words joined by a token that covers parts of both are one unit."""
    firsts = np.searchsorted(starts, tokens.first_char, side="right") - 1
    lasts = np.searchsorted(starts, tokens.last_char, side="right") - 1
    joined = [False] * len(times)  # joined[w]: word w hangs together with word w - 1
    for token in np.flatnonzero(firsts < lasts).tolist():
        for word in range(firsts[token] + 1, lasts[token] + 1):
            joined[word] = True
    # A word none of whose characters ends a token cannot stand alone.
    owners = set(lasts.tolist())
    stops = np.searchsorted(lasts, np.arange(len(times)), side="right").tolist()
    for word in range(len(times)):
        if word not in owners:
            joined[min(word + 1, len(times) - 1)] = True
    units: list[Unit] = []
    for word, timed in enumerate(times):
        count = max(len(timed.word.split()), 1)
        stop = stops[word]
        if units and joined[word]:
            before = units[-1]
            units[-1] = Unit(before.first_token, stop, before.start_s, timed.end_s, before.num_words + count)
        else:
            units.append(Unit(units[-1].stop_token if units else 0, stop, timed.start_s, timed.end_s, count))
    return units
