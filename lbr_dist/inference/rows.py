"""Texts with ids out of any file that `lbr prepare` reads, one row at a time, for encode and search.

Files are opened and decoded where `lbr prepare` does it (data/sources), so that a byte order mark, an ending in
capitals or a file that was cut short mean the same to every command. There a bad row is counted; here it is an error,
because a text that is left out of an output would be missed by nobody.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lbr_dist.data.sources.field_names import Finder, listed, reach, value
from lbr_dist.data.sources.parts import Source, expand
from lbr_dist.data.sources.readers import rows
from lbr_dist.data.sources.row_values import RowError, blank, identifier, text, type_name, unseen
from lbr_dist.errors import UserError

FIELDS = {
    "query": ("question", "query", "text"),
    "passage": ("answer", "text", "passage", "document"),
}
"""Fields tried in order where the user names none."""


def read_texts(source: Path, side: str, field: str | None = None) -> Iterator[tuple[str, str]]:
    """(id, text) of every row; the id is the row's own, under a name that `lbr prepare` knows, else its number from 0.

    Of a plain text that is the number of its line: lines without text are left out, and counted.

    Args:
        field: field of the text, as `lbr prepare --field` has it behind the `=`: dots lead into objects, commas join
            several.

    The first row is read at once, so that a missing file or field is known before anything else is done.

    Raises:
        UserError: no such file, an unknown ending, no such field, or (while iterating) a row without a text, or a file
            that is damaged.
    """
    found = read_rows(source)
    first = next(found, None)
    if first is None:
        raise UserError(f"{source}: has no rows")
    return _texts(chain([first], found), _choose(first[1], side, field, source))


class Place(NamedTuple):
    """Where a row is; as a text for messages: `texts.jsonl: line 3`."""

    source: Path
    unit: str
    number: int
    """From 1, among the units."""
    plain: bool
    """Whether each line is a row, and has no fields."""

    def __str__(self) -> str:
        return f"{self.source}: {self.unit} {self.number}"


def read_rows(source: Path) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """(place, row) of every row of a file.

    Raises:
        UserError: no such file, an unknown ending, or (while iterating) a row or a file that cannot be read.
    """
    if not source.is_file():
        raise UserError(f"{source}: {'is not a file' if source.exists() else 'no such file'}")
    [part] = expand(Source(str(source)), source.parent)
    for number, row in rows(part):
        place = Place(source, part.unit, number, part.format == "text")
        if isinstance(row, RowError):
            raise UserError(f"{place}: {row.problem}; repair or remove it")
        yield place, row


def _texts(found: Iterator[tuple[Place, Mapping[str, Any]]], finder: Finder) -> Iterator[tuple[str, str]]:
    for number, (place, row) in enumerate(found):
        try:
            names = finder.find(row, "id")
            own = identifier(value(row, names)) if names else None
            item = own or str(place.number - 1 if place.plain else number), _text(row, finder)
        except RowError as error:
            raise UserError(f"{place}: {error.problem}; repair the row, or name another --field") from None
        yield item


def _text(row: Mapping[str, Any], finder: Finder) -> str:
    names = finder.find(row, "text")
    if names is None:
        raise RowError("wrong_type", f"field {finder.fields['text']!r} is missing")
    parts = [_part(reach(row, name), name) for name in names if len(names) == 1 or not blank(reach(row, name))]
    return "\n".join(parts)


def _part(found: Any, name: str) -> str:
    if not isinstance(found, str):
        what = "null" if found is None else f"{type_name(found)}, not a text"
        raise RowError("wrong_type", f"field {name!r} is {what}")
    return found if unseen(found) else text(found, name, sys.maxsize)


def _choose(row: Mapping[str, Any], side: str, field: str | None, source: Path) -> Finder:
    """A finder of the field that holds the text."""
    tried = (field,) if field is not None else FIELDS[side]
    lower = {str(name).lower(): str(name) for name in reversed(list(row))}
    for name in tried:
        finder = Finder({"text": name if field is not None else lower.get(name, name)})
        if finder.find(row, "text"):
            return finder
    remedy = "name one with --field"
    if field is not None and "=" in field:  # as `lbr prepare` has it
        remedy = f"give the name alone: --field {field.partition('=')[2]}"
    raise UserError(
        f"{source}: no field {' or '.join(repr(name) for name in tried)} in its first row, which has {listed(row)}; "
        f"{remedy}"
    )
