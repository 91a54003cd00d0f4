"""The checked records between the two passes of a preparation: in files, one for each block, read again by number.

A block is two files, the records and the numbers of them, which come last and commit it. Committing does not wait for
the disk; instead, what an earlier run committed is compared with its checksums before it is used.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lbr_dist.data.record import Record
from lbr_dist.disk import file_xxh128

OPEN_FILES = 64
"""Files that are kept open at a time."""


def records_file(numbers: Path) -> Path:
    """The file of a block's records, beside that of its numbers."""
    return numbers.with_suffix(".records")


def commit(numbers: Path, arrays: dict[str, Any]) -> None:
    """Write the numbers of a block whose records are written; it counts from now on."""
    temporary = numbers.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays, checksum=_checksum(numbers))
    temporary.replace(numbers)


def is_committed(numbers: Path) -> bool:
    """Whether a block is there as it was committed: of a machine that lost its power, less may have stayed."""
    try:
        with np.load(numbers) as arrays:
            known = {name: arrays[name] for name in arrays.files}  # to the end of each, where its own checksum is
        return np.array_equal(known["checksum"], _checksum(numbers))
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile):
        return False


def _checksum(numbers: Path) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(file_xxh128(records_file(numbers))), np.uint8)


class Spool:
    """Records by number, counted over the files in order."""

    def __init__(self, files: Sequence[Path], sizes: Sequence[np.ndarray]) -> None:
        """Take the files and the sizes in bytes of the records in each."""
        self._files, self._reader = list(files), _Reader()
        self._first = np.cumsum([0, *(len(of_file) for of_file in sizes)])
        self._offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *sizes]))])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> Record:
        return next(self.take(np.array([number])).records(self._reader))

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each record's JSON, int64 [records]."""
        return np.diff(self._offsets)

    def take(self, numbers: np.ndarray) -> SpoolSlice:
        """Some records, to be read here or elsewhere."""
        file_N = np.searchsorted(self._first, numbers, side="right") - 1
        used, file_N = np.unique(file_N, return_inverse=True)
        start_N = self._offsets[numbers] - self._offsets[self._first[used[file_N]]]
        files = [self._files[number] for number in used.tolist()]
        return SpoolSlice(files, file_N, start_N, self._offsets[numbers + 1] - self._offsets[numbers])

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


@dataclass(frozen=True)
class SpoolSlice:
    """Where N records are; small enough to be sent to another process."""

    files: list[Path]
    file_N: np.ndarray
    start_N: np.ndarray
    size_N: np.ndarray

    def __len__(self) -> int:
        return len(self.file_N)

    def records(self, reader: _Reader | None = None) -> Iterator[Record]:
        """The records in order."""
        own = reader or _Reader()
        places = zip(self.file_N.tolist(), self.start_N.tolist(), self.size_N.tolist(), strict=True)
        try:
            for file, start, size in places:
                yield Record.from_dict(json.loads(own.read(self.files[file], start, size)))
        finally:
            if reader is None:
                own.close()


class _Reader:
    """Reads pieces of many files, the latest of which stay open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, start: int, size: int) -> bytes:
        """Bytes of a file."""
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = os.open(path, os.O_RDONLY)
            if len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        return os.pread(self._open[path], size, start)

    def close(self) -> None:
        """Close all."""
        while self._open:
            os.close(self._open.popitem()[1])
