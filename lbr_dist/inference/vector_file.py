"""Vectors in an array file with a checksum at its end: what `lbr mine` and `lbr search` keep for the next start.

numpy reads the file as any other .npy. It is forced to disk before it gets its name, so a loss of power leaves it whole
or not there; one that was damaged otherwise, or has another's place, is told by its checksum, which covers its name
too, and its owner makes it again.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash

from lbr_dist.disk import replacing, sync

DIGEST_BYTES = xxhash.xxh3_128().digest_size
CHUNK_BYTES = 1 << 20


def write_vectors(file: Path, shape: tuple[int, int], pieces: Iterable[np.ndarray]) -> None:
    """Write vectors, float32 [N, D]; the file appears whole or not at all.

    Args:
        shape: N and D.
        pieces: the vectors in order, [any, D] at a time.

    Raises:
        OSError: it cannot be written.
    """
    header, digest = io.BytesIO(), xxhash.xxh3_128(os.fsencode(file.name))
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    # written, not mapped: on a full disk a mapped page ends the process
    with replacing(file) as temporary, temporary.open("wb") as sink:
        sink.write(header.getvalue())
        digest.update(header.getvalue())
        for piece_ND in pieces:
            data = np.ascontiguousarray(piece_ND, "<f4").reshape(-1).view(np.uint8).data
            sink.write(data)
            digest.update(data)
        sink.write(digest.digest())
    sync(file.parent)


def read_vectors(file: Path, count: int) -> np.ndarray | None:
    """The vectors of a file, memory-mapped float32 [N, D]; None where it is missing, damaged, or N is not `count`."""
    try:
        with file.open("rb") as source:
            left, digest = os.fstat(source.fileno()).st_size - DIGEST_BYTES, xxhash.xxh3_128(os.fsencode(file.name))
            while left > 0 and (chunk := source.read(min(left, CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
            if source.read() != digest.digest():
                return None
        vectors_ND = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return vectors_ND if len(vectors_ND) == count else None
