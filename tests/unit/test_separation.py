import math

import numpy as np
import pytest

from lbr_dist.evaluation.separation import _scores, auc, separation, uniformity


def plain(queries, passages, positives, hardest):
    """The definition, one pair at a time."""
    q = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    p = passages / np.linalg.norm(passages, axis=1, keepdims=True)
    mean = np.concatenate([q, p]).mean(0)
    q, p = q - mean, p - mean
    right, wrong = [], []
    for i, mine in enumerate(positives):
        cosines = [float(q[i] @ v / np.linalg.norm(q[i]) / np.linalg.norm(v)) for v in p]
        right += [cosines[j] for j in mine]
        wrong += sorted((c for j, c in enumerate(cosines) if j not in mine), reverse=True)[:hardest]
    return (np.mean(right) - np.mean(wrong)) / math.sqrt((np.var(right) + np.var(wrong)) / 2)


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    passages = rng.normal(size=(60, 16)).astype(np.float32) + 2.0  # a common offset that centring must remove
    positives = [[i, (i * 7 + 1) % 60] if i % 3 == 0 else [i] for i in range(40)]
    queries = passages[:40] + rng.normal(size=(40, 16)).astype(np.float32)
    return queries, passages, positives


@pytest.mark.parametrize("hardest", [1, 3, 10, 500])
def test_separation_is_its_definition(pairs, hardest):
    queries, passages, positives = pairs
    got = separation(queries, passages, positives, hardest=hardest)
    assert got["sr"] == pytest.approx(plain(queries.astype(np.float64), passages, positives, hardest), rel=1e-5)
    assert got["auc"] == auc(got["sr"])


def test_tiles_do_not_change_the_ratio(pairs, monkeypatch):
    whole = separation(*pairs)
    monkeypatch.setattr("lbr_dist.evaluation.separation.TILE", 7)
    tiled = separation(*pairs)
    assert tiled == pytest.approx(whole, rel=1e-5)


def test_auc_is_the_probability_that_a_right_score_beats_a_wrong_one():
    rng = np.random.default_rng(1)
    right, wrong = rng.normal(0.6, 0.2, 4000), rng.normal(0.4, 0.1, 4000)
    sr = (right.mean() - wrong.mean()) / math.sqrt((right.var() + wrong.var()) / 2)
    counted = (right[:, None] > wrong[None, :]).mean()
    assert auc(sr) == pytest.approx(counted, abs=0.01)
    assert auc(0.0) == 0.5


def test_alignment_and_uniformity_follow_wang_and_isola(pairs):
    queries, passages, positives = pairs
    q = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    p = passages / np.linalg.norm(passages, axis=1, keepdims=True)
    distances = [((q[i] - p[j]) ** 2).sum() for i, mine in enumerate(positives) for j in mine]
    everything = np.concatenate([q, p])
    potentials = [
        math.exp(-2 * ((a - b) ** 2).sum())
        for i, a in enumerate(everything)
        for j, b in enumerate(everything)
        if i != j
    ]
    got = separation(queries, passages, positives)
    assert got["alignment"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert got["uniformity"] == pytest.approx(math.log(np.mean(potentials)), rel=1e-4)


def test_uniformity_of_a_text_without_a_vector():
    """It is a zero vector, whose cosine is 0 with itself too: a row's pair with itself must not be counted by value."""
    points = np.zeros((3, 4), np.float32)
    points[0, 0] = points[1, 1] = 1
    assert uniformity(points) == pytest.approx(math.log(math.exp(-4)))


def test_a_query_among_the_passages_is_not_its_own_wrong_answer():
    rng = np.random.default_rng(3)
    queries = rng.normal(size=(6, 8)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    passages = np.concatenate([rng.normal(size=(20, 8)).astype(np.float32) / 9, queries[:1]])
    positives = [[row] for row in range(6)]
    assert _scores(queries, passages, positives, 3, {})[1].max() == pytest.approx(1)
    assert _scores(queries, passages, positives, 3, {0: 20})[1].max() < 0.9
    everything = separation(queries[:1], passages[[0, 20]], [[0]], 3, {0: 1})
    assert sorted(everything) == ["alignment", "uniformity"], "no wrong passage"


def test_uniformity_thins_large_sets_evenly(monkeypatch):
    points = np.random.default_rng(2).normal(size=(3000, 8)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    whole = uniformity(points)
    monkeypatch.setattr("lbr_dist.evaluation.separation.UNIFORMITY_POINTS", 1000)
    assert uniformity(points) == pytest.approx(whole, abs=0.02)


def test_collapsed_embeddings_separate_nothing():
    ones = np.ones((5, 4), dtype=np.float32)
    got = separation(ones, ones, [[i] for i in range(5)])
    assert got["sr"] == 0.0
    assert got["auc"] == 0.5


def test_without_a_wrong_passage_there_is_no_ratio(pairs):
    queries, passages, _ = pairs
    everything = separation(queries, passages[:3], [[0, 1, 2]] * len(queries))
    assert sorted(everything) == ["alignment", "uniformity"]
    assert sorted(separation(queries[:1], passages[:1], [[0]])) == ["alignment", "uniformity"]
    with pytest.raises(ValueError, match="at least one non-positive"):
        separation(*pairs, hardest=0)


def test_a_query_without_positives_is_refused(pairs):
    queries, passages, positives = pairs
    with pytest.raises(ValueError, match="at least one positive"):
        separation(queries, passages, [*positives[:-1], []])
