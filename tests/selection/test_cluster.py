"""Balanced k-means against scikit-learn's plain one, on blobs and on embeddings of generated text."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import normalize

from salad_lightning.demo.world import build_world
from salad_lightning.errors import UserError
from salad_lightning.selection import vectors as vectors_module
from salad_lightning.selection.cluster import balanced_kmeans
from salad_lightning.selection.vectors import Vectors


@pytest.fixture
def save(tmp_path):
    def to_file(points):
        np.save(tmp_path / "points.npy", points.astype(np.float32))
        return Vectors(tmp_path / "points.npy")

    return to_file


def check(points, found, num_clusters, *, bound=1.15):
    """Sizes within 10 % of equal; inertia as counted here, and within a bound of scikit-learn's best of three."""
    sizes = np.bincount(found.labels_N, minlength=num_clusters) * num_clusters / len(points)
    assert sizes.min() >= 0.9
    assert sizes.max() <= 1.1
    means = np.stack([points[found.labels_N == cluster].mean(0) for cluster in range(num_clusters)])
    np.testing.assert_allclose(found.centres_KD, means, atol=1e-4)
    inertia = ((points - means[found.labels_N]) ** 2).sum()
    assert found.inertia == pytest.approx(inertia, rel=1e-4)
    plain = KMeans(num_clusters, n_init=3, random_state=1).fit(points).inertia_
    assert inertia <= bound * plain


@pytest.mark.parametrize("num_clusters", [12, 36])
def test_blobs(save, num_clusters):
    points, blobs = make_blobs(4000, 16, centers=12, random_state=0)
    found = balanced_kmeans(save(points), num_clusters)
    check(points, found, num_clusters)
    if num_clusters == 12:  # equal blobs are already balanced: nothing may be moved
        assert adjusted_rand_score(blobs, found.labels_N) == 1.0


def test_blobs_of_unequal_size(save):
    points, _ = make_blobs([800, 400, 200, 200] * 3, 8, random_state=0)
    check(points, balanced_kmeans(save(points), 24), 24)


def texts(kind):
    world = build_world(0)
    shares = {domain.name: 1.0 + position for position, domain in enumerate(world.domains)}
    return [text for _, text in world.documents(4000, seed=1, shares=shares if kind == "skewed" else None)]


@pytest.mark.parametrize("kind", ["even", "skewed"])
@pytest.mark.parametrize("num_clusters", [10, 16])
def test_real_embeddings(save, kind, num_clusters):
    """TF-IDF and SVD of generated text, of topics equally and unequally frequent."""
    weights = TfidfVectorizer(sublinear_tf=True).fit_transform(texts(kind))
    points = normalize(TruncatedSVD(48, random_state=0).fit_transform(weights))
    check(points, balanced_kmeans(save(points), num_clusters), num_clusters)


def test_plain_k_means_is_far_from_balanced_there(save):
    """Otherwise the tests above would show nothing."""
    points = normalize(TruncatedSVD(48, random_state=0).fit_transform(TfidfVectorizer().fit_transform(texts("skewed"))))
    sizes = np.bincount(KMeans(16, n_init=3, random_state=1).fit(points).labels_) * 16 / len(points)
    assert sizes.max() > 1.5
    assert sizes.min() < 0.6


def test_read_in_small_blocks_it_is_the_same(save, monkeypatch):
    points, _ = make_blobs(1000, 8, centers=6, random_state=3)
    whole = balanced_kmeans(save(points), 6)
    monkeypatch.setattr(vectors_module, "_BLOCK_BYTES", 7 * 8 * 4)
    parts = balanced_kmeans(save(points), 6)
    assert (whole.labels_N == parts.labels_N).all()
    assert whole.inertia == pytest.approx(parts.inertia)


def test_points_that_are_all_the_same_are_shared_out(save):
    found = balanced_kmeans(save(np.ones((100, 4))), 10)
    sizes = np.bincount(found.labels_N, minlength=10)
    assert sizes.min() >= 9
    assert sizes.max() <= 11
    assert found.inertia == 0


def test_as_many_clusters_as_points_and_one_cluster(save):
    points = np.random.default_rng(0).standard_normal((7, 3))
    assert sorted(balanced_kmeans(save(points), 7, slack=0).labels_N) == list(range(7))
    assert set(balanced_kmeans(save(points), 1).labels_N) == {0}


def test_the_seed_decides(save):
    points = np.random.default_rng(0).standard_normal((500, 5))
    same = [balanced_kmeans(save(points), 8, seed=seed).labels_N.tolist() for seed in (0, 0, 1)]
    assert same[0] == same[1] != same[2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_clusters": 8}, "7 texts cannot make 8 clusters"),
        ({"num_clusters": 0}, "num_clusters 0"),
        ({"num_clusters": 2, "slack": 1.5}, "slack 1.5"),
        ({"num_clusters": 2, "rounds": 0}, "rounds 0"),
    ],
)
def test_what_cannot_be_clustered(save, settings, words):
    with pytest.raises(UserError, match=words):
        balanced_kmeans(save(np.zeros((7, 3))), **settings)
