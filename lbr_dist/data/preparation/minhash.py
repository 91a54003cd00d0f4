"""MinHash sketches of texts: near-duplicates found in linear time, with arrays instead of objects.

Broder's MinHash (1997) over word shingles with the usual banding (Leskovec, Rajaraman, Ullman: Mining of Massive
Datasets, chapter 3): texts that agree in a whole band are candidates, and a candidate pair counts when its estimated
Jaccard similarity reaches the threshold. Whole batches are hashed with numpy, because one Python object per text would
cost more than the hashing itself. Sketches live on disk, so memory holds a few numbers per text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from lbr_dist.data.record import ALPHABETIC, MARKS, SPACELESS

SHINGLE, SPACELESS_SHINGLE = 3, 2
"""Words in one shingle; in scripts without spaces the characters of so many: of three they would miss most questions
that differ in one character, of fewer they link most that share a template."""
MIN_WORDS = 8
"""Shorter texts get no sketch: a template around one term ("What is X of Y?") would make them all alike. They are
compared exactly."""
WORD_CHARACTERS, WORD_LETTERS = 2, 4
"""Characters that are as long as a word, where it counts how much a text says: of kana and Han, and of the scripts
without spaces that spell (Thai, Lao, Burmese, Khmer)."""
BANDS, ROWS = 24, 5
"""24 bands of 5 rows: a pair of Jaccard similarity 0.7 is a candidate with probability 0.99, of 0.8 with 0.9999."""
HASHES = BANDS * ROWS
LARGE_RUN = 4096
"""Texts that agree in one band, above which two of them must agree in a second band to be compared: a template shared
by very many texts would cost quadratic time. At similarity 0.7 that still finds 93%, at 0.8 99.8%."""
CHUNK = 1 << 14
"""Pairs compared at once."""

_WORD = re.compile(f"[^\\W{SPACELESS}]+|[{SPACELESS}]")
"""Runs of word characters; in scripts without spaces (Thai, Lao, Burmese, Khmer, kana, Han) every character."""
_MARKS = re.compile(f"(?![{SPACELESS}])[{MARKS}]")
"""Marks that no letter is composed with, as the vowels of Arabic or Hindi: they end no word, and many omit them."""
_SEEDS = np.array([xxhash.xxh3_64_intdigest(b"lbr-%d" % i) for i in range(2 * HASHES + 8)], np.uint64)
_FACTORS, _OFFSETS, _MIX = _SEEDS[:HASHES] | np.uint64(1), _SEEDS[HASHES : 2 * HASHES], _SEEDS[-8:] | np.uint64(1)


_IS_WORD = np.array([chr(byte).isalnum() or byte == ord("_") or byte >= 0x80 for byte in range(256)])
_BYTES = np.array([xxhash.xxh3_64_intdigest(b"byte-%d" % byte) for byte in range(256)], np.uint64)
_BASE = 0x9E3779B97F4A7C13
_WORD_CHUNK = 1 << 19


def _parts() -> np.ndarray:
    """By character, how many of its script are as long as a word, int64 [65536]; 1: it is one itself, or no word."""
    parts = np.ones(1 << 16, np.int64)
    for script, length in ((SPACELESS, WORD_CHARACTERS), (ALPHABETIC, WORD_LETTERS)):
        for first, last in re.findall("(.)-(.)", script):
            parts[ord(first) : ord(last) + 1] = length
    return parts


_PARTS = _parts()


@dataclass(frozen=True)
class Words:
    """Words of texts, in order; in scripts without spaces every character is an entry, and a part of a word."""

    hashes: np.ndarray
    """uint64 [W]."""
    parts: np.ndarray
    """int64 [W]: how many such entries are as long as a word."""
    offsets: np.ndarray
    """int64 [texts + 1]: where each text's begin."""

    @property
    def counts(self) -> np.ndarray:
        """How many words each text has, float64 [texts]: a name of eight characters is no text of eight words."""
        whole = WORD_CHARACTERS * WORD_LETTERS
        return np.diff(np.concatenate([[0], np.cumsum(whole // self.parts)])[self.offsets]) / whole


def word_hashes(texts: Sequence[str]) -> Words:
    """The words of normalised texts."""
    encoded = [(text if text.isascii() else " ".join(_WORD.findall(_MARKS.sub("", text)))).encode() for text in texts]
    chunks = [(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64))]
    first, size = 0, 0
    for number, text in enumerate(encoded):
        size += len(text)
        if size > _WORD_CHUNK or number == len(encoded) - 1:
            chunks.append(_hash_words(encoded[first : number + 1]))
            first, size = number + 1, 0
    hashes, parts, counts = (np.concatenate(found) for found in zip(*chunks, strict=True))
    return Words(hashes, parts, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _hash_words(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Polynomial hash modulo 2^64 of every word, from one running sum over all bytes; its `Words.parts`; and how many
    each text has."""
    data = np.frombuffer(b"\n".join(texts) + b"\n", np.uint8)
    inside = _IS_WORD[data]
    edges = np.flatnonzero(np.diff(inside, prepend=False))  # starts and ends alternate; the last byte is no word
    starts, ends = edges[::2], edges[1::2]
    total = np.cumsum(_BYTES[data] * _powers(_BASE, len(data)))
    before = np.where(starts > 0, total[starts - 1], np.uint64(0))
    hashes = (total[ends - 1] - before) * _powers(pow(_BASE, -1, 1 << 64), len(data))[starts]
    hashes ^= hashes >> np.uint64(32)
    parts = np.ones(len(starts), np.int64)
    single = np.flatnonzero((ends - starts == 3) & (data[starts] >= 0xE0))  # characters of three bytes
    lead, middle, last = (data[starts[single] + place].astype(np.int64) for place in range(3))
    parts[single] = _PARTS[(lead & 0x0F) << 12 | (middle & 0x3F) << 6 | last & 0x3F]
    limits = np.cumsum([len(text) + 1 for text in texts])
    return hashes, parts, np.diff(np.searchsorted(starts, limits), prepend=0)


def _powers(base: int, count: int) -> np.ndarray:
    """base^0 ... base^(count - 1) modulo 2^64."""
    if count > len(_tables.get(base, ())):
        table = np.full(max(count, _WORD_CHUNK), base, np.uint64)
        table[0] = 1
        _tables[base] = np.cumprod(table)
    return _tables[base][:count]


_tables: dict[int, np.ndarray] = {}


def sketch(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """MinHash signatures of the normalised texts that are long enough.

    Returns:
        numbers int64 [n] of the texts with at least `MIN_WORDS` words, and signatures uint32 [n, HASHES].
    """
    words = word_hashes(texts)
    numbers = np.flatnonzero(words.counts >= MIN_WORDS)
    signatures = np.empty((len(numbers), HASHES), np.uint32)
    if not len(numbers):
        return numbers, signatures
    shingles, offsets = _shingles(words)
    counts = np.diff(offsets)[numbers]
    starts = np.concatenate([[0], np.cumsum(counts)])
    inside = np.arange(starts[-1]) - np.repeat(starts[:-1], counts) + np.repeat(offsets[numbers], counts)
    shingles = shingles[inside]
    scratch = np.empty_like(shingles)
    for i in range(HASHES):  # multiply-shift hashing (Dietzfelbinger et al. 1997): the high bits of a*x + b
        np.multiply(shingles, _FACTORS[i], out=scratch)
        np.add(scratch, _OFFSETS[i], out=scratch)
        signatures[:, i] = np.minimum.reduceat(scratch, starts[:-1]) >> np.uint64(32)
    return numbers, signatures


def _shingles(words: Words) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the shingles of texts, one from each word that has enough behind it, and where each text's begin."""
    sizes = np.where(words.parts > 1, SPACELESS_SHINGLE * words.parts, SHINGLE)
    room = np.repeat(words.offsets[1:], np.diff(words.offsets)) - np.arange(len(sizes))
    shingles = np.zeros(len(sizes), np.uint64)
    for size in np.unique(sizes).tolist():
        chosen = np.flatnonzero((sizes == size) & (room >= size))
        shingles[chosen] = windows(words.hashes, size)[chosen]
    enough = room >= sizes
    return shingles[enough], np.concatenate([[0], np.cumsum(enough)])[words.offsets]


def windows(hashes: np.ndarray, size: int) -> np.ndarray:
    """Hash of each window of `size` neighbouring word hashes, uint64 [len(hashes) - size + 1], well mixed."""
    count = max(0, len(hashes) - size + 1)
    mixed = np.zeros(count, np.uint64)
    for i in range(size):
        mixed = (mixed + hashes[i : i + count]) * _MIX[i % 6]
        mixed ^= mixed >> np.uint64(29)
    return mixed


@dataclass(frozen=True)
class SketchBlock:
    """Sketches of some texts, wherever they were made."""

    rows: np.ndarray
    """int64 [texts]: row of each text's sketch in the block, -1 for a text that is too short."""
    signatures: np.ndarray
    """uint32 [sketches, HASHES]."""
    keys: np.ndarray
    """uint64 [BANDS, sketches]: equal where the band's signature rows are."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> SketchBlock:
        """Sketch normalised texts."""
        numbers, signatures = sketch(texts)
        rows = np.full(len(texts), -1, np.int64)
        rows[numbers] = np.arange(len(numbers))
        bands = [_key(signatures[:, band * ROWS : (band + 1) * ROWS]) for band in range(BANDS)]
        return cls(rows, signatures, np.stack(bands))


Odd = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From positions in runs, and where each run begins in them, to a mask: only pairs with an odd one matter."""


def _every(order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.ones(len(order), bool)


class Sketches:
    """Signatures of many texts in files: one of all signatures, and one of keys for each band."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._signatures = (folder / "signatures").open("wb")
        self._bands = [(folder / f"band-{band}").open("wb") for band in range(BANDS)]
        self.count = 0

    def append(self, block: SketchBlock) -> np.ndarray:
        """Take sketches over; returns for each text of the block its row here, int64 [texts]."""
        rows = np.where(block.rows >= 0, block.rows + self.count, -1)
        self.count += len(block.signatures)
        self._signatures.write(block.signatures.tobytes())
        for keys, file in zip(block.keys, self._bands, strict=True):
            file.write(keys.tobytes())
        return rows

    def close(self) -> None:
        """Finish writing; from now on it can be read."""
        for file in (self._signatures, *self._bands):
            file.close()

    def band(self, band: int, rows: np.ndarray) -> np.ndarray:
        """Keys of one band, uint64 [rows]: equal where the band's signature rows are."""
        return np.fromfile(self._folder / f"band-{band}", np.uint64)[rows]

    def similar(self, a: np.ndarray, b: np.ndarray, threshold: float) -> np.ndarray:
        """Whether the estimated Jaccard similarity of rows a[i] and b[i] reaches `threshold`, bool [pairs]."""
        if not len(a):
            return np.zeros(0, bool)
        signatures = np.memmap(self._folder / "signatures", np.uint32, "r").reshape(-1, HASHES)
        parts = [
            (signatures[a[i : i + CHUNK]] == signatures[b[i : i + CHUNK]]).sum(axis=1) for i in range(0, len(a), CHUNK)
        ]
        return np.concatenate(parts) >= threshold * HASHES - 1e-9

    def candidates(self, rows: np.ndarray, odd: Odd = _every) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs of positions in `rows` that agree in a band, in arrays; a pair may come more than once.

        Args:
            odd: asked again and again, so that it can learn from the pairs so far.
        """
        for band in range(BANDS):
            keys = self.band(band, rows)
            order = np.argsort(keys, kind="stable")
            starts = _starts(keys[order])
            sizes = np.diff(starts, append=len(order))
            sizes = np.repeat(sizes, sizes)
            yield from _pairs(keys, order[(sizes > 1) & (sizes <= LARGE_RUN)], odd)
            large = order[sizes > LARGE_RUN]
            for other in range(BANDS):
                if other != band and len(large) and odd(large, _starts(keys[large])).any():
                    both = keys.copy()
                    both[large] = _key(np.stack([keys[large], self.band(other, rows)[large]], axis=1))
                    members = np.sort(large)
                    yield from _pairs(both, members[np.argsort(both[members], kind="stable")], odd)


def _pairs(keys: np.ndarray, order: np.ndarray, odd: Odd) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs with equal keys of which one is odd; `order` sorts the positions by key.

    Each is paired with at most `LARGE_RUN` others on either side. Looking at the odd ones alone makes a run of texts
    that belong together already cost nothing, and one of them with a few others among them little.
    """
    ordered = keys[order]
    starts = _starts(ordered)
    for lag in range(1, min(LARGE_RUN, len(order) - 1) + 1):
        if lag & (lag - 1) == 0:
            strange = odd(order, starts)
            first = second = np.flatnonzero(strange)
        first = first[: np.searchsorted(first, len(order) - lag)]
        first = first[ordered[first] == ordered[first + lag]]
        second = second[np.searchsorted(second, lag) :]
        second = second[ordered[second] == ordered[second - lag]]
        if not (len(first) or len(second)):
            return
        alone = second[~strange[second - lag]]
        yield order[np.concatenate([first, alone - lag])], order[np.concatenate([first + lag, alone])]


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where the runs of equal keys begin."""
    return np.flatnonzero(np.diff(ordered, prepend=~ordered[:1]))


def _key(rows_NR: np.ndarray) -> np.ndarray:
    """One uint64 key for each row of a narrow matrix of unsigned integers."""
    key = np.zeros(len(rows_NR), np.uint64)
    for column in range(rows_NR.shape[1]):
        key = (key + rows_NR[:, column]) * _MIX[column % 6]
        key ^= key >> np.uint64(31)
    return key
