"""The kinds of negatives of InfoNCE, as blocks of columns beside each other in one strip of scores.

    passages          q_i against every passage (the paper's loss; always there)
    query_query       q_i against every other query
    passage_passage   the positive of q_i against every other passage

The last two are the extra terms of Qwen3-Embedding (Zhang et al. 2025, equation 1): more negatives for the same texts,
in the same softmax. A block knows its rows, its columns, which column is the row's own, and the rules by which a column
is no negative; the arithmetic in strips.py treats all blocks alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

NO_KEY = -(2**63)
"""Stands for "no hash" among the int64 keys; matches nothing."""

CHUNK = 4096
"""Rows whose gradient is turned at a time."""

Term = Literal["passages", "query_query", "passage_passage"]


@dataclass(frozen=True)
class Keys:
    """int64 hashes by which a passage is known to be no negative of a query."""

    question_Q: Tensor | None  # None: the rule is off
    question_P: Tensor
    known_QK: Tensor  # column 0: the query's own answer; then its other known positives
    answer_P: Tensor

    def of_pairs(self, columns: Tensor) -> Keys:
        """The same rules for columns that are the pairs of `columns`, for example their queries."""
        return Keys(self.question_Q, self.question_P[columns], self.known_QK, self.answer_P[columns])


@dataclass(frozen=True)
class Block:
    """This rank's rows against one kind of columns."""

    term: Term
    rows_QD: Tensor  # not normalised
    right_CD: Tensor  # of unit length
    own_Q: Tensor  # column that is the row's own: the positive, or the row itself
    keys: Keys | None

    def left(self, rows: slice) -> Tensor:
        """Rows at unit length [R, D]."""
        return normalize(self.rows_QD[rows], dim=1)

    def norm(self, rows: slice) -> Tensor:
        """Lengths of the rows [R, 1]."""
        return torch.linalg.vector_norm(self.rows_QD[rows], dim=1, keepdim=True)

    def false_negatives(self, rows: slice, scores: Tensor, limit: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """(reason, [R, C] mask) for each rule in force; the row's own column is not spared here.

        `limit` [R]: scores above it are masked by the margin rule; None: that rule is off.
        """
        keys = self.keys
        if keys is not None:
            if keys.question_Q is not None:
                yield "same_question", keys.question_Q[rows, None] == keys.question_P
            for k in range(keys.known_QK.shape[1]):
                yield "known_positive" if k else "same_answer", keys.known_QK[rows, k, None] == keys.answer_P
        if limit is not None:
            yield "margin", scores > limit[:, None]


def make_blocks(
    query_QD: Tensor,
    passage_PD: Tensor,
    unit_PD: Tensor,
    unit_AD: Tensor | None,
    *,
    own_Q: Tensor,
    columns: Tensor,
    keys: Keys | None,
    passage_passage: bool,
) -> list[Block]:
    """The blocks in force, passages first.

    Args:
        query_QD: this rank's queries.
        passage_PD: all passages; this rank's positives lie in one run.
        unit_PD: the same, of unit length.
        unit_AD: all queries, of unit length; None: no query-query term.
        own_Q: column of each query's positive among the passages.
        columns: columns of all positives, in the order of `unit_AD`.
        keys: rules, or None.
        passage_passage: with the passage-passage term.
    """
    blocks = [Block("passages", query_QD, unit_PD, own_Q, keys)]
    if unit_AD is not None:
        place_P = torch.zeros(len(unit_PD), dtype=torch.int64, device=own_Q.device)
        place_P[columns] = torch.arange(len(columns), device=own_Q.device)
        pairs = None if keys is None else keys.of_pairs(columns)
        blocks.append(Block("query_query", query_QD, unit_AD, place_P[own_Q], pairs))
    if passage_passage:
        first = int(own_Q[0]) if len(own_Q) else 0
        blocks.append(Block("passage_passage", passage_PD[first : first + len(own_Q)], unit_PD, own_Q, keys))
    return blocks


def through_norm(grad: Tensor, unit: Tensor, rows: Tensor) -> None:
    """Turn the gradient of `unit = rows / |rows|` into that of `rows`, in place: (g - (g.u) u) / |rows|."""
    for g, u, r in zip(*(tensor.split(CHUNK) for tensor in (grad, unit, rows)), strict=True):
        g.sub_(u * (g * u).sum(1, keepdim=True))
        g.div_(torch.linalg.vector_norm(r, dim=1, keepdim=True))
