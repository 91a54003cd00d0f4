"""BM25 (Robertson & Zaragoza 2009) through bm25s: the lexical yardstick beside every learned model.

Words are runs of letters, their marks and digits in the normal form of data/record.py (`_` parts them), without
stemming and without a stop-word list, so that the yardstick is the same for every domain and language; scripts that
write no spaces (Chinese, Japanese, Thai ...) go by character.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from lbr_dist.data.record import MARKS, SPACELESS, normalise

_WORD = re.compile(rf"[{SPACELESS}]|(?:[^\W_{SPACELESS}]|[{MARKS}])+")  # to Python _ is a letter, a mark (Hindi) none


def words(text: str) -> list[str]:
    """Terms of a text."""
    return _WORD.findall(normalise(text))


class BM25:
    """Index of passages (Lucene's variant, k1 = 1.5, b = 0.75)."""

    def __init__(self, passages: Iterable[str]) -> None:
        """Read the passages once; of their words, numbers stay in memory while the index is built."""
        import bm25s

        number: dict[str, int] = {}
        numbers = [array("i", [number.setdefault(word, len(number)) for word in words(text)]) for text in passages]
        self._passages = len(numbers)
        self._index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        self._empty = not number
        if not self._empty:
            self._index.index((numbers, number), show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores of the best `k` passages of each query, best first: int64 and float32 [queries, k].

        Equal scores are in the order of the passages; a query without a known word scores 0 everywhere.
        """
        k = min(k, self._passages)
        rows_QK = np.zeros((len(queries), k), dtype=np.int64)
        scores_QK = np.zeros((len(queries), k), dtype=np.float32)
        for number, query in enumerate(queries):
            scores_P = self.scores(query)
            rows_QK[number] = best(scores_P, k)
            scores_QK[number] = scores_P[rows_QK[number]]
        return rows_QK, scores_QK

    def scores(self, query: str) -> np.ndarray:
        """Score of every passage, float32 [passages]; 0 for one that shares no word with the query."""
        known = [] if self._empty else self._index.get_tokens_ids(words(query))
        return self._index.get_scores_from_ids(known) if len(known) else np.zeros(self._passages, dtype=np.float32)


def best(scores_P: np.ndarray, k: int) -> np.ndarray:
    """Rows of the `k` largest scores, at most all, best first; equal scores are in the order of the rows."""
    if k == 0:
        return np.zeros(0, dtype=np.int64)
    least = np.partition(scores_P, -k)[-k]
    above = np.flatnonzero(scores_P > least)
    equal = np.flatnonzero(scores_P == least)[: k - len(above)]
    return np.concatenate([above[np.argsort(-scores_P[above], kind="stable")], equal])
