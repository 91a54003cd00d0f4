"""Source files opened for reading, compressed or not; what was cut short or damaged is never taken for whole."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

ENDINGS = (".gz", ".zst", ".bz2", ".xz")
"""What a name ends in, in capitals or not, that stands for compression."""
DAMAGE: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What reading a damaged or truncated compressed file raises."""
CHUNK = 1 << 16
"""Compressed bytes that are read at once."""


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

        file = path.open("rb")  # pyarrow opens no name that is not UTF-8
        return _buffered(pa.input_stream(file, compression="zstd"))
    if ending == ".gz":
        return _buffered(_Streams(path.open("rb"), _Gzip, padded=True))
    if ending == ".bz2":
        return _buffered(_Streams(path.open("rb"), bz2.BZ2Decompressor, padded=False))
    if ending == ".xz":
        return _buffered(_Streams(path.open("rb"), lzma.LZMADecompressor, padded=True))
    return path.open("rb", buffering=1 << 20)


def _buffered(raw: Any) -> IO[bytes]:
    return io.BufferedReader(cast(io.RawIOBase, raw), 1 << 20)


class _Streams(io.RawIOBase):
    """What a file's compressed streams hold, one after another, each of them whole.

    Python's own readers take what follows the first stream, and is none, for the end of the file.

    Args:
        file: closed with this.
        decompressor: makes one for a stream, with the interface of `bz2.BZ2Decompressor`.
        padded: zeros may stand at the end of the file, as the formats of gzip and xz allow.
    """

    def __init__(self, file: IO[bytes], decompressor: Callable[[], Any], *, padded: bool) -> None:
        self._file, self._new, self._padded = file, decompressor, padded
        self._one = decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = b""
        while not found:
            data = b""
            if self._one.eof:
                if not (data := self._behind()):
                    return 0
                self._one = self._new()
            elif self._one.needs_input and not (data := self._file.read(CHUNK)):
                raise EOFError("it was cut short")
            found = self._one.decompress(data, len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _behind(self) -> bytes:
        """First bytes of the next stream; empty: there is none."""
        data = self._one.unused_data or self._file.read(CHUNK)
        if self._padded and data.startswith(b"\0"):
            while data and not data.strip(b"\0"):
                data = self._file.read(CHUNK)
            if data:
                raise OSError("zeros stand where a part of it was")
        return data


class _Gzip:
    """Decompressor of one gzip stream, which bz2 and lzma have and zlib has in another form."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, most: int) -> bytes:
        found = self._zlib.decompress(self._zlib.unconsumed_tail + data, most)
        self.needs_input = len(found) < most
        return found
