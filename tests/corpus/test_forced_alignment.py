import itertools

import pytest
import torch

from salad_lightning.corpus.ctc_vocabulary import CtcVocabulary
from salad_lightning.corpus.forced_alignment import align_words

# blank, |, then letters
LETTERS = {"<pad>": 0, "|": 1, "A": 2, "B": 3, "C": 4, "'": 5}


def _emission(frames, sure=0.9, classes=6):
    """``[T, V]``: each frame says its token with probability ``sure``."""
    probs = torch.full((len(frames), classes), (1 - sure) / (classes - 1))
    probs[torch.arange(len(frames)), torch.tensor(frames)] = sure
    return probs.log()


def test_built_by_hand():
    #       A  A  .  B  .  |  .  .  C  .
    path = [2, 2, 0, 3, 0, 1, 0, 0, 4, 0]
    first, second = align_words(_emission(path), [[2, 3], [4]], blank=0, delimiter=1)
    assert (first.first, first.last) == (0, 4)
    assert (second.first, second.last) == (8, 9)
    assert first.confidence == pytest.approx(0.9, abs=1e-4)  # A, A and B, not the blank between


def test_a_letter_twice_needs_a_blank_between():
    (word,) = align_words(_emission([2, 0, 2]), [[2, 2]], blank=0)
    assert (word.first, word.last) == (0, 3)
    assert align_words(_emission([2, 2]), [[2, 2]], blank=0) is None


def test_a_word_that_is_not_there_has_low_confidence():
    heard, missing = align_words(_emission([2, 2, 0, 0, 0, 0]), [[2], [3]], blank=0)
    assert heard.confidence > 0.85
    assert missing.confidence < 0.1


def test_the_wildcard_takes_what_no_letter_explains():
    #       A  B  .  C  A  .  C  |  B    the wildcard stands for "C A . C"
    path = [2, 3, 0, 4, 2, 0, 4, 1, 3]
    words = align_words(_emission(path), [[2, 3], [6], [3]], blank=0)
    assert [(word.first, word.last) for word in words] == [(0, 2), (3, 8), (8, 9)]
    assert words[1].confidence is None


@pytest.mark.parametrize("frames", [0, 1, 2])
def test_too_few_frames(frames):
    assert align_words(torch.zeros(frames, 6).log_softmax(-1), [[2], [3], [4]], blank=0) is None


def test_against_every_path(tmp_path):
    """The best of all paths, found by trying each, has the same score and the same words."""
    generator = torch.Generator().manual_seed(0)
    words, blank = [[2, 2], [3]], 0
    for _ in range(20):
        log_probs = torch.randn(5, 4, generator=generator).log_softmax(-1)
        best = max(
            (path for path in itertools.product(range(4), repeat=5) if _collapsed(path) == [2, 2, 3]),
            key=lambda path: sum(log_probs[t, token].item() for t, token in enumerate(path)),
        )
        places = align_words(log_probs, words, blank=blank)
        assert places[0].first == best.index(2)
        assert places[0].last == max(t for t, token in enumerate(best) if token == 2) + 1
        assert (places[1].first, places[1].last) == (best.index(3), max(t for t, x in enumerate(best) if x == 3) + 1)


def _collapsed(path):
    return [token for token, _ in itertools.groupby(path) if token != 0]


def test_words_without_tokens_are_refused():
    with pytest.raises(ValueError, match="needs a token"):
        align_words(_emission([0]), [[]], blank=0)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("abc", [2, 3, 4]),
        ("A-b,", [2, 3]),
        ("â", [2]),  # accents fall where the model has none
        ("b’a", [3, 5, 2]),
        ("42", [6]),
        ("a42b", [2, 6, 3]),
        ("xyz", [6]),
        ("$", [6]),
        ("a|b", [2, 6, 3]),  # a symbol, not the delimiter
        ("–", []),
        ("...", []),
        ("'", []),
    ],
)
def test_spelling(word, expected):
    assert CtcVocabulary(LETTERS, 0, "|").spell(word) == expected


def test_original_words_are_kept():
    words, spelled = CtcVocabulary(LETTERS, 0, "|").units("— Ab, (c) – 7 … ")
    assert words == ["— Ab,", "(c) –", "7 …"]
    assert spelled == [[2, 3], [4], [6]]
    assert CtcVocabulary(LETTERS, 0, "|").units(" – ") == ([], [])


def test_pieces_of_words():
    tokens = {"<blank>": 0, "▁": 1, "▁the": 2, "t": 3, "h": 4, "e": 5, "he": 6, "<unk>": 7}
    vocabulary = CtcVocabulary(tokens, 0)
    assert vocabulary.spell("The") == [2]
    assert vocabulary.spell("he") == [1, 6]
    assert vocabulary.spell("7") == [1, 8]
