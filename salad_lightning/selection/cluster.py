"""Balanced k-means, out of core: clusters of nearly equal size at nearly the inertia of plain k-means.

First centres come from scikit-learn's k-means on a sample. Then every point has the choice among its nearest centres,
each centre has a price, and points go where squared distance plus price is least. Prices are the dual variables of the
transport problem that asks for equal sizes; they are found by Sinkhorn's iteration with falling temperature (Cuturi,
"Sinkhorn distances", NeurIPS 2013, https://arxiv.org/abs/1306.0895). What is left above or below the allowed sizes is
moved between neighbouring clusters, the points first that lose least. Time and disk reads are linear in the points;
memory is a hundred bytes a point beside a sample of fixed size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from tqdm import tqdm  # type: ignore[import-untyped]

from salad_lightning.errors import UserError
from salad_lightning.selection.vectors import Vectors

__all__ = ["Clustering", "balanced_kmeans"]

_SAMPLE_PER_CLUSTER = 256  # more changes the centres of k-means little (the default of faiss)
_CANDIDATES = 16
_TEMPERATURES, _SWEEPS = 12, 3
_CHUNK = 1 << 18


class Clustering(NamedTuple):
    """What came of it.

    Attributes:
        labels_N: Cluster of every point, int32.
        centres_KD: Means of the clusters.
        inertia: Sum of squared distances to the own centre.
        unbalanced_inertia: The same for plain k-means, from which the balancing began.
    """

    labels_N: NDArray[np.int32]
    centres_KD: NDArray[np.float32]
    inertia: float
    unbalanced_inertia: float


def balanced_kmeans(
    vectors: Vectors, num_clusters: int, *, slack: float = 0.08, rounds: int = 3, seed: int = 0
) -> Clustering:
    """Cluster into sizes between ``floor(N / K · (1 − slack))`` and ``ceil(N / K · (1 + slack))``.

    Args:
        vectors: N points.
        num_clusters: K.
        slack: Allowed deviation from N / K, 0 to 1.
        rounds: Balanced assignments, each followed by new centres.
        seed: Of the sample and the first centres.

    Raises:
        UserError: If there are fewer points than clusters, or a setting is out of range.
    """
    if num_clusters < 1 or rounds < 1 or not 0 <= slack <= 1:
        raise UserError(
            f"num_clusters {num_clusters}, rounds {rounds}, slack {slack}",
            where="cluster",
            cure="give num_clusters and rounds of 1 or more, and slack between 0 and 1",
        )
    if len(vectors) < num_clusters:
        raise UserError(
            f"{len(vectors)} texts cannot make {num_clusters} clusters",
            where="cluster.num_clusters",
            cure=f"give {len(vectors)} or fewer, or more text",
        )
    centres = _first_centres(vectors, num_clusters, seed)
    centres, unbalanced = _lloyd(vectors, centres)
    prices = np.zeros(num_clusters)
    mean_size = len(vectors) / num_clusters
    lower, upper = math.floor(mean_size * (1 - slack)), math.ceil(mean_size * (1 + slack))
    for _ in tqdm(range(rounds), desc="balance", unit=" rounds"):
        nearest, distances = _nearest(vectors, centres)
        prices = _balancing_prices(nearest, distances, prices)
        labels = _cheapest(nearest, distances, prices)
        del nearest, distances
        _level(vectors, centres, labels, lower, upper)
        centres = _means(vectors, labels, centres)
    return Clustering(labels, centres, _inertia(vectors, labels, centres), unbalanced)


def _first_centres(vectors: Vectors, num_clusters: int, seed: int) -> NDArray[np.float32]:
    size = min(len(vectors), max(_SAMPLE_PER_CLUSTER * num_clusters, 1 << 14))
    chosen = np.sort(np.random.default_rng(seed).choice(len(vectors), size, replace=False))
    kmeans = KMeans(num_clusters, n_init=2, max_iter=50, random_state=seed, copy_x=False).fit(vectors.rows(chosen))
    centres: NDArray[np.float32] = kmeans.cluster_centers_.astype(np.float32)
    return centres


def _lloyd(vectors: Vectors, centres: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """One step of plain k-means over all points: new centres, and the inertia with them."""
    labels = np.empty(len(vectors), dtype=np.int32)
    for place, block in vectors.blocks():
        labels[place] = _squared_distances(block, centres).argmin(1)
    centres = _means(vectors, labels, centres)
    return centres, _inertia(vectors, labels, centres)


def _squared_distances(points: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.float32]:
    """``[n, K]``."""
    cross = points @ centres.T
    squares = np.einsum("nd,nd->n", points, points)[:, None] + np.einsum("kd,kd->k", centres, centres)
    distances: NDArray[np.float32] = np.maximum(squares - 2 * cross, 0)
    return distances


def _nearest(vectors: Vectors, centres: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The nearest centres of every point, unsorted, and squared distances to them, ``[N, T]`` each."""
    count = min(_CANDIDATES, len(centres))
    nearest = np.empty((len(vectors), count), dtype=np.int32)
    distances = np.empty((len(vectors), count), dtype=np.float32)
    for place, block in vectors.blocks():
        all_distances = _squared_distances(block, centres)
        chosen = np.argpartition(all_distances, count - 1, axis=1)[:, :count]
        nearest[place], distances[place] = chosen, np.take_along_axis(all_distances, chosen, 1)
    return nearest, distances


