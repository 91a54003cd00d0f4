"""Rows of a CSV or TSV file, where one wrong quote costs one row and never those behind it.

A quote that is opened and not closed makes a reader take all that follows for one cell. Here a row that does not end as
it must, or runs over very many lines, or over several with another number of cells than the header, is bad, and reading
goes on with the line after the one on which it began. A line without any text in its cells, as spreadsheets write them,
is a blank one.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import IO, Any

from lbr_dist.data.row_values import RowError

SEPARATORS = ";\t|"
"""Taken for the comma of a CSV file (or the tab of a TSV file) whose header has none."""
MOST_LINES = 1000
"""Lines that the cells of one row may hold."""


class _Lines:
    """The lines of a text, one at a time, which can be gone back to."""

    def __init__(self, text: Iterator[str]) -> None:
        self._text, self._again = text, deque[str]()
        self.number = 0
        """Of the line that was handed out last, from 1."""
        self.taken: list[str] = []
        """Lines handed out since `taken` was last cleared."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if len(self.taken) == MOST_LINES:
            raise csv.Error(f"a cell runs over more than {MOST_LINES} lines")
        line = self._again.popleft() if self._again else next(self._text)
        self.number += 1
        self.taken.append(line)
        return line

    def back(self) -> None:
        """Go back to the line behind the first of `taken`."""
        self._again.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1


def csv_rows(file: IO[bytes], delimiter: str) -> Iterator[tuple[int, Mapping[str, Any] | RowError]]:
    """Rows by the names in the header, each with the number of its first line (from 1); a short line has fewer fields.

    Args:
        file: buffered, at its beginning.
        delimiter: what separates cells, unless the header has only one of `SEPARATORS`.

    Raises:
        ValueError: the header cannot be read, or names a field twice.
    """
    csv.field_size_limit(1 << 30)
    start = file.peek(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip(b"\r\n")  # type: ignore[attr-defined]
    header = start.split(b"\n", 1)[0].decode("utf-8", "replace")
    if delimiter not in header:
        delimiter = next((other for other in SEPARATORS if other in header), delimiter)
    lines = _Lines(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(filter(any, reader), [])]
    except csv.Error as error:
        raise ValueError(f"its header: {error}") from None
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise ValueError(f"its header names {twice[0]!r} twice")
    while True:
        lines.taken.clear()
        first = lines.number + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            lines.back()
            yield first, RowError("wrong_type", f"not a CSV row: is a quote missing or not doubled? ({error})")
            continue
        if cells is None:
            return
        if len(cells) != len(names) and len(lines.taken) > 1:
            lines.back()
            problem = f"{len(cells)} cells over several lines, the header has {len(names)}"
            yield first, RowError("wrong_type", f"not a CSV row: is a quote missing or not doubled? ({problem})")
        elif len(cells) > len(names):
            yield first, RowError("wrong_type", f"the line has {len(cells)} cells, more than the header: {len(names)}")
        elif any(cells):
            yield first, dict(zip(names, cells, strict=False))
