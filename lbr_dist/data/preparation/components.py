"""Which records belong together: connected components, which never divide.

Two question-answer records are linked when they share a normalised question or answer, when two of their texts are
near-duplicates, or when they belong to the same named group (entity). Plain texts link nothing: they all serve the
first stage, and one that is too close to an evaluation record is dropped instead (see isolation.py); otherwise a large
corpus would chain unrelated records together.

One exception keeps the components from collapsing into one: a *common text*, an answer such as "yes", of at most
`COMMON_WORDS` words and `COMMON_CHARACTERS` characters and shared by very many records, says nothing about two records
belonging together and does not link. The report names every such text. A question always links: a query with very many
right documents, as in TREC collections, would be asked on every side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lbr_dist.data.preparation.collect import NO_ENTITY, Numbers, Texts, compared_texts
from lbr_dist.data.preparation.minhash import Sketches, word_hashes
from lbr_dist.data.preparation.spool import Spool
from lbr_dist.data.record import normalise, normalised_hash

COMMON_WORDS, COMMON_CHARACTERS = 6, 60
"""A common text has at most so many words and characters (a protein is one word),"""
COMMON_RECORDS = 20
"""and is shared by more than so many records,"""
COMMON_SHARE = 0.01
"""and by more than this share of all question-answer records."""
LARGE = 0.1
"""Share of the question-answer records, and more than `COMMON_RECORDS` of them, above which a component is large."""
EQUAL, ENTITY, NEAR = "equal texts", "--entity", "near-duplicates"
"""What may link most of it;"""
ALIKE = "questions that share most of their words, as an instruction, need another field (--field question=NAME)"
"""what helps against the last."""
FLUSH = 1 << 20
"""Candidate pairs that wait to be compared together."""


@dataclass(frozen=True)
class CommonText:
    """An answer that links nothing."""

    text: str
    hash: int
    records: int


def common_texts(texts: Texts, numbers: Numbers, spool: Spool) -> list[CommonText]:
    """Answers that are too common to link records, the most common first; `texts` are of the records that are alive."""
    texts = texts.of(~numbers.is_text & ~numbers.external)
    answers = np.flatnonzero(~texts.first)
    answers = answers[np.lexsort((texts.record[answers], texts.hash[answers]))]
    again = (np.diff(texts.record[answers], prepend=-1) == 0) & (np.diff(texts.hash[answers], prepend=0) == 0)
    answers = answers[~again]  # a record counts once, in however many forms it has the answer
    limit = max(COMMON_RECORDS, COMMON_SHARE * int(texts.first.sum()))
    hashes, first, counts = np.unique(texts.hash[answers], return_index=True, return_counts=True)
    found = []
    for position in np.flatnonzero(counts > limit):
        record = spool[int(texts.record[answers[first[position]]])]
        signed = int(hashes[position].astype(np.int64))
        text = next(text for text in compared_texts(record) if normalised_hash(text) == signed)
        form = normalise(text)
        if len(form) <= COMMON_CHARACTERS and word_hashes([form]).counts[0] <= COMMON_WORDS:
            found.append(CommonText(text, int(hashes[position]), int(counts[position])))
    return sorted(found, key=lambda common: (-common.records, common.text))


def components(
    texts: Texts,
    numbers: Numbers,
    sketches: Sketches,
    *,
    alive: np.ndarray,
    original: np.ndarray | None = None,
    similarity: float,
    common: np.ndarray,
) -> np.ndarray:
    """Connected components over question-answer records, those of external evaluation sets included.

    Args:
        texts: texts of the records that are alive.
        alive: bool [records]: the others are repetitions.
        original: int64 [records]: the record that each repeats whole, which is of its group too, else itself; None:
            there are no such repetitions.
        similarity: estimated Jaccard similarity from which two texts are near-duplicates.
        common: uint64 hashes of answers that do not link.

    Returns:
        labels int64 [records]: the smallest record number of the component (plain texts: their own).
    """
    texts = texts.of(~numbers.is_text)
    labels = _link_texts(texts, len(numbers.is_text), common)
    original = np.arange(len(alive)) if original is None else original
    repeats = original != np.arange(len(alive))
    named = np.flatnonzero((numbers.entity != NO_ENTITY) & ~numbers.is_text & (alive | repeats))
    labels = _link_equal(labels, original[named], numbers.entity[named])
    sketched = np.flatnonzero(texts.sketch >= 0)
    _, first = np.unique(texts.hash[sketched], return_index=True)
    sketched = sketched[first]  # by hash: the order of the sources must not matter
    rows, owners = texts.sketch[sketched], texts.record[sketched]

    waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def flush() -> None:
        nonlocal labels
        if not waiting:
            return
        a, b = (np.concatenate(side) for side in zip(*waiting, strict=True))
        waiting.clear()
        apart = labels[owners[a]] != labels[owners[b]]
        a, b = a[apart], b[apart]
        near = sketches.similar(rows[a], rows[b], similarity)
        labels = merge(labels, owners[a[near]], owners[b[near]])

    def odd(order: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Those that are not of their run's largest component."""
        flush()
        own = labels[owners[order]]
        largest = np.maximum.reduceat(np.bincount(labels)[own] * len(labels) + own, starts) % len(labels)
        return own != np.repeat(largest, np.diff(starts, append=len(order)))

    size = 0
    for pair in sketches.candidates(rows, odd):
        waiting.append(pair)
        size += len(pair[0])
        if size > FLUSH:
            flush()
            size = 0
    flush()
    return labels


def link_of_largest(
    texts: Texts, numbers: Numbers, labels: np.ndarray, usable: np.ndarray, *, common: np.ndarray
) -> str | None:
    """What links most of the largest component; None: it is not large (`LARGE`).

    Args:
        texts, numbers, common: as of `components`.
        labels: what that gave.
        usable: bool [records]: the question-answer records to share out.
    """
    found, counts = np.unique(labels[usable], return_counts=True)
    if not len(counts) or counts.max() <= max(COMMON_RECORDS, LARGE * counts.sum()):
        return None
    largest = np.flatnonzero(usable & (labels == found[counts.argmax()]))
    grouped = largest[numbers.entity[largest] != NO_ENTITY]
    equal = _link_texts(texts.of(~numbers.is_text), len(labels), common)
    for linked, link in ((equal, EQUAL), (_link_equal(equal, grouped, numbers.entity[grouped]), ENTITY)):
        if 2 * np.unique(linked[largest], return_counts=True)[1].max() > len(largest):
            return link
    return NEAR


def merge(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Join the components of records a[i] and b[i]: union-find over whole arrays (hook to the smaller root, halve)."""
    while True:
        root_a, root_b = labels[a], labels[b]
        apart = root_a != root_b
        if not apart.any():
            return labels
        a, b, root_a, root_b = a[apart], b[apart], root_a[apart], root_b[apart]
        np.minimum.at(labels, np.maximum(root_a, root_b), np.minimum(root_a, root_b))
        while not np.array_equal(shorter := labels[labels], labels):
            labels = shorter


def _link_texts(texts: Texts, records: int, common: np.ndarray) -> np.ndarray:
    """Components by equal texts alone; `texts` are of question-answer records."""
    linking = texts.linking(common)
    return _link_equal(np.arange(records), texts.record[linking], texts.hash[linking])


def _link_equal(labels: np.ndarray, records: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Join records with equal keys."""
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    return merge(labels, records[order[same]], records[order[same + 1]])
