"""JSONL logs that a run appends to, read whatever became of their last line.

A killed process leaves half a line, a machine without power also bytes that were never written. What such a line would
have told is lost; what stands before and after it is not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def iterate_rows(file: Path, holding: bytes = b"") -> Iterator[dict[str, Any]]:
    """The lines of a log that are JSON objects, in order; none where there is no file.

    Args:
        holding: lines without these bytes are left out unparsed: most of a long log.
    """
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for line in lines:
            if holding not in line:
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def read_rows(file: Path) -> list[dict[str, Any]]:
    """`iterate_rows` as a list."""
    return list(iterate_rows(file))


def is_torn(file: Path) -> bool:
    """Whether a log ends within a line, so that the next row needs a line break before it."""
    if not file.is_file() or not file.stat().st_size:
        return False
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read() != b"\n"
