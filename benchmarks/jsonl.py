"""Rows of text files, as the benchmarks read and write them: JSONL, gzipped where the name says so."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Literal

Row = dict[str, str]


def open_text(path: Path, mode: Literal["r", "w"]) -> IO[str]:
    """A text file; `.gz` is compressed, without a time stamp, so that the same rows give the same bytes."""
    if path.suffix != ".gz":
        return path.open(mode, encoding="utf-8")
    import io

    if mode == "r":
        return gzip.open(path, "rt", encoding="utf-8")
    return io.TextIOWrapper(gzip.GzipFile(path, "wb", mtime=0), encoding="utf-8")


def read(path: Path) -> list[Row]:
    """All rows of a file."""
    with open_text(path, "r") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, rows: Iterable[Row]) -> int:
    """Write rows; returns how many."""
    count = 0
    with open_text(path, "w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
