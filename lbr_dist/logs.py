"""JSONL logs that a run appends to, read whatever became of their last line.

A killed process leaves half a line, a machine without power also bytes that were never written. What such a line would
have told is lost; what stands before and after it is not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lbr_dist.errors import UserError


def iterate_rows(file: Path, holding: bytes = b"", unreadable: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a log that are JSON objects, in order; none where there is no file.

    Args:
        holding: lines without these bytes are left out unparsed: most of a long log.
        unreadable: gets the numbers of the lines that are none, but for a last one without its line break.
    """
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if holding not in line:
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield row
            elif unreadable is not None and line.endswith(b"\n"):
                unreadable.append(number)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """`iterate_rows` as a list."""
    return list(iterate_rows(file))


def no_rows(file: Path) -> str:
    """Why nothing is read of a log; "" where there is none, or nothing in it yet."""
    if file.is_file():
        return "no line of it can be read" if file.stat().st_size else ""
    if file.is_dir():
        return "is a folder"
    return f"is a link to nothing ({file.readlink()})" if file.is_symlink() else ""


def open_log(file: Path) -> TextIO:
    """A log to append to; what is written reaches the operating system line by line.

    Raises:
        UserError: a folder, or a link to nothing, is in its place.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("a", encoding="utf-8", buffering=1)
    except (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(
            f"{error.filename}: a log has to be written there ({error.strerror}): remove what is in its place, or "
            "bring back what it links to"
        ) from None


def is_torn(file: Path) -> bool:
    """Whether a log ends within a line, so that the next row needs a line break before it."""
    if not file.is_file() or not file.stat().st_size:
        return False
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read() != b"\n"
