"""From the emissions of a CTC model to when each word is spoken."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchaudio.functional import forced_align, merge_tokens

__all__ = ["WordFrames", "align_words"]

# Nats by which the wildcard is less likely than the best token of a frame: it takes sounds that no letter explains,
# and none that one does.
_STAR_COST = 0.5


class WordFrames(NamedTuple):
    """Where a word is.

    Attributes:
        first: Frame.
        last: One past its last frame.
        confidence: Mean posterior of its tokens over their frames, 0 to 1; None where all of it is wildcard.
    """

    first: int
    last: int
    confidence: float | None


def align_words(
    log_probs_TV: Tensor, words: Sequence[Sequence[int]], *, blank: int, delimiter: int | None = None
) -> list[WordFrames] | None:
    """The most likely way through the frames that spells all words in order (Viterbi).

    Args:
        log_probs_TV: ``[T, V]`` log-probabilities.
        words: Token ids of each word, at least one; ``V`` is the wildcard.
        blank: Id of the blank.
        delimiter: Id of the token between words, or None.

    Returns:
        A place for every word, or None where there are fewer frames than the words need.

    Raises:
        ValueError: If a word is empty.
    """
    if not all(words):
        raise ValueError("every word needs a token")
    targets, owners = [], []
    for index, word in enumerate(words):
        if index and delimiter is not None:
            targets.append(delimiter)
            owners.append(-1)
        targets += word
        owners += [index] * len(word)
    repeats = sum(a == b for a, b in itertools.pairwise(targets))
    if not targets or len(log_probs_TV) < len(targets) + repeats:
        return None
    star = log_probs_TV.shape[1]
    star_T1 = log_probs_TV.amax(dim=1, keepdim=True) - _STAR_COST
    emission = torch.cat([log_probs_TV, star_T1], dim=1).float()[None]
    path, scores = forced_align(
        emission, torch.tensor([targets], device=emission.device, dtype=torch.int32), blank=blank
    )
    posteriors = scores[0].exp().cpu()
    spans = merge_tokens(path[0].cpu(), posteriors, blank=blank)
    places = []
    for index in range(len(words)):
        own = [span for span, owner in zip(spans, owners, strict=True) if owner == index]
        heard = [posteriors[span.start : span.end] for span in own if span.token != star]
        confidence = float(torch.cat(heard).mean()) if heard else None
        places.append(WordFrames(own[0].start, own[-1].end, confidence))
    return places
