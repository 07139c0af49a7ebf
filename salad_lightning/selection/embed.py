"""Sentence embeddings of a corpus, straight into a memory-mapped file; a killed run goes on after its last batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Normalizer
from tqdm import tqdm  # type: ignore[import-untyped]

from salad_lightning.selection.corpus import TextCorpus
from salad_lightning.selection.settings import EmbedSettings
from salad_lightning.selection.transformer_embedding import embed_with_transformer, embedding_dim
from salad_lightning.selection.vectors import Vectors

__all__ = ["embed"]

_SAMPLE = 50_000
_BLOCK = 4096


def embed(corpus: TextCorpus, settings: EmbedSettings, folder: Path) -> Vectors:
    """Write ``embeddings.npy``, float32 ``[N, D]``, each row of length 1 (or 0, for a text without a word).

    Args:
        corpus: N texts.
        settings: Which encoder, and how.
        folder: An existing folder; ``done.npy`` in it remembers finished rows.

    Raises:
        UserError: If the encoder cannot be loaded.
    """
    tfidf = settings.encoder == "tfidf"
    # The SVD has no more directions than its sample has texts.
    dim = min(settings.dim, max(len(corpus) - 1, 1)) if tfidf else embedding_dim(settings.encoder)
    path, done_path = folder / "embeddings.npy", folder / "done.npy"
    if not done_path.exists():  # written after the embeddings' own file
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(corpus), dim)).flush()
        np.save(done_path, np.zeros(len(corpus), dtype=bool))
    if tfidf:
        _embed_with_tfidf(corpus, dim, settings.seed, path, done_path)
    else:
        rows = np.flatnonzero(~np.load(done_path))
        if len(rows):
            embed_with_transformer(corpus, rows, settings, path, done_path)
    return Vectors(path)


def _embed_with_tfidf(corpus: TextCorpus, dim: int, seed: int, path: Path, done_path: Path) -> None:
    """Hashed words, so that the vocabulary needs no memory; weights and directions from a sample."""
    rng = np.random.default_rng(seed)
    sample: NDArray[np.int64] = np.sort(rng.choice(len(corpus), min(_SAMPLE, len(corpus)), replace=False))
    pipeline = Pipeline(
        [
            ("words", HashingVectorizer(n_features=1 << 18, alternate_sign=False, norm=None)),
            ("weights", TfidfTransformer(sublinear_tf=True)),
            ("directions", TruncatedSVD(dim, random_state=seed)),
            ("length", Normalizer(copy=False)),
        ]
    )
    pipeline.fit([corpus[int(index)]["text"] for index in sample])
    for start in tqdm(range(0, len(corpus), _BLOCK), desc="embed", unit=" blocks"):
        done = np.load(done_path, mmap_mode="r+")
        stop = min(start + _BLOCK, len(corpus))
        if not done[start:stop].all():
            np.load(path, mmap_mode="r+")[start:stop] = pipeline.transform(corpus.texts(start, stop))
            done[start:stop] = True
