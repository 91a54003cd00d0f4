"""Source files opened for reading, compressed or not; what was cut short is never taken for whole."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import IO, cast

ENDINGS = (".gz", ".zst", ".bz2", ".xz")
"""What a name ends in, in capitals or not, that stands for compression."""
DAMAGE: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What reading a damaged or truncated compressed file raises."""


def open_file(path: Path, compression: str | None = None) -> IO[bytes]:
    """A buffered stream of the content.

    Args:
        compression: one of `ENDINGS`; another text for none, None for what the path ends in.

    Raises:
        EOFError: a compressed file without a byte; the other kinds of `DAMAGE` come while reading.
    """
    ending = (path.suffix if compression is None else compression).lower()
    if ending in ENDINGS and path.stat().st_size == 0:
        raise EOFError("the compressed file is empty: it was cut short")
    if ending == ".zst":
        import pyarrow as pa  # zstandard's own reader takes a truncated frame for a whole one

        return io.BufferedReader(cast(io.RawIOBase, pa.input_stream(str(path), compression="zstd")), 1 << 20)
    if ending == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if ending == ".bz2":
        return bz2.open(path, "rb")
    if ending == ".xz":
        return lzma.open(path, "rb")
    return path.open("rb", buffering=1 << 20)
