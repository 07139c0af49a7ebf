"""M(c) of every cluster from the losses of its probe texts, with a standard error, shrunk by it; and what is dropped.

The shrinkage is the parametric empirical Bayes estimator (C. Morris, "Parametric empirical Bayes inference", JASA 78,
1983; James and Stein's for unequal variances). With raw means m_c and standard errors s_c:

    τ² = max(0, variance of m_c over clusters − mean of s_c²)          how much clusters truly differ
    μ  = Σ m_c / (τ² + s_c²)  ÷  Σ 1 / (τ² + s_c²)                     the overall mean
    M(c) = μ + τ² / (τ² + s_c²) · (m_c − μ)

A cluster that was measured badly moves to the mean. At γ = 5 an error of 20 % in M is a factor 2.5 in weight.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, variance

from salad_lightning.data.format import decode, read_shard
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.errors import UserError
from salad_lightning.evaluation.recognizer import Recognizer
from salad_lightning.model.checkpoint_folder import is_checkpoint_folder
from salad_lightning.selection.intelligibility import character_error_rates
from salad_lightning.selection.settings import ScoreSettings
from salad_lightning.selection.stage1 import TextLoss, distillation_losses
from salad_lightning.training.checkpoints import load_checkpoint
from salad_lightning.training.handover import check_not_decayed

__all__ = [
    "ClusterScore",
    "Probe",
    "check_score_settings",
    "cluster_score",
    "mean_and_error",
    "read_probes",
    "score",
    "shrink",
]


@dataclass(frozen=True)
class Probe:
    """A spoken probe text.

    Attributes:
        key: Of its sample.
        cluster: Of its text.
        text: What is said.
        seconds: How long it takes.
    """

    key: str
    cluster: int
    text: str
    seconds: float


@dataclass
class ClusterScore:
    """What is known of one cluster.

    Attributes:
        cluster: Its number.
        num_texts: Probe texts that count.
        raw: Mean distillation loss per token, nats.
        standard_error: Of ``raw``; infinite below two texts.
        misalignment: M(c): ``raw`` shrunk towards the overall mean.
        cer: Mean character error rate of its probes, or None where it was not asked for.
        chars_per_second: Of its speech.
        dropped: Why it cannot be chosen; empty where it can.
    """

    cluster: int
    num_texts: int = 0
    raw: float = math.nan
    standard_error: float = math.inf
    misalignment: float = math.nan
    cer: float | None = None
    chars_per_second: float = math.nan
    dropped: str = ""


def score(
    settings: ScoreSettings,
    shards: Path,
    num_clusters: int,
    folder: Path,
    *,
    unspoken: Sequence[Mapping[str, object]] = (),
) -> list[ClusterScore]:
    """Score every cluster and write ``scores.json`` and ``dropped.jsonl``.

    Args:
        settings: Checkpoint, recognizer, limits.
        shards: Folder of the spoken probes, with the field ``cluster``.
        num_clusters: K.
        folder: An existing folder.
        unspoken: Probes that the synthesizer could not speak (``key``, ``reason``, ``text``), for the list.

    Raises:
        UserError: If the filter is on without a recognizer, a limit is out of range, or no cluster is left.
    """
    check_score_settings(settings)
    probes = read_probes(shards)
    rates: dict[str, float] | None = None
    if settings.intelligibility:
        assert settings.recognizer is not None
        recognizer = Recognizer(settings.recognizer, where="score.recognizer")
        rates = character_error_rates(sorted(shards.glob("*.tar")), recognizer)
    losses = distillation_losses(settings, shards, folder)
    by_cluster: dict[int, list[Probe]] = defaultdict(list)
    for probe in probes:
        by_cluster[probe.cluster].append(probe)
    dropped: list[dict[str, object]] = [{"what": "text", **row} for row in unspoken]
    scores = [cluster_score(c, by_cluster[c], losses, rates, settings, dropped) for c in range(num_clusters)]
    kept = [entry for entry in scores if not entry.dropped]
    dropped += [
        {"what": "cluster", "cluster": entry.cluster, "reason": entry.dropped, "cer": entry.cer}
        for entry in scores
        if entry.dropped
    ]
    (folder / "dropped.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in dropped))
    if not kept:
        raise UserError(
            f"none of {num_clusters} clusters is left: {scores[0].dropped}",
            where=str(folder / "dropped.jsonl"),
            cure="check synthesizer and recognizer on a few texts, or raise score.max_cluster_cer",
        )
    for entry, value in zip(kept, shrink([e.raw for e in kept], [e.standard_error for e in kept]), strict=True):
        entry.misalignment = value
    (folder / "scores.json").write_text(json.dumps([asdict(entry) for entry in scores], indent=1))
    return scores


def check_score_settings(settings: ScoreSettings) -> None:
    """Refuse what would be found out only after hours of embedding.

    Raises:
        UserError: If the filter is on without a recognizer, a limit is out of range, or the checkpoint is missing or
            has decayed.
    """
    if settings.intelligibility and not settings.recognizer:
        raise UserError(
            "no recognizer is given, and unintelligible speech would have the highest misalignment of all",
            where="score.recognizer",
            cure="give any Hugging Face speech recognizer, or set `intelligibility: off` explicitly",
        )
    if settings.max_cluster_cer <= 0 or settings.max_text_cer <= 0:
        raise UserError("an error rate of 0 or less keeps nothing", where="score.max_cluster_cer, score.max_text_cer")
    if not (Path(settings.checkpoint).is_file() or is_checkpoint_folder(settings.checkpoint)):
        cure = "give the pre_decay.ckpt of a Stage-I run: the file, or the folder of a sharded run"
        raise UserError("no such checkpoint", where=f"score.checkpoint: {settings.checkpoint}", cure=cure)
    InterleaveDocuments(text_words=settings.text_words, speech_words=settings.speech_words)
    if not settings.allow_decayed:
        check_not_decayed(load_checkpoint(settings.checkpoint, weights_only=True, outline=True), settings.checkpoint)


def read_probes(shards: Path) -> list[Probe]:
    """What was spoken, from its shards."""
    probes = []
    for path in sorted(shards.glob("*.tar")):
        for raw in read_shard(path):
            sample = decode(raw, source="", sample_rate_hz=0)
            fields = sample.fields
            probes.append(Probe(sample.key, int(fields["cluster"]), sample.text, float(fields["seconds"])))
    return probes


def cluster_score(
    cluster: int,
    probes: Sequence[Probe],
    losses: Mapping[str, TextLoss],
    rates: Mapping[str, float] | None,
    settings: ScoreSettings,
    dropped: list[dict[str, object]],
) -> ClusterScore:
    """One cluster, not yet shrunk.

    Args:
        cluster: Its number.
        probes: Its spoken texts.
        losses: Loss by key.
        rates: Character error rate by key, or None where the filter is off.
        settings: Limits.
        dropped: Texts that do not count are appended.
    """
    entry = ClusterScore(cluster)
    if not probes:
        entry.dropped = "no text of it could be spoken"
        return entry
    entry.chars_per_second = sum(len(probe.text) for probe in probes) / sum(probe.seconds for probe in probes)
    if rates is not None:
        # One text of noise must not outweigh many that are understood, so a rate counts as 1 at most.
        entry.cer = fmean(min(rates[probe.key], 1.0) for probe in probes)
    counted = []
    for probe in probes:
        loss = losses.get(probe.key, TextLoss(0.0, 0))
        reason = "" if loss.num_tokens else "too short to be heard and predicted"
        if rates is not None and rates[probe.key] > settings.max_text_cer:
            reason = f"character error rate {rates[probe.key]:.2f}"
        if reason:
            row = {"what": "text", "cluster": cluster, "key": probe.key, "reason": reason, "text": probe.text[:200]}
            dropped.append(row)
        else:
            counted.append(loss)
    entry.num_texts = len(counted)
    if entry.cer is not None and entry.cer > settings.max_cluster_cer:
        entry.dropped = f"character error rate {entry.cer:.2f}"
    elif not counted:
        entry.dropped = "no probe of it can be scored"
    if counted:
        entry.raw, entry.standard_error = mean_and_error(counted)
    return entry


def mean_and_error(losses: Sequence[TextLoss]) -> tuple[float, float]:
    """Mean per token over texts, and its standard error from text to text (a ratio estimator, linearised).

    Tokens of one text are not independent, texts are; so the error is counted over texts (W. Cochran, "Sampling
    Techniques", 1977, section 2.11). Infinite for a single text.
    """
    total = sum(loss.num_tokens for loss in losses)
    mean = sum(loss.kl_sum for loss in losses) / total
    count = len(losses)
    if count < 2:
        return mean, math.inf
    squares = sum((loss.kl_sum - mean * loss.num_tokens) ** 2 for loss in losses)
    return mean, math.sqrt(count / (count - 1) * squares) / total


def shrink(means: Sequence[float], errors: Sequence[float]) -> list[float]:
    """M(c), as in this module's formula.

    Args:
        means: Raw m_c.
        errors: Their standard errors s_c; infinite ones give the overall mean.
    """
    known = [(mean, error**2) for mean, error in zip(means, errors, strict=True) if math.isfinite(error)]
    if len(known) < 2:  # nothing to tell between-cluster differences from
        return [fmean(means)] * len(means)
    between = max(0.0, variance(mean for mean, _ in known) - fmean(square for _, square in known))
    if between == 0 and min(square for _, square in known) == 0:
        return [fmean(mean for mean, _ in known)] * len(means)
    weights = [1 / (between + square) for _, square in known]
    centre = sum(w * mean for w, (mean, _) in zip(weights, known, strict=True)) / sum(weights)
    return [
        centre + between / (between + error**2) * (mean - centre) for mean, error in zip(means, errors, strict=True)
    ]
