"""The selection from text to manifest: embed → cluster → probe → score → draw, each step done once for its inputs."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from salad_lightning.corpus.speaking import check_voices
from salad_lightning.corpus.synthesize import synthesize
from salad_lightning.errors import UserError
from salad_lightning.evaluation.fingerprint import fingerprint
from salad_lightning.selection.cluster import balanced_kmeans
from salad_lightning.selection.corpus import TextCorpus, corpus_files, read_corpus
from salad_lightning.selection.draw import budget_seconds, check_draw_settings, draw
from salad_lightning.selection.embed import embed
from salad_lightning.selection.report import write_report
from salad_lightning.selection.score import ClusterScore, check_score_settings, score
from salad_lightning.selection.settings import ClusterSettings, ProbeSettings, SelectionSettings
from salad_lightning.selection.steps import run_step
from salad_lightning.selection.vectors import Vectors

__all__ = ["cluster", "probe", "select"]

# What is done faster or elsewhere is not done differently.
_INDIFFERENT = ("accelerator", "devices", "workers", "batch_size")
_RESULTS = ("manifest.jsonl", "selection.json", "report.md", "report.png")


def select(settings: SelectionSettings) -> Path:
    """Run what has not been run from the same inputs.

    Args:
        settings: Of all steps.

    Returns:
        The manifest, ``{output}/manifest.jsonl``; beside it are ``selection.json`` and the report.

    Raises:
        UserError: For anything wrong with settings or inputs; settings are checked before the first step.
    """
    check_draw_settings(settings.draw)
    check_score_settings(settings.score)
    budget = budget_seconds(settings.draw)
    if settings.probe.texts_per_cluster < 1:
        raise UserError(
            "a cluster needs a text to be scored by", where="probe.texts_per_cluster", cure="give 1 or more"
        )
    for key, count in (("cluster.num_clusters", settings.cluster.num_clusters), ("embed.dim", settings.embed.dim)):
        if count < 1:
            raise UserError(f"{count} is too small", where=key, cure="give 1 or more")
    if settings.draw.max_share * settings.cluster.num_clusters < 1:
        what = f"{settings.cluster.num_clusters} clusters of at most {settings.draw.max_share:g} each do not make 1"
        raise UserError(what, where="draw.max_share", cure="give more, or more clusters")
    check_voices(settings.probe.synthesizer, settings.probe.voices)
    steps = Path(settings.steps or settings.output)

    made_of = {"files": fingerprint(corpus_files(settings.texts.paths)), **_stated(settings.texts)}
    made_of.pop("paths")
    texts = run_step(steps, "texts", made_of, lambda folder: read_corpus(settings.texts, folder))
    corpus = TextCorpus(texts)

    inputs = {"after": texts.name, "model": fingerprint([settings.embed.encoder]), **_stated(settings.embed)}
    embedded = run_step(steps, "embed", inputs, lambda folder: embed(corpus, settings.embed, folder))

    inputs = {"after": embedded.name, **_stated(settings.cluster)}
    vectors = Vectors(embedded / "embeddings.npy")
    clustered = run_step(steps, "cluster", inputs, lambda folder: cluster(vectors, settings.cluster, folder))
    labels: NDArray[np.int32] = np.load(clustered / "labels.npy")

    inputs = {"after": clustered.name, **_stated(settings.probe)}
    probed = run_step(steps, "probe", inputs, lambda folder: probe(corpus, labels, settings.probe, folder))

    models = [settings.score.checkpoint, *([settings.score.recognizer] if settings.score.recognizer else [])]
    inputs = {"after": probed.name, "models": fingerprint(models), **_stated(settings.score)}
    scored = run_step(
        steps,
        "score",
        inputs,
        lambda folder: score(
            settings.score, probed / "shards", settings.cluster.num_clusters, folder, unspoken=_unspoken(probed)
        ),
    )
    scores = [ClusterScore(**entry) for entry in json.loads((scored / "scores.json").read_text())]

    inputs = {"after": scored.name, "budget": budget, **_stated(settings.draw)}

    def choose(folder: Path) -> None:
        shares = draw(corpus, labels, scores, settings.draw, folder)
        write_report(corpus, labels, scores, shares, folder)

    drawn = run_step(steps, "draw", inputs, choose)
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    for name in _RESULTS:  # at a place that the next command can name
        aside = output / f".{name}.part"
        shutil.copyfile(drawn / name, aside)
        os.replace(aside, output / name)
    return output / "manifest.jsonl"


def cluster(vectors: Vectors, settings: ClusterSettings, folder: Path) -> NDArray[np.int32]:
    """Write ``labels.npy``, ``centres.npy`` and ``cluster.json`` (inertia, sizes).

    Args:
        vectors: N embeddings.
        settings: K, slack, rounds, seed.
        folder: An existing folder.

    Returns:
        ``[N]`` clusters.
    """
    found = balanced_kmeans(
        vectors, settings.num_clusters, slack=settings.slack, rounds=settings.rounds, seed=settings.seed
    )
    np.save(folder / "labels.npy", found.labels_N)
    np.save(folder / "centres.npy", found.centres_KD)
    sizes = np.bincount(found.labels_N, minlength=settings.num_clusters)
    figures = {
        "inertia": found.inertia,
        "unbalanced_inertia": found.unbalanced_inertia,
        "smallest": int(sizes.min()),
        "largest": int(sizes.max()),
    }
    (folder / "cluster.json").write_text(json.dumps(figures, indent=1))
    return found.labels_N


def probe(corpus: TextCorpus, labels_N: NDArray[np.int32], settings: ProbeSettings, folder: Path) -> dict[str, Any]:
    """Draw texts of each cluster and speak them into ``shards``; goes on where it was killed.

    Args:
        corpus: N texts.
        labels_N: Their clusters.
        settings: How many, and who speaks.
        folder: An existing folder.

    Returns:
        The content of the shards' ``index.json``.
    """
    rng = np.random.default_rng(settings.seed)
    path = folder / "manifest.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(int(labels_N.max()) + 1):
            members = np.flatnonzero(labels_N == number)
            chosen = rng.choice(members, min(settings.texts_per_cluster, len(members)), replace=False)
            for index in np.sort(chosen).tolist():
                row = {"key": f"c{number:04d}-{index:09d}", "cluster": number, "text": corpus[index]["text"]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    index = folder / "shards" / "index.json"
    if index.is_file():  # killed right after the last shard
        done: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        return done
    return synthesize(
        path,
        folder / "shards",
        synthesizer=settings.synthesizer,
        voices=settings.voices,
        seed=settings.seed,
        workers=settings.workers,
        source="probe",
        samples_per_shard=256,
        max_bad_fraction=1.0,  # a cluster that cannot be spoken is dropped, and listed
    )


def _unspoken(probed: Path) -> list[dict[str, object]]:
    path = probed / "shards" / "failed.jsonl"
    return [json.loads(line) for line in path.open(encoding="utf-8")] if path.exists() else []


def _stated(settings: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings).items() if name not in _INDIFFERENT}
