"""Spelling words as the tokens of a CTC model, whatever its casing and however little of punctuation it knows."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

__all__ = ["CtcVocabulary"]

_WORD_START = "▁"  # sentencepiece's
_SYMBOLS = "&@%#"  # spoken, though Unicode takes them for punctuation
_SAME = {"’": "'", "‘": "'", "ʼ": "'", "`": "'", "ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l"}


class CtcVocabulary:
    """What a CTC model can spell.

    A stretch of a word that it cannot spell (digits in most models, symbols, foreign letters) becomes one wildcard,
    `star`, which stands for any sounds. Numbers are not put into words.

    Args:
        tokens: Token to id.
        blank: Id of the blank.
        delimiter: Token between words ("|" in wav2vec 2.0), or None.

    Attributes:
        blank: Id of the blank.
        delimiter: Id of the token between words, or None.
        star: Id of the wildcard, one past the last token.
    """

    def __init__(self, tokens: Mapping[str, int], blank: int, delimiter: str | None = None) -> None:
        self.blank = blank
        self.delimiter = tokens.get(delimiter) if delimiter else None
        # Special tokens (<s>, [UNK]) are longer than any stretch of letters that could be taken for them.
        unspoken = (blank, self.delimiter)
        self._tokens = {token: index for token, index in tokens.items() if token and index not in unspoken}
        self.star = max(tokens.values()) + 1
        self._starts_words = any(token.startswith(_WORD_START) for token in self._tokens)
        self._longest = max(
            (len(token) for token in self._tokens if token.lstrip(_WORD_START).isalpha()), default=1
        )  # fmt: skip

    def spell(self, word: str) -> list[int]:
        """Token ids of a word; empty where nothing of it is spoken, as for a dash."""
        if not any(map(_is_spoken, word)):
            return []
        ids: list[int] = []
        text = "".join(self._known(char) for char in word)
        if self._starts_words and text:
            text = _WORD_START + text
        at = 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((size for size in sizes if text[at : at + size] in self._tokens), 0)
            if size:
                ids.append(self._tokens[text[at : at + size]])
            elif text[at] != _WORD_START and ids[-1:] != [self.star]:
                ids.append(self.star)
            at += size or 1
        return ids

    def units(self, text: str) -> tuple[list[str], list[list[int]]]:
        """White-space separated words of a text with their spelling.

        A word of which nothing is spoken joins the word before it, or the first after it.
        """
        words: list[str] = []
        spelled: list[list[int]] = []
        waiting = ""
        for word in text.split():
            ids = self.spell(word)
            if ids:
                words.append(f"{waiting} {word}".strip())
                spelled.append(ids)
                waiting = ""
            elif words:
                words[-1] += f" {word}"
            else:
                waiting = f"{waiting} {word}".strip()
        return words, spelled

    def _known(self, char: str) -> str:
        """The character as the vocabulary has it; itself where it has none but it is spoken; "" for punctuation."""
        plain = "".join(part for part in unicodedata.normalize("NFKD", char) if not unicodedata.combining(part))
        for form in (char, _SAME.get(char.lower(), char), plain):
            for cased in (form, form.lower(), form.upper()):
                if cased and all(part in self._tokens for part in cased):
                    return cased
        return char if _is_spoken(char) else ""


def _is_spoken(char: str) -> bool:
    return char.isalnum() or char in _SYMBOLS or unicodedata.category(char).startswith("S")
