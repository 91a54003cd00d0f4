"""Read records of a prepared set by row: one `pread` each, from a local tar or from the cached copy of a remote one."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr_dist.data import remote
from lbr_dist.errors import UserError

if TYPE_CHECKING:
    from lbr_dist.data.shards import PreparedSet

OPEN_FILES = 64
"""Shards that one reader keeps open."""


class ShardReader:
    """Read records of one split by row.

    Local tars are read in place by offset; remote ones are first copied whole into the cache. Picklable: a loader
    process opens its own files.
    """

    def __init__(
        self, opened: PreparedSet, split: str, cache_dir: str | Path | None = None, cache_gib: float = 20.0
    ) -> None:
        self._open: OrderedDict[int, int] = OrderedDict()
        self.opened, self.split = opened, split
        self.index = opened.index(split)
        self.cache = remote.ShardCache(Path(cache_dir) if cache_dir else remote.default_cache(), cache_gib)
        self._shards = opened.splits[split].shards

    def read(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The records of `rows`, as dicts, in the order asked for.

        Raises:
            UserError: a shard is damaged or cannot be fetched; it is named.
        """
        return [self._read(int(row)) for row in rows]

    def close(self) -> None:
        """Close the open shards; a later `read` opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def _read(self, row: int) -> dict[str, Any]:
        number = int(self.index.shard[row])
        size = int(self.index.size[row])
        data = os.pread(self._descriptor(number), size, int(self.index.offset[row]))
        try:
            if len(data) == size:
                return json.loads(data)
            problem = "is cut off"
        except ValueError as error:
            problem = f"is damaged ({error})"
        address = self.opened.address(self._shards[number].name)
        raise UserError(f"{address}: record {row} {problem}: copy or prepare the set again")

    def _descriptor(self, number: int) -> int:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self._shards[number]
        address = self.opened.address(shard.name)
        if self.opened.is_remote:
            descriptor = self.cache.open(address, size=shard.bytes, xxh128=shard.xxh128)
        else:
            try:
                descriptor = os.open(address, os.O_RDONLY)
            except OSError as error:
                raise UserError(f"{address}: {error.strerror}: the prepared set changed since it was opened") from error
        self._open[number] = descriptor
        if len(self._open) > OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return descriptor
