"""Negatives that were mined elsewhere: a JSONL file that names records by id.

A line is `{"id": ..., "negatives": [...]}`; a negative is an id, or `{"id": ..., "score": ...}` as in the `mined.jsonl`
that `lbr mine` writes into its sets. The negative is that record's answer. The file is read as sources are (rows.py).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lbr_dist.errors import UserError
from lbr_dist.inference.rows import Place, read_rows
from lbr_dist.mining.candidates import Candidates
from lbr_dist.mining.choose import Chosen

FORM = '{"id": ..., "negatives": [...]}'
REJECTED_NONE = np.int64(-1)


class GivenNegatives:
    """The file's negatives by query; memory holds three numbers for each."""

    def __init__(self, path: Path, ids: np.ndarray, candidates: Candidates) -> None:
        """Read the file.

        Args:
            path: the file.
            ids: ids of the side's records, object [Q].
            candidates: of the same side.

        Raises:
            UserError: no file of JSON lines, none in it, one that is not of this form, or an id that the side does not
                have.
        """
        self._path, self._candidates = path, candidates
        hash_Q = np.array([_hash(name) for name in ids], np.uint64)
        self._order_Q = np.argsort(hash_Q, kind="stable")
        self._hash_Q = hash_Q[self._order_Q]
        queries, passages, scores = array("q"), array("q"), array("f")
        where: Place | None = None
        for where, row in read_rows(path):
            for query, passage, score in self._negatives(str(where), row):
                queries.append(query)
                passages.append(passage)
                scores.append(score)
        if where is None:
            raise UserError(f"{path}: holds no line: give {FORM} for each record that gets negatives")
        query_M = np.frombuffer(queries, np.int64)
        order_M = np.argsort(query_M, kind="stable")
        self._query_M = query_M[order_M]
        self._passage_M = np.frombuffer(passages, np.int64)[order_M]
        self._score_M = np.frombuffer(scores, np.float32)[order_M]

    def chosen(self, query_B: np.ndarray, count: int) -> Chosen:
        """The first `count` of these neighbouring queries that are not known answers."""
        low, high = np.searchsorted(self._query_M, [query_B[0], query_B[-1] + 1])
        position_M, passage_M = self._query_M[low:high] - query_B[0], self._passage_M[low:high]
        key_M = position_M * len(self._candidates.passage_rows_P) + passage_M
        known_M, present_M = (np.isin(key_M, of_kind) for of_kind in self._candidates.excluded(query_B))
        passage_QN = np.full((len(query_B), count), -1, np.int64)
        score_QN = np.full((len(query_B), count), np.nan, np.float32)
        filled = [0] * len(query_B)
        for entry in np.flatnonzero(~known_M & ~present_M).tolist():
            query, passage = int(position_M[entry]), int(passage_M[entry])
            if filled[query] < count and passage not in passage_QN[query]:
                passage_QN[query, filled[query]] = passage
                score_QN[query, filled[query]] = self._score_M[low + entry]
                filled[query] += 1
        met = (np.bincount(position_M[kind_M], minlength=len(query_B)) for kind_M in (known_M, present_M))
        return Chosen(
            passage_QN,
            score_QN,
            np.full(len(query_B), np.nan, np.float32),
            np.full((len(query_B), 0), REJECTED_NONE),
            np.zeros((len(query_B), 0), np.float32),
            np.zeros(len(query_B), np.int32),
            *(count_Q.astype(np.int32) for count_Q in met),
        )

    def _negatives(self, where: str, row: Mapping[str, Any]) -> list[tuple[int, int, float]]:
        try:
            name, negatives = row["id"], row["negatives"]
            if not isinstance(negatives, list):
                raise TypeError
            pairs = [(n["id"], _score(n.get("score"))) if isinstance(n, dict) else (n, math.nan) for n in negatives]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f'{where}: expected {FORM}, each negative an id or {{"id": ..., "score": number}}'
            ) from None
        query, own_Q = self._record(name, where), self._candidates.own_Q
        return [(query, int(own_Q[self._record(negative, where)]), score) for negative, score in pairs]

    def _record(self, name: Any, where: str) -> int:
        value = np.uint64(_hash(str(name)))
        place = int(np.searchsorted(self._hash_Q, value))
        if place == len(self._hash_Q) or self._hash_Q[place] != value:
            raise UserError(f"{where}: the set has no cl record with id {name!r}: was the file mined from another set?")
        return int(self._order_Q[place])


def _score(value: Any) -> float:
    score = math.nan if value is None else float(value)
    if math.isinf(score):
        raise ValueError
    return score


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass"))
