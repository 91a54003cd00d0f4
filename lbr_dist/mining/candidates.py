"""Which passages there are, and which of them a query must never get as a negative.

A mined false negative teaches the opposite of what is wanted, so everything that is known to answer a question counts:
the answers (and further `positives`) of every record with that question. Texts are compared by their normal form, as
everywhere else. Of the records, hashes and numbers stay in memory (some 60 bytes each), never the texts.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lbr_dist.data.record import normalised_hash
from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.data.shards import PreparedSet
from lbr_dist.data.split_index import Ragged
from lbr_dist.errors import UserError

SIDE = "cl"
"""The side whose records get negatives, and whose answers are the passages: stage 2 trains on it."""


def passages_of(owner_M: np.ndarray, passage_M: np.ndarray, owners: int) -> Ragged:
    """The passages of each owner, int64, from (owner, passage) pairs in any order; a repeated pair counts once."""
    unique_2M = np.unique(np.stack([owner_M, passage_M]).astype(np.int64), axis=1)
    return Ragged(unique_2M[1], np.searchsorted(unique_2M[0], np.arange(owners + 1)))


@dataclass(frozen=True)
class Candidates:
    """Queries (the records of the side, Q) and passages (their different answers, P)."""

    passage_rows_P: np.ndarray
    """int64: first record with each answer, in order."""
    own_Q: np.ndarray
    """int64: the passage that is each record's own answer."""
    question_Q: np.ndarray
    """int64: number of each record's question; records with the same normalised question share it."""
    answers: Ragged
    """By question: its known answers."""
    present: Ragged
    """By record: negatives that it has already, of those that are passages."""

    def most_excluded(self, query_B: np.ndarray) -> int:
        """What `excluded` gives for the one of these queries that has the most."""
        return int((self.answers.counts(self.question_Q[query_B]) + self.present.counts(query_B)).max())

    def excluded(self, query_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What these queries must not get: known answers, and of the rest the negatives that they have already.

        Each as position in `query_B` x number of passages + passage.
        """
        both = self.answers.take(self.question_Q[query_B]), self.present.take(query_B)
        known_M, present_M = (position_M * len(self.passage_rows_P) + passage_M for position_M, passage_M in both)
        return known_M, np.setdiff1d(present_M, known_M)


def survey(opened: PreparedSet, advance: Callable[[int], None]) -> Candidates:
    """Read the side once.

    Raises:
        UserError: the set has no such side, plain texts in it, or fewer than two different answers.
    """
    if opened.splits[SIDE].records == 0:
        raise UserError(
            f"prepared set {opened.root}: its {SIDE} side is empty, there is nothing to mine for: give --cl"
        )
    reader = ShardReader(opened, SIDE)
    if (reader.index.answer_tokens < 0).any():
        raise UserError(
            f"prepared set {opened.root}: its {SIDE} side has plain texts; mining needs questions and answers"
        )
    hash_Q = reader.index.answer_hash
    hashes_P, first_P, inverse_Q = np.unique(hash_Q, return_index=True, return_inverse=True)
    if len(hashes_P) < 2:
        raise UserError(
            f"prepared set {opened.root}: all records of its {SIDE} side have one answer: no negatives exist"
        )
    order_P = np.argsort(first_P)
    place_P = np.empty_like(order_P)
    place_P[order_P] = np.arange(len(order_P))
    own_Q = place_P[inverse_Q]

    questions = array("q")
    further, present = (array("q"), array("q")), (array("q"), array("q"))
    for row in range(len(reader.index)):
        record = reader.read([row])[0]
        questions.append(normalised_hash(record["question"]))
        for (owners, hashes), name in ((further, "positives"), (present, "negatives")):
            texts = record.get(name, ())
            owners.extend([row] * len(texts))
            hashes.extend(normalised_hash(text) for text in texts)
        advance(1)
    reader.close()
    _, question_Q = np.unique(np.frombuffer(questions, np.int64), return_inverse=True)

    def passages(owners: array[int], hashes: array[int]) -> tuple[np.ndarray, np.ndarray]:
        owner_M, hash_M = np.frombuffer(owners, np.int64), np.frombuffer(hashes, np.int64)
        found_M = np.minimum(np.searchsorted(hashes_P, hash_M), len(hashes_P) - 1)
        hit_M = hashes_P[found_M] == hash_M
        return owner_M[hit_M], place_P[found_M[hit_M]]

    positive_owner_M, positive_M = passages(*further)
    count = int(question_Q.max()) + 1
    answers = passages_of(
        np.concatenate([question_Q, question_Q[positive_owner_M]]), np.concatenate([own_Q, positive_M]), count
    )
    return Candidates(first_P[order_P], own_Q, question_Q, answers, passages_of(*passages(*present), len(own_Q)))
