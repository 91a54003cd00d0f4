"""The order of samples: shuffles that are pure functions of a key, and the mixture of several sets.

A shuffle here is a sort by hashed positions, not a call to a random generator: it gives the same order with every
version of numpy, and any part of an epoch can be computed without computing what comes before. Nothing is stored per
sample: a pass over a set is a permutation of its shards, then of blocks of neighbouring rows within a span of rows (so
that a window of the epoch touches a bounded number of shards), and both are recomputed for the range that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import xxhash


def key64(*parts: int | str) -> int:
    """64-bit hash of a tuple of integers and strings."""
    return xxhash.xxh64_intdigest(repr(parts).encode())


def mix64(values_N: np.ndarray, key: int) -> np.ndarray:
    """Keyed 64-bit hash of integers (the splitmix64 finaliser, Steele et al. 2014): uint64, elementwise."""
    with np.errstate(over="ignore"):
        mixed = np.asarray(values_N).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def uniform(values_N: np.ndarray, key: int) -> np.ndarray:
    """Keyed hash of integers to float64 in [0, 1)."""
    return (mix64(values_N, key) >> np.uint64(11)) * (1.0 / (1 << 53))


def shuffled(count: int, *key: int | str) -> np.ndarray:
    """A permutation of 0..count - 1 that depends on nothing but its arguments."""
    return np.argsort(mix64(np.arange(count), key64(*key)), kind="stable")


class Stream:
    """Endless passes over the rows of one set: position p lies in pass p // rows."""

    def __init__(self, rows_N: np.ndarray | None, shard_N: np.ndarray, *, block: int, span: int, key: int) -> None:
        """Order the rows.

        Args:
            rows_N: rows of the index that are used, ascending; None: all.
            shard_N: shard of each used row, ascending.
            block: neighbouring rows that stay together.
            span: rows within which blocks are shuffled; whole shards are shuffled above that.
            key: seed of this set's order.
        """
        self.rows_N = rows_N
        self.count = len(shard_N)
        starts = np.flatnonzero(np.diff(shard_N, prepend=-1)) if self.count else np.zeros(0, dtype=np.int64)
        self._starts = starts
        self._sizes = np.diff(np.append(starts, self.count))
        self._block, self._span, self._key = block, span, key

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """row_N (rows of the index) and pass_N (which pass each belongs to) at positions start..stop - 1."""
        rows, passes = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        position = start
        while position < stop:
            number, low = divmod(position, self.count)
            high = min(self.count, low + stop - position)
            virtual_N = self._blocks(number, low, high)
            rows.append(self._unshuffle_shards(number, virtual_N))
            passes.append(np.full(high - low, number, dtype=np.int64))
            position += high - low
        row_N = np.concatenate(rows)
        return (row_N if self.rows_N is None else self.rows_N[row_N]), np.concatenate(passes)

    def _blocks(self, number: int, low: int, high: int) -> np.ndarray:
        """Positions low..high - 1 of a pass after the block permutation, as positions in the permuted shards."""
        parts = []
        for span in range(low // self._span, -(-high // self._span)):
            begin, end = span * self._span, min(self.count, (span + 1) * self._span)
            order = shuffled(-(-(end - begin) // self._block), self._key, "blocks", number, span)
            inside_N = (order[:, None] * self._block + np.arange(self._block)).ravel()
            inside_N = inside_N[inside_N < end - begin] + begin
            parts.append(inside_N[max(0, low - begin) : high - begin])
        return np.concatenate(parts)

    def _unshuffle_shards(self, number: int, virtual_N: np.ndarray) -> np.ndarray:
        order = shuffled(len(self._sizes), self._key, "shards", number)
        ends = np.cumsum(self._sizes[order])
        at_N = np.searchsorted(ends, virtual_N, side="right")
        return self._starts[order][at_N] + virtual_N - (ends - self._sizes[order])[at_N]


class Mixture:
    """Several streams with weights: epoch e takes passes e * weight to (e + 1) * weight of each, evenly interleaved.

    So weight 0.5 uses one half of a set in even epochs and the other half in odd ones, and weight 2 every sample twice.
    """

    def __init__(
        self, streams: Sequence[Stream], weights: Sequence[float], carried: Sequence[Fraction] | None = None
    ) -> None:
        """Mix.

        Args:
            streams: one for each set.
            weights: of each.
            carried: part of a sample, from 0 up to 1, that each is ahead from the start; default: none.
        """
        self.streams = streams
        self.weights = [Fraction(str(weight)) for weight in weights]  # exact: ten epochs of 0.1 are one pass
        self._carried = carried or [Fraction(0)] * len(streams)

    def _ranges(self, epoch: int) -> list[tuple[int, int]]:
        return [
            (int(epoch * weight * stream.count + carried), int((epoch + 1) * weight * stream.count + carried))
            for stream, weight, carried in zip(self.streams, self.weights, self._carried, strict=True)
        ]

    def size(self, epoch: int) -> int:
        """Samples of an epoch."""
        return sum(stop - start for start, stop in self._ranges(epoch))

    def take(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """set_N, row_N, pass_N at positions start..stop - 1 of an epoch, sets one after the other.

        A position holds no particular set: of any range each set has its share, to within one sample.
        """
        ranges = self._ranges(epoch)
        lows, highs = _shares(ranges, start), _shares(ranges, stop)
        sets, rows, passes = [], [], []
        for number, ((begin, _), low, high) in enumerate(zip(ranges, lows, highs, strict=True)):
            row_N, pass_N = self.streams[number].take(begin + low, begin + high)
            sets.append(np.full(len(row_N), number, dtype=np.int64))
            rows.append(row_N)
            passes.append(pass_N)
        return np.concatenate(sets), np.concatenate(rows), np.concatenate(passes)


def _shares(ranges: Sequence[tuple[int, int]], position: int) -> list[int]:
    """How many of the first `position` samples of an epoch belong to each set: monotone, and they add up."""
    left = sum(stop - start for start, stop in ranges)
    shares = []
    for start, stop in ranges:
        rest = left - (stop - start)
        others = position * rest // left if left else 0
        shares.append(position - others)
        position, left = others, rest
    return shares
