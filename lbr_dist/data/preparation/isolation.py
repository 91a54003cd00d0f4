"""Find what two sides share, to remove it before writing and to prove afterwards that nothing is left.

The same functions serve twice: on the first pass's numbers, to drop what the components alone do not keep apart (plain
texts close to an evaluation record), and on what is read back from the written shards, where they must find nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from lbr_dist.data.preparation.collect import Texts
from lbr_dist.data.preparation.components import FLUSH
from lbr_dist.data.preparation.minhash import MIN_WORDS, Sketches, windows, word_hashes
from lbr_dist.data.preparation.split import CL, EVAL, EXTERNAL, GL, TEXT, UNUSED
from lbr_dist.data.preparation.spool import SpoolSlice
from lbr_dist.data.record import batches, normalise

NAMES = {GL: "gl", CL: "cl", EVAL: "eval", TEXT: "gl texts", EXTERNAL: "external evaluation"}
APART = ((GL, CL), (GL, EVAL), (CL, EVAL), (TEXT, EVAL), (GL, EXTERNAL), (CL, EXTERNAL), (TEXT, EXTERNAL))
"""Sides that may share nothing; of each pair the first gives way. Plain texts may resemble what `gl` and `cl` hold."""
_APART = np.zeros((6, 6), bool)
for _first, _second in APART:
    _APART[_first, _second] = _APART[_second, _first] = True
_RANK = np.array([1, 2, 3, 0, 4, 5])
"""Which side gives way: the one of lower rank, by side number."""


def pair_name(first: int, second: int) -> str:
    """How reports name two sides."""
    return f"{NAMES[first]} - {NAMES[second]}"


@dataclass
class Crossings:
    """What sides share that may not: counts by pair of sides, and the records that would have to give way."""

    equal: dict[str, int] = field(default_factory=lambda: {pair_name(*pair): 0 for pair in APART})
    """Different normalised texts that both sides hold."""
    near: dict[str, int] = field(default_factory=lambda: {pair_name(*pair): 0 for pair in APART})
    """Pairs of different normalised texts, one from each side, that are near-duplicates."""
    losers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64: records of the side that gives way, sorted."""


def crossings(
    side: np.ndarray, texts: Texts, sketches: Sketches, *, similarity: float, common: np.ndarray
) -> Crossings:
    """Compare all sides.

    Args:
        side: int8 [records].
        texts: texts of these records; those of unused records are left aside.
        common: uint64 hashes of the common answers, which sides may share.
    """
    texts = texts.of(side != UNUSED)
    linking = texts.linking(common)
    texts = Texts(texts.record[linking], texts.hash[linking], texts.sketch[linking])
    if not len(texts.hash):
        return Crossings()
    # one entry for each different text of each side; `entry_of` maps every text to its entry
    sides = side[texts.record].astype(np.int64)
    order = np.lexsort((sides, texts.hash))
    hashes, ordered = texts.hash[order], sides[order]
    new = np.concatenate([[True], (hashes[1:] != hashes[:-1]) | (ordered[1:] != ordered[:-1])])
    entry_of = np.empty(len(order), np.int64)
    entry_of[order] = np.cumsum(new) - 1
    entry_hash, entry_side, entry_sketch = hashes[new], ordered[new], texts.sketch[order][new]

    result = Crossings()
    loses = np.zeros(len(entry_hash), bool)
    for lag in range(1, len(NAMES)):  # at most one entry per side has the same text
        a = np.flatnonzero(entry_hash[lag:] == entry_hash[:-lag])
        _note(result.equal, loses, entry_side, a, a + lag)
    a, b = _near_pairs(entry_side, entry_sketch, sketches, similarity)
    different = entry_hash[a] != entry_hash[b]
    _note(result.near, loses, entry_side, a[different], b[different])
    result.losers = np.unique(texts.record[loses[entry_of]])
    return result


