"""P_target as written down in float64, and the draw that follows it."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from salad_lightning.errors import UserError
from salad_lightning.selection.corpus import read_corpus
from salad_lightning.selection.draw import budget_seconds, draw, target_shares
from salad_lightning.selection.score import ClusterScore
from salad_lightning.selection.settings import DrawSettings, TextSettings

WEB = np.array([0.1, 0.2, 0.3, 0.4])
M = np.array([2.0, 1.0, 0.5, 1.5])


@pytest.mark.parametrize("gamma", [0, 1, 2, 5])
def test_the_formula(gamma):
    expected = WEB * M**gamma
    np.testing.assert_allclose(target_shares(WEB, M, gamma, 1.0), expected / expected.sum(), rtol=1e-12)


def test_no_share_above_the_limit_and_the_rest_in_proportion():
    shares = target_shares(WEB, M, 5, 0.4)
    free = WEB * M**5
    assert shares.max() == pytest.approx(0.4)
    assert shares.sum() == pytest.approx(1)
    capped = shares == shares.max()
    assert capped.tolist() == [True, False, False, True]
    assert shares[1] / shares[2] == pytest.approx(free[1] / free[2])


def test_a_limit_that_others_reach_in_turn():
    """What is cut off the first pushes the second over the limit."""
    shares = target_shares(np.full(4, 0.25), np.array([8.0, 4.0, 1.0, 1.0]), 1, 0.35)
    np.testing.assert_allclose(shares, [0.35, 0.35, 0.15, 0.15])


def test_a_cluster_that_cannot_be_chosen_gets_nothing():
    shares = target_shares(np.array([0.5, 0.0, 0.5]), np.array([1.0, 100.0, 1.0]), 5, 1.0)
    np.testing.assert_allclose(shares, [0.5, 0, 0.5])


@pytest.mark.parametrize("gamma", [2000, 5000])
def test_exponents_that_overflow_and_underflow(gamma):
    """What the largest may not have goes to the next, though M^γ of both is beyond float64."""
    np.testing.assert_allclose(target_shares(WEB, M * 1e3, gamma, 0.6), [0.6, 0, 0, 0.4], atol=1e-12)
    np.testing.assert_allclose(target_shares(WEB, M * 1e-9, gamma, 0.6), [0.6, 0, 0, 0.4], atol=1e-12)


@pytest.fixture
def pool(tmp_path):
    """400 texts of 10 characters, a quarter in each cluster."""
    rows = [{"text": f"text {i:05d}", "topic": i % 4} for i in range(400)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts").mkdir()
    corpus = read_corpus(TextSettings([str(tmp_path / "pool.jsonl")]), tmp_path / "texts")
    return corpus, np.arange(400, dtype=np.int32) % 4


def scores(misalignment=(2.0, 1.0, 0.5, 1.5)):
    """Ten characters a second: a text takes one."""
    return [ClusterScore(c, 8, m, 0.1, m, 0.0, 10.0) for c, m in enumerate(misalignment)]


def drawn(pool, folder, settings, entries=None):
    folder.mkdir()
    shares = draw(*pool, entries or scores(), settings, folder)
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()], shares


def test_clusters_come_as_often_as_their_share_says(pool, tmp_path):
    counts = np.zeros(4)
    for seed in range(40):
        rows, shares = drawn(pool, tmp_path / str(seed), DrawSettings(1, 1.0, seconds=60, seed=seed))
        assert len(rows) == 60
        counts += [Counter(row["cluster"] for row in rows)[c] for c in range(4)]
    expected = np.array([0.4, 0.2, 0.1, 0.3])
    np.testing.assert_allclose([shares[c].target for c in range(4)], expected)
    error = np.sqrt(expected * (1 - expected) / counts.sum())
    assert (np.abs(counts / counts.sum() - expected) < 4 * error).all()


def test_texts_of_a_cluster_are_drawn_uniformly(pool, tmp_path):
    often = Counter()
    for seed in range(60):
        rows, _ = drawn(pool, tmp_path / str(seed), DrawSettings(0, 1.0, seconds=100, seed=seed))
        often.update(row["text"] for row in rows)
    counts = np.array([often[f"text {i:05d}"] for i in range(400)])
    assert counts.sum() == 6000
    # Binomial: 60 draws of probability 1/4 each, so 15 ± 3.4.
    assert counts.min() > 2
    assert counts.max() < 29
    assert counts.std() == pytest.approx(3.35, rel=0.2)


def test_a_cluster_that_is_used_up_leaves_its_share_to_the_others(pool, tmp_path):
    rows, shares = drawn(pool, tmp_path / "a", DrawSettings(5, 1.0, seconds=300))
    assert len({row["text"] for row in rows}) == 300
    assert shares[0].texts == 100
    assert sum(share.texts for share in shares.values()) == 300


def test_everything_and_more_than_everything(pool, tmp_path):
    rows, _ = drawn(pool, tmp_path / "all", DrawSettings(5, 1.0, seconds=400))
    assert len({row["text"] for row in rows}) == 400
    with pytest.raises(UserError, match="the budget is 401 s of speech, and all that can be chosen is about 400 s"):
        drawn(pool, tmp_path / "more", DrawSettings(5, 1.0, seconds=401))


def test_the_seed_decides(pool, tmp_path):
    chosen = [
        [row["key"] for row in drawn(pool, tmp_path / name, DrawSettings(1, 1.0, seconds=50, seed=seed))[0]]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert chosen[0] == chosen[1] != chosen[2]


def test_the_manifest(pool, tmp_path):
    rows, shares = drawn(pool, tmp_path / "a", DrawSettings(1, 1.0, seconds=20))
    for row in rows:
        assert row["topic"] == row["cluster"]
        assert row["misalignment"] == M[row["cluster"]]
        assert row["probability"] == pytest.approx(shares[row["cluster"]].target / 100)
        assert row["estimated_seconds"] == 1.0
        assert "." not in row["key"]
    stated = json.loads((tmp_path / "a" / "selection.json").read_text())
    assert set(stated["0"]) == {"web", "misalignment", "target", "texts", "seconds"}


def test_dropped_clusters_are_not_drawn(pool, tmp_path):
    entries = scores()
    entries[0] = ClusterScore(0, dropped="character error rate 0.90")
    rows, shares = drawn(pool, tmp_path / "a", DrawSettings(5, 1.0, seconds=100), entries)
    assert {row["cluster"] for row in rows} <= {1, 2, 3}
    assert shares[0].target == 0
    assert shares[0].misalignment is None


def test_the_budget_is_a_share_of_what_the_indexes_say(tmp_path):
    for name, seconds in (("a", 30.0), ("b", 70.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").write_text(json.dumps({"seconds": seconds}))
    settings = DrawSettings(share=0.1, natural=[str(tmp_path / "a"), str(tmp_path / "b")])
    assert budget_seconds(settings) == pytest.approx(10.0)
    (tmp_path / "b" / "index.json").write_text(json.dumps({"num_samples": 3}))
    with pytest.raises(UserError, match="does not tell seconds"):
        budget_seconds(settings)
    (tmp_path / "b" / "index.json").unlink()
    with pytest.raises(UserError, match=r"there is no index\.json"):
        budget_seconds(settings)
