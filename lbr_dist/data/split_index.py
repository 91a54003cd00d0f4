"""What is known of the records of a split without reading them: the columns of its index, kept beside the shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash


def record_digest(data: bytes) -> int:
    """What the index keeps of a record's bytes, 32 bits: a changed byte that is still JSON must not be trained on."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


class Ragged:
    """A list of arrays of different lengths, stored flat: `ragged[row]` is a view."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray) -> None:
        self.values, self.offsets = values, offsets

    @classmethod
    def join(cls, lists: Sequence[pa.ListArray]) -> Ragged:
        """The lists of several columns, one behind the other."""
        lengths = [np.diff(column.offsets.to_numpy()) for column in lists]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)])
        return cls(np.concatenate([column.flatten().to_numpy() for column in lists]), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Length of each row, int64 [rows]."""
        return np.diff(self.offsets)

    def counts(self, row_N: np.ndarray) -> np.ndarray:
        """Length of each of these rows, int64 [N]."""
        return self.offsets[row_N + 1] - self.offsets[row_N]

    def take(self, row_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of all that is in these rows, row by row: position of its row in `row_N` (int64), and the value."""
        count_N = self.counts(row_N)
        place_M = np.repeat(np.arange(len(row_N)), count_N)
        return place_M, self.values[self.offsets[row_N][place_M] + within(count_N)]


def within(count_N: np.ndarray) -> np.ndarray:
    """0..count - 1 for each count, one behind the other."""
    return np.arange(count_N.sum()) - np.repeat(np.cumsum(count_N) - count_N, count_N)


@dataclass(frozen=True)
class SplitIndex:
    """What is known of each record of a split without reading it; row i is the i-th record over all shards in order.

    All columns are arrays [rows]; token counts are without special tokens, -1 where a record has no such text.
    """

    shard: np.ndarray
    """int32: number of the shard in the split."""
    offset: np.ndarray
    """int64: where the record's JSON starts in that shard's tar, in bytes."""
    size: np.ndarray
    """int32: bytes of the record's JSON."""
    question_tokens: np.ndarray
    answer_tokens: np.ndarray
    text_tokens: np.ndarray
    answer_hash: np.ndarray
    """int64: hash of the normalised answer (or text): equal for answers that count as the same."""
    tables: tuple[Path, ...] = field(repr=False)
    """The Parquet files behind the columns."""

    def __len__(self) -> int:
        return len(self.offset)

    @cached_property
    def ids(self) -> np.ndarray:
        """Record ids, an object array of str [rows]; read on first use."""
        return np.concatenate([_column(path, "id").to_numpy(zero_copy_only=False) for path in self.tables])

    @cached_property
    def negative_tokens(self) -> Ragged:
        """Token counts of each record's hard negatives; read on first use."""
        return self._ragged("negative_tokens")

    @cached_property
    def positive_tokens(self) -> Ragged | None:
        """Token counts of each record's further positives; None in a set prepared before they were counted."""
        return self._ragged("positive_tokens") if self._has("positive_tokens") else None

    @cached_property
    def domains(self) -> np.ndarray | None:
        """Domain of each record, an object array of str [rows]; None in a set prepared before it was kept."""
        if not self._has("domain"):
            return None
        return np.concatenate([_column(path, "domain").to_numpy(zero_copy_only=False) for path in self.tables])

    @cached_property
    def digests(self) -> np.ndarray | None:
        """`record_digest` of each record, uint32 [rows]; None in a set prepared before it was kept."""
        if not self._has("digest"):
            return None
        return np.concatenate([np.from_dlpack(_column(path, "digest")) for path in self.tables])  # without pandas

    def _has(self, name: str) -> bool:
        return all(name in pq.read_schema(path).names for path in self.tables)

    def _ragged(self, name: str) -> Ragged:
        return Ragged.join([_column(path, name) for path in self.tables])


def read_table(path: Path, columns: list[str]) -> pa.Table:
    """Columns of a Parquet file. (`pq.read_table` would first import data sets and file systems, for half a second.)"""
    with pq.ParquetFile(path) as file:
        return file.read(columns=columns)


def _column(path: Path, name: str) -> Any:
    return read_table(path, [name]).column(name).combine_chunks()