def _near_pairs(
    sides: np.ndarray, sketch: np.ndarray, sketches: Sketches, similarity: float
) -> tuple[np.ndarray, np.ndarray]:
    """Different pairs of entries on sides that may share nothing, whose texts are near-duplicates."""
    entries = np.flatnonzero(sketch >= 0)
    rows = sketch[entries]
    width = max(1, len(rows))
    found: list[np.ndarray] = []
    waiting: list[np.ndarray] = []

    def flush() -> None:
        pairs = np.unique(np.concatenate([np.zeros(0, np.int64), *waiting]))
        waiting.clear()
        near = sketches.similar(rows[pairs // width], rows[pairs % width], similarity)
        found.append(pairs[near])

    def odd(order: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The rarer in each run, of what has to be apart."""
        own = sides[entries[order]]

        def rarer(one: np.ndarray, other: np.ndarray) -> np.ndarray:
            fewer = np.add.reduceat(one.astype(np.int64), starts) <= np.add.reduceat(other.astype(np.int64), starts)
            return np.where(np.repeat(fewer, np.diff(starts, append=len(order))), one, other)

        held = np.isin(own, (EVAL, EXTERNAL))
        return rarer(held, ~held) | rarer(own == GL, own == CL)

    size = 0
    for a, b in sketches.candidates(rows, odd):
        apart = _APART[sides[entries[a]], sides[entries[b]]]
        waiting.append(np.minimum(a, b)[apart] * width + np.maximum(a, b)[apart])
        size += len(waiting[-1])
        if size > FLUSH:
            flush()
            size = 0
    flush()
    pairs = np.unique(np.concatenate(found))
    return entries[pairs // width], entries[pairs % width]


def _note(counts: dict[str, int], loses: np.ndarray, sides: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    for first, second in APART:
        for x, y in ((a, b), (b, a)):
            hit = (sides[x] == first) & (sides[y] == second)
            counts[pair_name(first, second)] += int(hit.sum())
    apart = _APART[sides[a], sides[b]]
    a, b = a[apart], b[apart]
    loses[np.where(_RANK[sides[a]] < _RANK[sides[b]], a, b)] = True


class Containment:
    """Whether a text holds a whole evaluation question or answer, word for word, or lies whole in one.

    Similarity does not see this: a page that quotes a definition is not a near-duplicate of it, nor is a sentence of a
    long answer. Texts of fewer than `MIN_WORDS` words are left aside, for they occur by chance.
    """

    def __init__(self, targets: Iterable[Sequence[str]]) -> None:
        """Take the evaluation texts, batch by batch; memory holds a number for each of their words."""
        self._lengths: dict[int, set[int]] = {}
        self._whole: set[int] = set()
        parts = [np.zeros(0, np.uint64)]
        for batch in targets:
            hashes, offsets, enough = _words(batch)
            anchors = windows(hashes, MIN_WORDS)
            for start, end in zip(offsets[:-1][enough].tolist(), offsets[1:][enough].tolist(), strict=True):
                self._lengths.setdefault(int(anchors[start]), set()).add(end - start)
                self._whole.add(_whole(hashes[start:end]))
                parts.append(anchors[start : end - MIN_WORDS + 1])
        self._windows = np.unique(np.concatenate(parts))
        self._anchors = np.array(sorted(self._lengths), np.uint64)

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """Whether each text holds one of the targets, or lies in one, bool [texts]."""
        hashes, offsets, enough = _words(texts)
        anchors = windows(hashes, MIN_WORDS)
        found = self._inside(anchors, offsets, enough)
        places = np.flatnonzero(_among(anchors, self._anchors))
        owners = np.searchsorted(offsets, places, side="right") - 1
        for place, owner in zip(places.tolist(), owners.tolist(), strict=True):
            room = int(offsets[owner + 1]) - place
            for length in self._lengths[int(anchors[place])]:
                if length <= room and _whole(hashes[place : place + length]) in self._whole:
                    found[owner] = True
        return found

    def _inside(self, anchors: np.ndarray, offsets: np.ndarray, enough: np.ndarray) -> np.ndarray:
        """Whether all windows of a text are windows of targets: those of one, since neighbours share all but a word."""
        known = np.concatenate([[0], np.cumsum(_among(anchors, self._windows))])
        first = np.minimum(offsets[:-1], len(anchors))
        last = np.clip(offsets[1:] - MIN_WORDS + 1, first, len(anchors))
        return enough & (known[last] - known[first] == last - first)


class InContainment:
    """Says of plain texts in the spool whether a `Containment` finds them; picklable."""

    def __init__(self, containment: Containment) -> None:
        self._containment = containment

    def __call__(self, task: tuple[np.ndarray, SpoolSlice]) -> np.ndarray:
        """Numbers of the records that it does; a task has the numbers, and where the records are."""
        numbers, records = task
        found = [self._containment.of([r.document for r in batch]) for batch in batches(records.records())]
        return numbers[np.concatenate([np.zeros(0, bool), *found])]


def _words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of the words of all texts, each text's place in them, and whether it has `MIN_WORDS` of them."""
    words = word_hashes([normalise(text) for text in texts])
    return words.hashes, words.offsets, words.counts >= MIN_WORDS


def _among(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Whether each value is one of `ordered`."""
    if not len(ordered):
        return np.zeros(len(values), bool)
    return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values


def _whole(hashes: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(hashes.tobytes())
