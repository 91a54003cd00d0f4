"""From ranked passages to the negatives of a query: which are allowed, near enough, and not too near.

The threshold that follows the positive's own score is that of NV-Retriever (Moreira et al. 2024, section 4:
TopK-PercPos, here `share`, and TopK-MarginPos, here `margin`): a passage that scores almost like the known answer, or
above it, is too likely an answer that nobody has marked. The rank window is older (ANCE, Xiong et al. 2021; RocketQA,
Qu et al. 2021): the very first ranks are skipped for the same reason, and far ranks are no longer hard.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lbr_dist.disk import replacing

REJECTED = 3
"""Passages too near to the positive that are kept for the report, per query."""


@dataclass(frozen=True)
class Rule:
    """What makes a passage a negative. Ranks count the allowed passages, from 1."""

    count: int
    """Negatives per query: the best of what the other settings leave."""
    skip: int
    """First ranks that are passed over."""
    depth: int
    """Last rank that is looked at."""
    share: float | None
    """A negative scores below this share of the positive's score."""
    margin: float | None
    """A negative scores below the positive's score minus this."""

    def limit(self, positive_Q: np.ndarray) -> np.ndarray:
        """Score below which a passage must lie, for each query, float32 [Q].

        Where the positive's score is negative, its share would be above it: the distance is taken below it instead.
        """
        limit_Q = np.full(len(positive_Q), np.inf, np.float32)
        if self.share is not None:
            limit_Q = positive_Q - np.float32(1 - self.share) * np.abs(positive_Q)
        if self.margin is not None:
            limit_Q = np.minimum(limit_Q, positive_Q - np.float32(self.margin))
        return limit_Q.astype(np.float32)


@dataclass(frozen=True)
class Chosen:
    """The negatives of some queries; unused places hold passage -1."""

    passage_QN: np.ndarray
    """int64: best first."""
    score_QN: np.ndarray
    """float32."""
    positive_Q: np.ndarray
    """float32: score of each query's own answer."""
    rejected_QR: np.ndarray
    """int64: the first passages that were too near to the positive, -1 where there are fewer."""
    rejected_score_QR: np.ndarray
    near_Q: np.ndarray
    """int32: passages of the window that were too near."""
    known_Q: np.ndarray
    """int32: known answers among the passages that were searched;"""
    present_Q: np.ndarray
    """int32: negatives that the record has already, likewise."""

    @property
    def found_Q(self) -> np.ndarray:
        """Negatives of each query, int64 [Q]."""
        return (self.passage_QN >= 0).sum(1)


def choose(
    rows_QK: np.ndarray,
    scores_QK: np.ndarray,
    positive_Q: np.ndarray,
    excluded: tuple[np.ndarray, np.ndarray],
    passages: int,
    rule: Rule,
) -> Chosen:
    """Apply the rule.

    Args:
        rows_QK: passages found for each query, best first; -1 where the search found fewer.
        scores_QK: their scores.
        positive_Q: score of each query's own answer.
        excluded: passages that are not allowed, as `Candidates.excluded` gives them.
        passages: number of passages.
    """
    key_QK = np.arange(len(rows_QK))[:, None] * passages + rows_QK
    known_QK, present_QK = (np.isin(key_QK, key_M) & (rows_QK >= 0) for key_M in excluded)
    allowed_QK = ~known_QK & ~present_QK & (rows_QK >= 0)
    rank_QK = np.cumsum(allowed_QK, axis=1)
    window_QK = allowed_QK & (rank_QK > rule.skip) & (rank_QK <= rule.depth)
    far_QK = scores_QK < rule.limit(positive_Q)[:, None]
    chosen = _first(window_QK & far_QK, rows_QK, scores_QK, rule.count)
    rejected = _first(window_QK & ~far_QK, rows_QK, scores_QK, REJECTED)
    counts = (mask_QK.sum(1).astype(np.int32) for mask_QK in (window_QK & ~far_QK, known_QK, present_QK))
    return Chosen(*chosen, positive_Q.astype(np.float32), *rejected, *counts)


def _first(
    mask_QK: np.ndarray, rows_QK: np.ndarray, scores_QK: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` entries of each row that the mask allows, filled up with -1 and nan."""
    rows_QN = np.full((len(rows_QK), count), -1, np.int64)
    scores_QN = np.full((len(rows_QK), count), np.nan, np.float32)
    place_QK = np.cumsum(mask_QK, axis=1) - 1
    query_M, column_M = np.nonzero(mask_QK & (place_QK < count))
    place_M = place_QK[query_M, column_M]
    rows_QN[query_M, place_M] = rows_QK[query_M, column_M]
    scores_QN[query_M, place_M] = scores_QK[query_M, column_M]
    return rows_QN, scores_QN


def commit(file: Path, chosen: Chosen) -> None:
    """Keep the negatives of some queries in a file (.npz), which appears whole or not at all."""
    with replacing(file) as temporary:
        np.savez(temporary, **vars(chosen))


def is_committed(file: Path, queries: int) -> bool:
    """Whether the negatives of so many queries are there, undamaged."""
    try:
        with np.load(file) as arrays:  # to the end of each, where its checksum is
            chosen = Chosen(**{name: arrays[name] for name in arrays.files})
    except (OSError, EOFError, ValueError, KeyError, TypeError, NotImplementedError, zipfile.BadZipFile):
        return False
    return all(len(values) == queries for values in vars(chosen).values())
