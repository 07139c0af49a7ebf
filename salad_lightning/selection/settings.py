"""Everything ``salad-lightning select`` can be told; one dataclass a step. Standard library only, for ``--help``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "ClusterSettings",
    "DrawSettings",
    "EmbedSettings",
    "ProbeSettings",
    "ScoreSettings",
    "SelectionSettings",
    "TextSettings",
]


@dataclass
class TextSettings:
    """The text that may be chosen from (D_web of the paper).

    Attributes:
        paths: ``.jsonl``, ``.tsv``, ``.parquet`` or ``.tar`` files, or folders of text shards.
        column: Column of the text.
        max_chars: Longer texts are skipped and listed: a page of speech is no utterance.
    """

    paths: list[str]
    column: str = "text"
    max_chars: int = 5000


@dataclass
class EmbedSettings:
    """One vector a text.

    Attributes:
        encoder: ``tfidf``, or a Hugging Face or sentence-transformers encoder: folder or hub name.
        dim: Width of the TF-IDF vectors after the SVD.
        pooling: ``cls`` or ``mean``; by default what the encoder's ``1_Pooling`` says, else ``mean``.
        max_tokens: Longer texts are cut.
        batch_size: Texts a forward pass, on each device.
        accelerator: Lightning's.
        devices: Lightning's; several share the texts.
        precision: Lightning's.
        seed: Of the sample that the SVD is fitted on.
    """

    encoder: str = "tfidf"
    dim: int = 128
    pooling: str | None = None
    max_tokens: int = 512
    batch_size: int = 64
    accelerator: str = "auto"
    devices: int | str = 1
    precision: str = "32-true"
    seed: int = 0


@dataclass
class ClusterSettings:
    """Balanced k-means.

    Attributes:
        num_clusters: K; 128 in the paper.
        slack: How far a size may be from N / K, as a share of it.
        rounds: Balanced assignments, each followed by new centres.
        seed: Of the first centres.
    """

    num_clusters: int = 128
    slack: float = 0.08
    rounds: int = 3
    seed: int = 0


@dataclass
class ProbeSettings:
    """A few texts of each cluster, spoken.

    Attributes:
        texts_per_cluster: How many.
        synthesizer: Name of an installed synthesizer; use the one that will speak what is chosen.
        voices: Its arguments, one mapping a voice.
        workers: Processes.
        seed: Of texts and voices.
    """

    texts_per_cluster: int = 48
    synthesizer: str = "EspeakSynthesizer"
    voices: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    workers: int = 1
    seed: int = 0


@dataclass
class ScoreSettings:
    """Misalignment of each cluster, and whether its speech is intelligible at all.

    Attributes:
        checkpoint: Of Stage I, before its learning rate decayed; a file, or the folder of a sharded run.
        recognizer: Folder or hub name of any speech recognizer that Hugging Face's pipeline runs; it transcribes the
            probes. It must not be the model that is scored.
        intelligibility: Whether clusters and texts that the recognizer gets wrong are dropped. Broken speech has the
            highest misalignment of all, so without this it is what gets chosen.
        max_cluster_cer: Clusters above this mean character error rate are dropped.
        max_text_cer: Probe texts above this character error rate are dropped.
        text_words: Fewest and most words of a text span, as in Stage I.
        speech_words: Fewest and most words of a speech span, as in Stage I.
        allow_decayed: Take a checkpoint whose learning rate has decayed.
        rows_per_batch: Rows of ``context`` positions in a batch.
        accelerator: Lightning's.
        precision: Lightning's.
        seed: Of the spans.
    """

    checkpoint: str
    recognizer: str | None = None
    intelligibility: bool = True
    max_cluster_cer: float = 0.15
    max_text_cer: float = 0.5
    text_words: tuple[int, int] = (10, 30)
    speech_words: tuple[int, int] = (5, 15)
    allow_decayed: bool = False
    rows_per_batch: int = 4
    accelerator: str = "auto"
    precision: str = "32-true"
    seed: int = 0


@dataclass
class DrawSettings:
    """How much is chosen, and how sharply.

    Attributes:
        gamma: Exponent of the misalignment; 0 is uniform sampling, 5 the paper's.
        max_share: No cluster gets more than this share of the texts.
        seconds: Budget in seconds of speech. Give this, or ``share`` and ``natural``.
        share: Budget as a share of the natural speech; 0.01 in the paper.
        natural: Folders of the natural speech's shards, whose ``index.json`` tells their seconds.
        seed: Of the draw.
    """

    gamma: float = 5.0
    max_share: float = 0.1
    seconds: float | None = None
    share: float | None = None
    natural: list[str] = field(default_factory=list)
    seed: int = 0


@dataclass
class SelectionSettings:
    """The whole selection.

    Attributes:
        texts: What may be chosen from.
        score: Model and recognizer.
        draw: Budget and sharpness.
        embed: Sentence embeddings.
        cluster: Balanced k-means.
        probe: Speech of a few texts a cluster.
        output: Folder for the manifest and its report.
        steps: Folder for the results of the steps, which selections that differ in their draw share; by default
            ``output``. One selection at a time.
    """

    texts: TextSettings
    score: ScoreSettings
    draw: DrawSettings
    embed: EmbedSettings = field(default_factory=EmbedSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    output: str = "outputs/selection"
    steps: str | None = None
