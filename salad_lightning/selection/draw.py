"""Which texts are to be spoken: P_target(c) ∝ P_web(c) · M(c)^γ (arXiv 2510.13632, section on active selection)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from salad_lightning.errors import UserError
from salad_lightning.selection.corpus import TextCorpus
from salad_lightning.selection.score import ClusterScore
from salad_lightning.selection.settings import DrawSettings

__all__ = ["Share", "budget_seconds", "check_draw_settings", "draw", "target_shares"]


@dataclass
class Share:
    """What a cluster gets.

    Attributes:
        web: Its share of the corpus.
        misalignment: M(c), nats per token; None where it was dropped.
        target: Its share of the texts to be chosen.
        texts: Chosen.
        seconds: Estimated seconds of their speech.
    """

    web: float
    misalignment: float | None
    target: float
    texts: int = 0
    seconds: float = 0.0


def check_draw_settings(settings: DrawSettings) -> None:
    """Refuse what cannot be drawn.

    Raises:
        UserError: If γ is negative, a share is out of range, or there is no budget, or two.
    """
    if not settings.gamma >= 0:
        cure = "0 samples uniformly, 5 is the paper's; less than 0 would choose what is already understood"
        raise UserError(f"gamma is {settings.gamma}", where="draw.gamma", cure=cure)
    if not 0 < settings.max_share <= 1:
        raise UserError(f"{settings.max_share} is no share", where="draw.max_share", cure="give more than 0, at most 1")
    if (settings.seconds is None) == (settings.share is None):
        cure = "give draw.seconds, or draw.share with draw.natural"
        raise UserError("the budget must be given once", where="draw", cure=cure)
    for key, value in (("seconds", settings.seconds), ("share", settings.share)):
        if value is not None and not value > 0:
            raise UserError(f"a budget of {value} buys nothing", where=f"draw.{key}", cure="give more than 0")
    if settings.share is not None and not settings.natural:
        cure = "list the folders of the natural speech's shards"
        raise UserError("share of what?", where="draw.natural", cure=cure)


def budget_seconds(settings: DrawSettings) -> float:
    """The budget in seconds of speech.

    Raises:
        UserError: If a folder of natural speech has no ``index.json`` that tells its seconds.
    """
    if settings.seconds is not None:
        return settings.seconds
    assert settings.share is not None
    total = 0.0
    for folder in settings.natural:
        path = Path(folder) / "index.json"
        try:
            total += float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = "there is no index.json" if isinstance(error, OSError) else "its index.json does not tell seconds"
            cure = "name folders written by `prepare`, `align`, `encode` or `synthesize`, or give draw.seconds"
            raise UserError(what, where=f"draw.natural: {folder}", cure=cure) from error
    return settings.share * total


def target_shares(
    web_K: NDArray[np.float64], misalignment_K: NDArray[np.float64], gamma: float, max_share: float
) -> NDArray[np.float64]:
    """P_target: web · M^γ, normalised, none above ``max_share``; what is cut off goes to the others in proportion.

    Args:
        web_K: P_web of each cluster; 0 where it cannot be chosen.
        misalignment_K: M(c) > 0.
        gamma: γ ≥ 0.
        max_share: Limit. Where fewer than ``1 / max_share`` clusters can be chosen, they share equally.
    """
    # In logarithms, relative to the largest: M^γ may be out of range.
    with np.errstate(divide="ignore"):
        logs = np.where(web_K > 0, np.log(web_K) + gamma * np.log(np.maximum(misalignment_K, 1e-12)), -np.inf)
    shares: NDArray[np.float64] = np.exp(logs - logs.max())
    shares /= shares.sum()
    limit = max(max_share, 1 / int((web_K > 0).sum()))
    capped = np.zeros(len(shares), dtype=bool)
    while (over := (shares > limit * (1 + 1e-12)) & ~capped).any():
        capped |= over
        shares[capped] = limit
        free = ~capped & (web_K > 0)
        left = max(1 - limit * capped.sum(), 0.0)
        if free.any():
            weight = np.exp(logs[free] - logs[free].max())
            shares[free] = left * weight / weight.sum()
    return shares


def draw(
    corpus: TextCorpus,
    labels_N: NDArray[np.int32],
    scores: Sequence[ClusterScore],
    settings: DrawSettings,
    folder: Path,
) -> dict[int, Share]:
    """Write ``manifest.jsonl`` and ``selection.json``: cluster by P_target, then a text of it, until the budget is met.

    Texts are not repeated. A cluster that is used up leaves its share to the others.

    Args:
        corpus: N texts.
        labels_N: Their clusters.
        scores: One a cluster.
        settings: γ, budget, limit, seed.
        folder: An existing folder.

    Returns:
        What each cluster gets.

    Raises:
        UserError: If a setting is out of range, or the budget is larger than what can be chosen.
    """
    check_draw_settings(settings)
    budget = budget_seconds(settings)
    sizes = np.bincount(labels_N, minlength=len(scores))
    open_ = np.array([not score.dropped for score in scores])
    if settings.max_share * open_.sum() < 1:
        raise UserError(
            f"{open_.sum()} clusters of at most {settings.max_share:g} each do not add up to 1",
            where="draw.max_share",
            cure=f"give {np.ceil(1000 / open_.sum()) / 1000:g} or more",
        )
    misalignment = np.nan_to_num(np.array([score.misalignment for score in scores]))
    web = sizes / sizes.sum()
    target = target_shares(np.where(open_, web, 0), misalignment, settings.gamma, settings.max_share)
    shares = {
        score.cluster: Share(float(web[score.cluster]), None if score.dropped else score.misalignment, float(p))
        for score, p in zip(scores, target, strict=True)
    }
    rates = np.array([score.chars_per_second for score in scores])
    total = 0.0
    with (folder / "manifest.jsonl").open("w", encoding="utf-8") as file:
        for index in _order(labels_N, np.where(open_, web, 0), misalignment, settings):
            cluster = int(labels_N[index])
            row = _manifest_row(corpus[index], index, cluster, shares[cluster], int(sizes[cluster]), rates[cluster])
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            shares[cluster].texts += 1
            shares[cluster].seconds += row["estimated_seconds"]
            total += row["estimated_seconds"]
            if total >= budget:
                break
        else:
            raise UserError(
                f"the budget is {budget:.0f} s of speech, and all that can be chosen is about {total:.0f} s",
                where="draw.seconds" if settings.seconds is not None else "draw.share",
                cure="lower the budget, give more text, or drop fewer clusters",
            )
    content = {str(cluster): {**vars(share), "seconds": round(share.seconds, 3)} for cluster, share in shares.items()}
    (folder / "selection.json").write_text(json.dumps(content, indent=1))
    return shares


def _order(
    labels_N: NDArray[np.int32], web_K: NDArray[np.float64], misalignment_K: NDArray[np.float64], settings: DrawSettings
) -> Iterator[int]:
    """Texts in the order of the draw, until none is left that can be chosen."""
    rng = np.random.default_rng(settings.seed)
    by_cluster = np.argsort(labels_N, kind="stable")
    ends = np.cumsum(np.bincount(labels_N, minlength=len(web_K)))
    waiting = [rng.permutation(part).tolist() for part in np.split(by_cluster, ends[:-1])]
    web = web_K.copy()
    while (web > 0).any():
        bounds = np.cumsum(target_shares(web, misalignment_K, settings.gamma, settings.max_share))
        while True:
            # The last bound is 1 but for rounding, and rng.random() less than 1.
            cluster = int(np.searchsorted(bounds, rng.random() * bounds[-1], side="right"))
            yield waiting[cluster].pop()
            if not waiting[cluster]:
                web[cluster] = 0
                break


def _manifest_row(
    row: dict[str, Any], index: int, cluster: int, share: Share, size: int, chars_per_second: float
) -> dict[str, Any]:
    if "key" in row:
        row["source_key"] = row.pop("key")
    return {
        **row,
        "key": f"c{cluster:04d}-{index:09d}",
        "cluster": cluster,
        "misalignment": share.misalignment,
        "probability": share.target / size,
        "estimated_seconds": round(len(row["text"]) / chars_per_second, 3),
    }
