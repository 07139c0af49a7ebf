"""What was selected and why, for a person: one page and one figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from numpy.typing import NDArray

from salad_lightning.selection.corpus import TextCorpus
from salad_lightning.selection.draw import Share
from salad_lightning.selection.score import ClusterScore

__all__ = ["write_report"]

_SHOWN, _EXAMPLES, _CHARS = 5, 3, 160


def write_report(
    corpus: TextCorpus,
    labels_N: NDArray[np.int32],
    scores: Sequence[ClusterScore],
    shares: Mapping[int, Share],
    folder: Path,
) -> None:
    """Write ``report.md`` and ``report.png``: sizes, M with its error, target against web, example texts.

    Args:
        corpus: N texts.
        labels_N: Their clusters.
        scores: One a cluster.
        shares: What each cluster gets.
        folder: An existing folder.
    """
    kept = sorted((score for score in scores if not score.dropped), key=lambda score: -score.misalignment)
    texts, seconds = sum(share.texts for share in shares.values()), sum(share.seconds for share in shares.values())
    lines = [
        "# Selection",
        "",
        f"{texts} texts, about {seconds / 3600:.2f} h of speech, of {len(corpus)} texts in {len(scores)} clusters; "
        f"{len(scores) - len(kept)} clusters dropped.",
        "",
        "![sizes, misalignment and shares](report.png)",
        "",
        *_table(kept, shares),
    ]
    for title, some in (("Highest misalignment", kept[:_SHOWN]), ("Lowest misalignment", kept[-_SHOWN:][::-1])):
        lines += ["", f"## {title}"]
        for entry in some:
            lines += ["", f"Cluster {entry.cluster}, M = {entry.misalignment:.3f}:", ""]
            lines += [f"- {text}" for text in _examples(corpus, labels_N, entry.cluster)]
    dropped = [score for score in scores if score.dropped]
    if dropped:
        lines += ["", "## Dropped", ""]
        lines += [f"- cluster {score.cluster}: {score.dropped}" for score in dropped]
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(labels_N, kept, shares, folder / "report.png")


def _table(kept: Sequence[ClusterScore], shares: Mapping[int, Share]) -> list[str]:
    rows = ["| cluster | M | standard error | CER | web | target | seconds |", "|---|---|---|---|---|---|---|"]
    for entry in kept:
        share = shares[entry.cluster]
        cer = "–" if entry.cer is None else f"{entry.cer:.2f}"
        rows.append(
            f"| {entry.cluster} | {entry.misalignment:.3f} | {entry.standard_error:.3f} | {cer} | {share.web:.4f} | "
            f"{share.target:.4f} | {share.seconds:.0f} |"
        )
    return rows


def _examples(corpus: TextCorpus, labels_N: NDArray[np.int32], cluster: int) -> list[str]:
    members = np.flatnonzero(labels_N == cluster)[:_EXAMPLES].tolist()
    return [" ".join(corpus[index]["text"].split())[:_CHARS] for index in members]


def _plot(labels_N: NDArray[np.int32], kept: Sequence[ClusterScore], shares: Mapping[int, Share], path: Path) -> None:
    matplotlib.use("Agg")  # no display is needed
    figure, (sizes, losses, targets) = plt.subplots(3, 1, figsize=(8, 9), constrained_layout=True)
    counts = np.bincount(labels_N, minlength=len(shares))
    sizes.bar(range(len(counts)), counts)
    sizes.set(xlabel="cluster", ylabel="texts", title="cluster sizes")
    ranks = range(len(kept))
    errors = [entry.standard_error if math.isfinite(entry.standard_error) else 0.0 for entry in kept]
    losses.errorbar(ranks, [entry.raw for entry in kept], yerr=errors, fmt=".", label="measured, ± standard error")
    losses.plot(ranks, [entry.misalignment for entry in kept], "_", label="shrunk")
    losses.set(xlabel="cluster, by M", ylabel="M, nats per token", title="misalignment")
    losses.legend()
    targets.bar(ranks, [shares[entry.cluster].target for entry in kept], label="target")
    targets.step(ranks, [shares[entry.cluster].web for entry in kept], where="mid", color="black", label="web")
    targets.set(xlabel="cluster, by M", ylabel="share of texts", title="target against web")
    targets.legend()
    for axes in (sizes, losses, targets):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