def _balancing_prices(
    nearest: NDArray[np.int32], distances: NDArray[np.float32], prices: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Prices at which equally many points choose each centre."""
    num_clusters = len(prices)
    target = len(nearest) / num_clusters
    spread = float((distances.mean(1) - distances.min(1)).mean())
    if spread <= 0:  # one cluster, or points that are all the same
        return prices
    for temperature in np.geomspace(spread / 2, spread / 100, _TEMPERATURES):
        for _ in range(_SWEEPS):
            sizes = np.zeros(num_clusters)
            for start in range(0, len(nearest), _CHUNK):
                who = nearest[start : start + _CHUNK]
                cost = distances[start : start + _CHUNK] + prices[who].astype(np.float32)
                share = np.exp((cost.min(1, keepdims=True) - cost) / np.float32(temperature))
                share /= share.sum(1, keepdims=True)
                sizes += np.bincount(who.ravel(), share.ravel(), num_clusters)
            # A centre that nobody wants becomes cheaper by some steps, not by infinity.
            prices = prices + temperature * np.log(np.maximum(sizes / target, 1e-2))
    return prices


def _cheapest(
    nearest: NDArray[np.int32], distances: NDArray[np.float32], prices: NDArray[np.float64]
) -> NDArray[np.int32]:
    labels = np.empty(len(nearest), dtype=np.int32)
    for start in range(0, len(nearest), _CHUNK):
        who = nearest[start : start + _CHUNK]
        best = (distances[start : start + _CHUNK] + prices[who]).argmin(1)
        labels[start : start + _CHUNK] = np.take_along_axis(who, best[:, None], 1)[:, 0]
    return labels


def _level(vectors: Vectors, centres: NDArray[np.float32], labels: NDArray[np.int32], lower: int, upper: int) -> None:
    """Move points, in place, until all sizes are in ``[lower, upper]``."""
    sizes = np.bincount(labels, minlength=len(centres))
    apart = _squared_distances(centres, centres)
    while True:
        if sizes.max() > upper:
            source = int(sizes.argmax())
            target = _first_where(sizes < upper, apart[source])
            count = min(sizes[source] - upper, upper - sizes[target])
        elif sizes.min() < lower:
            target = int(sizes.argmin())
            source = _first_where(sizes > lower, apart[target])
            count = min(lower - sizes[target], sizes[source] - lower)
        else:
            return
        members = np.flatnonzero(labels == source)
        cost = _squared_distances(vectors.rows(members), centres[[source, target]])
        moved = members[np.argpartition(cost[:, 1] - cost[:, 0], count - 1)[:count]]
        labels[moved] = target
        sizes[source] -= count
        sizes[target] += count


def _first_where(allowed: NDArray[np.bool_], distance: NDArray[np.float32]) -> int:
    return int(np.where(allowed, distance, np.inf).argmin())


def _means(vectors: Vectors, labels: NDArray[np.int32], centres: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means of the clusters; an empty one keeps its centre."""
    sums = np.zeros(centres.shape, dtype=np.float64)
    for place, block in vectors.blocks():
        order = np.argsort(labels[place], kind="stable")
        present, first = np.unique(labels[place][order], return_index=True)
        sums[present] += np.add.reduceat(block[order], first, axis=0)
    sizes = np.bincount(labels, minlength=len(centres))[:, None]
    means: NDArray[np.float32] = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres).astype(np.float32)
    return means


def _inertia(vectors: Vectors, labels: NDArray[np.int32], centres: NDArray[np.float32]) -> float:
    total = 0.0
    for place, block in vectors.blocks():
        difference = block - centres[labels[place]]
        total += float(np.einsum("nd,nd->", difference, difference, dtype=np.float64))
    return total
