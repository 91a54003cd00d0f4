"""Read records of a prepared set by row: one `pread` each, from a local tar or from the cached copy of a remote one."""

from __future__ import annotations

import errno
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lbr_dist.data import remote
from lbr_dist.data.split_index import record_digest
from lbr_dist.disk import cache_folder
from lbr_dist.errors import UserError

if TYPE_CHECKING:
    from lbr_dist.data.shards import PreparedSet

REMEDY = "copy the set again, or prepare it with --overwrite"
"""What helps where a file of a set is damaged: without --overwrite nothing but its size is looked at."""
OPEN_FILES = 256
"""Shards that all readers of a process keep open: a quarter of the files that it may usually have open."""
NO_MORE_FILES = (errno.EMFILE, errno.ENFILE)
"""Errors of a process, or a machine, that has as many files open as it may."""
STORAGE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV, errno.ENXIO)
"""Faults of storage, that may be over when the run is started again."""


class ShardReader:
    """Read records of one split by row.

    Local tars are read in place by offset; remote ones are first copied whole into the cache. Picklable: a loader
    process opens its own files.
    """

    _open: ClassVar[OrderedDict[tuple[int, int], int]] = OrderedDict()
    """Descriptors of all readers of the process, by reader and number of the shard; the last one read is last."""

    def __init__(
        self, opened: PreparedSet, split: str, cache_dir: str | Path | None = None, cache_gib: float = 20.0
    ) -> None:
        self.opened, self.split = opened, split
        self.index = opened.index(split)
        self.cache = remote.ShardCache(Path(cache_dir) if cache_dir else cache_folder("shards"), cache_gib)
        self._shards = opened.splits[split].shards

    def read(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The records of `rows`, as dicts, in the order asked for.

        Raises:
            UserError: a shard is damaged or cannot be fetched; it is named.
            OSError: storage failed; the shard is named.
        """
        return [self._read(int(row)) for row in rows]

    def close(self) -> None:
        """Close the open shards; a later `read` opens them again."""
        for key in [key for key in self._open if key[0] == id(self)]:
            os.close(self._open.pop(key))

    def __del__(self) -> None:
        self.close()

    def _read(self, row: int) -> dict[str, Any]:
        number = int(self.index.shard[row])
        data, problem = self._record(row, number)
        if problem and self.opened.is_remote:  # the copy in the cache: its disk, or a machine that lost its power
            os.close(self._open.pop((id(self), number)))
            self.cache.discard(self._shards[number].xxh128)
            data, problem = self._record(row, number)
        if problem:
            raise UserError(f"{self._address(number)}: record {row} {problem}: {REMEDY}")
        return data

    def _record(self, row: int, number: int) -> tuple[dict[str, Any], str]:
        """A record, and what is wrong with it."""
        descriptor, size = self._descriptor(number), int(self.index.size[row])
        try:
            data = os.pread(descriptor, size, int(self.index.offset[row]))
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._address(number)) from error
        if len(data) != size:
            return {}, "is cut off"
        digests = self.index.digests
        if digests is not None and record_digest(data) != digests.item(row):
            return {}, "is damaged (its bytes changed)"
        try:
            return json.loads(data), ""
        except ValueError as error:
            return {}, f"is damaged ({error})"

    def _address(self, number: int) -> str:
        return self.opened.address(self._shards[number].name)

    def _descriptor(self, number: int) -> int:
        key = id(self), number
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        descriptor = self._newly_opened(number)
        if self.opened.is_remote:
            self._close_evicted()
        self._open[key] = descriptor
        if len(self._open) > OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def _newly_opened(self, number: int) -> int:
        shard, address = self._shards[number], self._address(number)
        try:
            if self.opened.is_remote:
                return self.cache.open(address, size=shard.bytes, xxh128=shard.xxh128)
            return os.open(address, os.O_RDONLY)
        except OSError as error:
            if error.errno in NO_MORE_FILES and self._open:
                while self._open:
                    os.close(self._open.popitem()[1])
                return self._newly_opened(number)
            if error.errno in NO_MORE_FILES:
                raise UserError(f"{address}: {error.strerror}: raise the limit (`ulimit -n`)") from error
            if self.opened.is_remote or error.errno in STORAGE:
                raise
            raise UserError(f"{address}: {error.strerror}: the prepared set changed since it was opened") from error

    def _close_evicted(self) -> None:
        """Close what is in the cache no more: as long as it is open, its space on the disk is not free."""
        for key, descriptor in list(self._open.items()):
            if os.fstat(descriptor).st_nlink == 0:
                os.close(self._open.pop(key))
