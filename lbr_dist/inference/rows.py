"""Texts with ids out of any file that `lbr prepare` reads, one row at a time, for encode and search.

Files are opened and decoded, and rows are recognised, where `lbr prepare` does it (data/sources), so that a byte order
mark, an ending in capitals, a file that was cut short or the letter of a right option mean the same to every command.
There a bad row is counted; here it is an error, because a text that is left out of an output would be missed by nobody.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lbr_dist.data.sources.field_names import Finder, listed, reach, value
from lbr_dist.data.sources.fields import Converter
from lbr_dist.data.sources.parts import Source, expand
from lbr_dist.data.sources.readers import rows
from lbr_dist.data.sources.row_values import RowError, blank, identifier, text, type_name, unseen
from lbr_dist.errors import UserError

FIELDS = {
    "query": ("question", "query", "text"),
    "passage": ("answer", "text", "passage", "document"),
}
"""Fields tried in order where rows tell no kind of `lbr prepare`'s: one has a question alone, or an answer."""
ROLES = {"corpus": "text", "question-answer": "answer", "query-document": "document"}
"""What holds a passage in rows of a kind."""


def read_texts(source: Path, side: str, field: str | None = None) -> Iterator[tuple[str, str]]:
    """(id, text) of every row; the id is the row's own, under a name that `lbr prepare` knows, else its number from 0.

    Of a plain text that is the number of its line: lines without text are left out, and counted.

    Args:
        side: query: the question of the record that `lbr prepare` makes of a row; passage: its answer. Either: the text
            of a plain text.
        field: field of the text instead, as `lbr prepare --field` has it behind the `=`: dots lead into objects, commas
            join several.

    The first row is read at once, so that a missing file or field is known before anything else is done.

    Raises:
        UserError: no such file, an unknown ending, no such field, or (while iterating) a row without a text or with
            several, or a file that is damaged.
    """
    found = read_rows(source)
    first = next(found, None)
    if first is None:
        raise UserError(f"{source}: has no rows")
    place, row = first
    if field is not None:
        finder = _choose(row, side, field, source)
        return _texts(chain([first], found), partial(_text, finder=finder))
    recognised = _Recognised(side, place)
    with _named(place):
        recognised.begin(row)
    return _texts(chain([first], found), recognised)


class Place(NamedTuple):
    """Where a row is; as a text for messages: `texts.jsonl: line 3`."""

    source: Path
    unit: str
    number: int
    """From 1, among the units."""
    format: str
    """Of the file; in `text` each line is a row, and has no fields."""

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
        place = Place(source, part.unit, number, part.format)
        if isinstance(row, RowError):
            raise UserError(f"{place}: {row.problem}; repair or remove it")
        yield place, row


class _Recognised:
    """The text of a row for a side, out of the record that `lbr prepare` makes of it."""

    def __init__(self, side: str, place: Place) -> None:
        """`place`: of the first row."""
        self._side, self._source = side, place.source
        kind = "corpus" if place.format == "text" else None
        self._convert = Converter(
            kind, {}, max_chars=sys.maxsize, cells=place.format in ("csv", "tsv"), detected=kind is None
        )
        self._names = Finder({})
        self._alone: Finder | None = None
        """Finds the text of rows that tell no kind."""

    def begin(self, row: Mapping[str, Any]) -> None:
        """See what the first row is.

        Raises:
            RowError: it is none that `lbr prepare` would read.
            UserError: it has no field that is recognised.
        """
        if not self._tells(row):
            self._alone = _choose(row, self._side, None, self._source)

    def __call__(self, row: Mapping[str, Any]) -> str:
        """The text.

        Raises:
            RowError: there is none, or several.
        """
        if self._alone is not None and not self._tells(row):
            return _text(row, self._alone)
        row = self._one(row)
        if self._side == "query" and (question := self._convert.question_alone(row)) is not None:
            return question.document
        try:
            record = self._convert(row)
        except RowError as error:
            if error.reason == "empty" and (empty := self._unseen(row)) is not None:
                return empty
            raise
        return record.document

    def _tells(self, row: Mapping[str, Any]) -> bool:
        """Whether the kind of the rows is known, from this one at the latest."""
        if self._convert.kind is None:
            try:
                self._convert.kind = self._convert.detect(row)
            except RowError as error:
                if error.reason != "missing_field" or self._names.find(row, "options"):
                    raise
        return self._convert.kind is not None

    def _one(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with one question; of several with one answer, which is asked for, the first."""
        if self._convert.kind == "corpus":
            return row
        found, *more = self._convert.questions(row)
        if isinstance(found, RowError):
            raise found
        if more and self._side == "query":
            raise RowError(
                "wrong_type",
                f"the row has {len(more) + 1} questions, of which `lbr prepare` makes as many records: write a row for "
                "each, as a row has one vector",
            )
        return found

    def _unseen(self, row: Mapping[str, Any]) -> str | None:
        """The side's text where nothing can be seen of it; such a one has a vector too."""
        kind = self._convert.kind or ""
        role = "question" if self._side == "query" and kind != "corpus" else ROLES.get(kind)
        names = self._names.find(row, role) if role else None
        found = value(row, names) if names else None
        return found if isinstance(found, str) and unseen(found) else None


def _texts(
    found: Iterator[tuple[Place, Mapping[str, Any]]], text_of: Callable[[Mapping[str, Any]], str]
) -> Iterator[tuple[str, str]]:
    ids = Finder({})
    for number, (place, row) in enumerate(found):
        with _named(place):
            names = ids.find(row, "id")
            own = identifier(value(row, names)) if names else None
            item = own or str(place.number - 1 if place.format == "text" else number), text_of(row)
        yield item


@contextlib.contextmanager
def _named(place: Place) -> Iterator[None]:
    """Turn what is wrong with a row into an error of the user that names the place."""
    try:
        yield
    except RowError as error:
        whose = "`lbr prepare` would say: " * ("--" in error.problem)  # the flags are its
        raise UserError(f"{place}: {whose}{error.problem}; repair the row, or name another --field") from None


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
