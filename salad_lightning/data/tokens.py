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

# Most texts are ASCII alone, and looking all characters up at once is several times faster than asking each.
_ASCII_SPACE = np.array([chr(code).isspace() for code in range(128)])
_ASCII_LETTER = np.array([chr(code).isalnum() for code in range(128)])
_NOT_ASCII_LETTERS = bytes(code for code in range(128) if not chr(code).isalnum())


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
    backend = tokenizer.backend_tokenizer
    # It cuts and pads as its file says, or as the last call of the tokenizer did.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    encoding = backend.encode(text, add_special_tokens=False)
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
    letters = [_letters(word.word) for word in words]
    if not spelled or "".join(letters) != spelled:
        return None
    times = [word for word, part in zip(words, letters, strict=True) if part]  # some aligners report pauses as words
    stops = np.cumsum([len(part) for part in letters if part])  # letters up to the end of each word
    firsts = stops[:-1]
    # The next word's characters begin between the last letter of one word and the first of the next.
    spaces = _at_or_after(np.flatnonzero(_is_space(text)), places[firsts - 1] + 1, len(text))
    return _group(np.append(0, np.minimum(spaces, places[firsts])), times, tokens)


def _letters(text: str) -> str:
    folded = text.casefold()
    return folded if folded.isalnum() else "".join(filter(str.isalnum, folded))


def _spelled(text: str) -> tuple[str, NDArray[np.int64]]:
    """The letters of a text, and which character each comes from: some fold to several."""
    if text.isascii():
        content = text.encode()
        places = np.flatnonzero(_ASCII_LETTER[np.frombuffer(content, dtype=np.uint8)])
        return content.translate(None, _NOT_ASCII_LETTERS).lower().decode(), places
    parts = [_letters(char) for char in text]
    return "".join(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])


def _is_space(text: str) -> NDArray[np.bool_]:
    if text.isascii():
        return _ASCII_SPACE[np.frombuffer(text.encode(), dtype=np.uint8)]
    return np.fromiter(map(str.isspace, text), dtype=np.bool_, count=len(text))


def _at_or_after(sorted_places: NDArray[np.int64], indices: NDArray[np.int64], otherwise: int) -> NDArray[np.int64]:
    """The first of some places at or after each index, or ``otherwise``."""
    return np.append(sorted_places, otherwise)[np.searchsorted(sorted_places, indices)]


def _group(starts: NDArray[np.int64], times: list[TimedWord], tokens: TokenizedText) -> list[Unit]:
    """Units from the words' first characters: words joined by a token that covers parts of both are one unit."""
    firsts = np.searchsorted(starts, tokens.first_char, side="right") - 1
    lasts = np.searchsorted(starts, tokens.last_char, side="right") - 1
    number = len(times)
    joined = np.zeros(number, dtype=np.bool_)  # joined[w]: word w hangs together with word w - 1
    for token in np.flatnonzero(firsts < lasts).tolist():
        joined[firsts[token] + 1 : lasts[token] + 1] = True
    # A word none of whose characters ends a token cannot stand alone.
    is_owner = np.zeros(number, dtype=np.bool_)
    is_owner[lasts] = True
    joined[np.minimum(np.flatnonzero(~is_owner) + 1, number - 1)] = True
    joined[0] = False
    heads = np.flatnonzero(~joined)
    tails = np.append(heads[1:], number) - 1
    stops = np.searchsorted(lasts, tails, side="right").tolist()
    counts = np.add.reduceat([max(len(timed.word.split()), 1) for timed in times], heads).tolist()
    return [
        Unit(first, stop, times[head].start_s, times[tail].end_s, count)
        for first, stop, head, tail, count in zip(
            [0, *stops[:-1]], stops, heads.tolist(), tails.tolist(), counts, strict=True
        )
    ]
