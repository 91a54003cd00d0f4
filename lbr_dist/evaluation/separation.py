"""How well a frozen model tells right answers from the most tempting wrong ones, with no training and no threshold.

The paper announces a separation ratio and never defines it; the one here is lbr_dist's own. Retrieval metrics see only
ranks within one corpus and saturate; SR is invariant to any scale and shift of the scores, so it compares domains and
models: a domain that a pretrained model already separates well has little to gain from generative learning.
Alignment and uniformity (Wang & Isola 2020) stand beside it, because SR alone cannot say which of the two moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lbr_dist.inference.encoder import unit

TILE = 1024
"""Rows of one block of scores: memory is TILE x passages, whatever the number of queries."""
UNIFORMITY_POINTS = 10_000
"""Most embeddings that uniformity compares pairwise; more are thinned evenly."""


def separation(
    queries_QD: np.ndarray,
    passages_PD: np.ndarray,
    positives: Sequence[Sequence[int]],
    hardest: int = 10,
    itself: Mapping[int, int] | None = None,
) -> dict[str, float]:
    """Separation ratio, the AUC that it implies, alignment and uniformity.

    With s+ the cosines of all positive pairs and s- those of each query's `hardest` best-scored non-positives, both on
    embeddings from which the mean of all queries and passages was subtracted:
    `SR = (mean s+ - mean s-) / sqrt((var s+ + var s-) / 2)`, and under normal scores `AUC = Phi(SR / sqrt 2)`.

    Args:
        queries_QD, passages_PD: float32 embeddings; they need not be normalised.
        positives: for each query the rows of its right passages, at least one.
        hardest: non-positives per query; fewer where the corpus has fewer.
        itself: for a query that is a passage too, its row: neither right nor wrong.

    Returns:
        `sr`, `auc` (neither where every passage answers every query), `alignment` (mean squared distance of positive
        pairs) and `uniformity` (log of the mean Gaussian potential, t = 2); the last two on the embeddings as they are,
        normalised, lower is better.

    Raises:
        ValueError: a query without positives, or `hardest` below 1.
    """
    if hardest < 1:
        raise ValueError(f"separation compares with at least one non-positive per query, not {hardest}")
    if len(positives) != len(queries_QD) or any(len(p) == 0 for p in positives):
        raise ValueError("separation needs at least one positive for every query")
    q_QD, p_PD = (unit(np.asarray(rows_ND, np.float32)) for rows_ND in (queries_QD, passages_PD))
    mean_D = np.concatenate([q_QD, p_PD]).mean(0, dtype=np.float64).astype(np.float32)
    right, wrong = _scores(unit(q_QD - mean_D), unit(p_PD - mean_D), positives, hardest, itself or {})
    ratio = _ratio(right, wrong) if len(wrong) else None
    return {
        **({} if ratio is None else {"sr": ratio, "auc": auc(ratio)}),
        "alignment": _alignment(q_QD, p_PD, positives),
        "uniformity": uniformity(np.concatenate([q_QD, p_PD])),
    }


def _ratio(right: np.ndarray, wrong: np.ndarray) -> float:
    spread = math.sqrt((right.var() + wrong.var()) / 2)
    gap = float(right.mean() - wrong.mean())
    return gap / spread if spread > 0 else math.copysign(math.inf, gap) if gap else 0.0


def auc(sr: float) -> float:
    """P(s+ > s-) = Phi(SR / sqrt 2) for normal scores."""
    return 0.5 * (1.0 + math.erf(sr / 2.0))


def uniformity(points_ND: np.ndarray) -> float:
    """log mean exp(-2 |x - y|^2) over pairs of different rows of normalised embeddings (Wang & Isola 2020, eq. 2)."""
    if len(points_ND) > UNIFORMITY_POINTS:
        points_ND = points_ND[np.linspace(0, len(points_ND) - 1, UNIFORMITY_POINTS).astype(np.int64)]
    total, count = 0.0, len(points_ND)
    for start in range(0, count, TILE):
        potential = np.exp(-2.0 * (2.0 - 2.0 * points_ND[start : start + TILE] @ points_ND.T))
        np.fill_diagonal(potential[:, start:], 0)  # of a row with itself
        total += float(potential.sum(dtype=np.float64))
    return math.log(total / (count * (count - 1)))


def _scores(
    q_QD: np.ndarray, p_PD: np.ndarray, positives: Sequence[Sequence[int]], hardest: int, itself: Mapping[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    right, wrong = [], []
    for start in range(0, len(q_QD), TILE):
        scores = q_QD[start : start + TILE] @ p_PD.T
        for query, (row, rows) in enumerate(zip(scores, positives[start : start + TILE], strict=True), start):
            mine = np.unique(np.asarray(rows))
            right.append(row[mine])
            if query in itself:
                mine = np.append(mine, itself[query])
            row[mine] = -np.inf
            k = min(hardest, len(row) - len(mine))
            if k > 0:
                wrong.append(np.partition(row, len(row) - k)[-k:])
    return np.concatenate(right).astype(np.float64), np.concatenate(wrong or [np.empty(0)]).astype(np.float64)


def _alignment(q_QD: np.ndarray, p_PD: np.ndarray, positives: Sequence[Sequence[int]]) -> float:
    query = np.repeat(np.arange(len(q_QD)), [len(p) for p in positives])
    passage = np.concatenate([np.asarray(p) for p in positives])
    return float(((q_QD[query] - p_PD[passage]) ** 2).sum(1).mean())
