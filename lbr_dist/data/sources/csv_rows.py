"""Rows of a CSV or TSV file, where one wrong quote costs one row and never those behind it.

A quote that is opened and not closed makes a reader take all that follows for one cell. Here a row that does not end as
it must, or is very long, or runs over several lines with another number of cells than the header, is bad, and reading
goes on with the line after the one on which it began. In a TSV file, where many writers quote nothing, so is a row over
several lines each of which is a row by itself: `"yes` and a later `no"` would make one of two. Lines are read twice
where quotes are wrong, mostly up to the next quote; what files of many such rows cost is bounded. A line without any
text in its cells, as spreadsheets write them, is a blank one.
"""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import IO, Any

from lbr_dist.data.sources.field_names import check_distinct
from lbr_dist.data.sources.row_values import RowError

SEPARATORS = ";\t|"
"""Taken for the comma of a CSV file (or the tab of a TSV file) whose header has none."""
SAID = re.compile(r"sep=([^\w\s\"']|\t)\r?$", re.IGNORECASE)
"""A first line in which Excel says what separates cells."""
MOST = 1 << 23
"""Characters that a row of several lines may hold."""
LEAST = 1 << 18
"""The same, where so many characters were read in vain that going on so would take very long."""
IN_VAIN = 1 << 26
"""Characters that may be read in vain, besides as many as the good rows hold, before `LEAST` applies."""
NULL = r"\N"
"""What databases write into a cell of nothing."""
LINE = 16
"""Characters that a line counts for at least: a short one takes four times as much memory."""


class _Lines:
    """The lines of a text, one at a time, which can be gone back to."""

    def __init__(self, text: Iterator[str]) -> None:
        self._text, self._again = text, deque[str]()
        self.number = 0
        """Of the line that was handed out last, from 1."""
        self.taken: list[str] = []
        """Lines handed out since the row began."""
        self._size, self._most, self._patience = 0, MOST, IN_VAIN

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self._size > self._most:
            raise csv.Error(f"it runs over more than {len(self.taken)} lines")
        line = self._again.popleft() if self._again else next(self._text)
        self.number += 1
        self.taken.append(line)
        self._size += max(len(line), LINE)
        return line

    def begin(self) -> None:
        """A row begins at the next line."""
        self._patience += self._size
        self.taken.clear()
        self._size, self._most = 0, min(MOST, max(LEAST, self._patience))

    def back(self) -> None:
        """Go back to the line behind the first of `taken`."""
        self._again.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1
        self._patience -= self._size
        self._size = 0


def csv_rows(file: IO[bytes], delimiter: str) -> Iterator[tuple[int, Mapping[str, Any] | RowError]]:
    """Rows by the names in the header, each with the number of its first line (from 1); a short line has fewer fields.

    Args:
        file: buffered, at its beginning.
        delimiter: what separates cells, unless the file says so (`SAID`), or the header has only one of `SEPARATORS`.

    Raises:
        ValueError: the header cannot be read, or names a field twice.
    """
    csv.field_size_limit(1 << 30)
    start = file.peek(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n")  # type: ignore[attr-defined]
    header = start.split(b"\n", 1)[0].decode("utf-8", "replace")
    if said := SAID.match(header):
        delimiter = said[1]
    elif delimiter not in header:
        delimiter = next((other for other in SEPARATORS if other in header), delimiter)
    lines = _Lines(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        if said:
            next(filter(any, reader))
        names = _names(next(filter(any, reader), []))
    except csv.Error as error:
        raise ValueError(f"its header: {error}") from None
    check_distinct(filter(None, names), "its header names")
    while True:
        lines.begin()
        first = lines.number + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            lines.back()
            yield first, RowError("wrong_type", f"not a CSV row: is a quote missing or not doubled? ({error})")
            continue
        if cells is None:
            return
        while len(cells) > len(names) and not cells[-1]:
            cells.pop()
        unlike = len(cells) != len(names)
        if len(lines.taken) > 1 and (unlike or _are_rows(lines.taken, delimiter, len(names))):
            lines.back()
            each = "" if unlike else "; each line has as many"
            problem = f"{len(cells)} cells over several lines, the header has {len(names)}{each}"
            yield first, RowError("wrong_type", f"not a CSV row: is a quote missing or not doubled? ({problem})")
        elif len(cells) > len(names):
            yield first, RowError("wrong_type", f"the line has {len(cells)} cells, more than the header: {len(names)}")
        elif _names(cells) == names:
            yield first, RowError("wrong_type", "the names of the columns again: were files joined? Leave them out")
        elif any(cells):
            values = [None if cell == NULL else cell for cell in cells] if NULL in cells else cells
            yield first, dict(zip(names, values, strict=False))


def _are_rows(lines: list[str], delimiter: str, cells: int) -> bool:
    """Whether each line is a row by itself where quotes mean nothing; what is indented by tabs, as code, is none."""
    return (
        delimiter == "\t"
        and cells > 1
        and all(line.count("\t") == cells - 1 and not line.startswith("\t") for line in lines)
    )


def _names(cells: list[str]) -> list[str]:
    return [cell.removeprefix("\ufeff").strip() for cell in cells]
