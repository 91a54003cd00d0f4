"""Files that survive a crash: written with a checksum, forced to disk, replaced atomically. Needs no torch."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from lbr_dist.disk import replacing, sync

CHUNK_BYTES = 16 * 2**20

TEMPORARY = ".tmp-"
"""How the name of anything unfinished begins."""


@dataclass(frozen=True)
class Written:
    """Size and checksum of a file as it was written."""

    bytes: int
    xxh128: str


class Sink:
    """A file that counts and checksums what goes into it."""

    def __init__(self, file: BinaryIO):
        self.file, self.bytes, self.hash = file, 0, xxhash.xxh3_128()

    def write(self, data: bytes | memoryview) -> None:
        """Write all of it, in chunks."""
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start : start + CHUNK_BYTES]
            self.file.write(chunk)
            self.hash.update(chunk)
        self.bytes += len(data)


def write_bytes(path: Path, data: bytes) -> Written:
    """Write a small file and force it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        sink = Sink(file)
        sink.write(data)
        flush(file)
    return Written(sink.bytes, sink.hash.hexdigest())


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file that never changes; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb+") as file:
            flush(file)


def replace_bytes(path: Path, data: bytes) -> None:
    """Replace a small file atomically: readers see the old or the new content, never a mixture."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    sync(path.parent)


def flush(file: BinaryIO) -> None:
    """Force a file that is open to disk."""
    file.flush()
    os.fsync(file.fileno())
