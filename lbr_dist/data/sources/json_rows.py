"""Rows of JSON files, in the forms that data sets and their tools write.

    [{...}, {...}]    {"data": [{...}, ...]}                        an array, or one under a usual name
    {"columns": ["question", ...], "data": [[...], ...]}            pandas, orient="split"
    {"question": {"0": ..., "1": ...}, "answer": {...}}             pandas as it is
    {"question": [...], "answer": [...]}                            columns
    {"21645374": {...}, "16418930": {...}}                          rows by id: PubMedQA; pandas, orient="index"
    {"paragraphs": [{"context": ..., "qas": [{...}, ...]}, ...]}    SQuAD, MRQA: a row for each question

A file without any of them holds JSON lines, as many do that are named `.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import IO, Any

from lbr_dist.data.sources.chat import CONVERSATIONS
from lbr_dist.data.sources.field_names import NAMES, RECOGNISED, check_distinct
from lbr_dist.data.sources.parts import Part
from lbr_dist.data.sources.row_values import CONVERT, RowError, blank

ARRAYS = ("data", "rows", "examples", "records", "items", "questions")
"""Names under which a JSON file's object may hold its array of rows."""
NESTED = ("paragraphs", "qas")
"""Fields that hold rows of their own, from the outside to the inside."""

Row = Mapping[str, Any] | RowError
Numbered = Iterator[tuple[int, Row]]
"""Rows, or what is wrong with them, each with its line, row or sample number (from 1)."""


def json_lines(file: IO[bytes]) -> Numbered:
    """A row, or the rows nested in it, per line."""
    for number, line in enumerate(file, 1):
        if not line.isspace():
            for row in _nested(json_object(line)):
                yield number, row


def json_rows(part: Part) -> Numbered:
    """Rows of a whole document, held in memory; else JSON lines.

    Raises:
        ValueError: an array, or an object that is no line among lines, is not JSON.
    """
    with part.open() as file:
        lines = (start for line in file if (start := line.removeprefix(b"\xef\xbb\xbf").strip()))
        first, second = next(lines, b""), next(lines, b"")
    items: Any = None
    if first[:1] == b"[":
        items = _document(part)
    elif first[:1] == b"{" and not (second and is_line(first)):
        try:
            items = _items(_document(part))
        except (ValueError, RecursionError):
            if not is_line(second):  # else the first of lines is damaged, and no more
                raise
    if items is None:
        with part.open() as file:
            yield from json_lines(file)
        return
    for number, item in enumerate(items, 1):
        for row in _nested(item if isinstance(item, dict) else RowError("wrong_type", "the item is not a JSON object")):
            yield number, row


def json_object(data: bytes) -> Row:
    """The object that these bytes are, or what is wrong with them."""
    try:
        row = _decoded(data)
    except UnicodeDecodeError as error:
        return RowError("invalid_utf8", f"byte {error.start}{CONVERT}")
    except json.JSONDecodeError as error:
        return RowError("invalid_json", f"{error.msg}, at character {error.pos}: one whole object is expected")
    except (ValueError, RecursionError) as error:
        return RowError("invalid_json", str(error))
    return row if isinstance(row, dict) else RowError("wrong_type", "the line is not a JSON object")


_TWICE = "an object has the key"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        check_distinct((name for name, _ in pairs), _TWICE)
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_distinct)


def _decoded(data: bytes) -> Any:
    """What these bytes are in JSON.

    Raises:
        ValueError: they are none, or an object in it has a key twice.
    """
    return _DECODER.decode(data.decode("utf-8-sig"))


def is_line(line: bytes) -> bool:
    """Whether a line is an object by itself, if one that has a key twice."""
    row = json_object(line)
    return not isinstance(row, RowError) or _TWICE in row.detail


def _document(part: Part) -> Any:
    """What a whole file is in JSON; fails as `_decoded` does."""
    with part.open() as file:
        content = file.read()
    try:
        return _decoded(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8{CONVERT}") from None


def _items(document: Mapping[str, Any]) -> list[Any]:
    """The rows of a document that is one object; itself, where it is none of the forms."""
    values = list(document.values())
    for name in ARRAYS:
        held, columns = document.get(name), document.get("columns")
        if isinstance(held, list) and isinstance(columns, list) and all(isinstance(row, list) for row in held):
            return [dict(zip(columns, row, strict=False)) for row in held]
        if isinstance(held, list) and (name != "questions" or any(isinstance(item, dict) for item in held)):
            return held
    if len(values) > 1 and all(isinstance(value, list) and len(value) > 1 for value in values):
        if len({len(value) for value in values}) == 1 and not any(name in document for name in CONVERSATIONS):
            return [dict(zip(document, row, strict=True)) for row in zip(*values, strict=True)]
    elif values and all(isinstance(value, dict) and value for value in values):
        keys = list(values[0])  # 0, 1, 2 ..., or of a frame that was filtered or shuffled any numbers
        counted = keys == _counted(len(keys)) or (_known(document) and all(key.isdecimal() for key in keys))
        if counted and all(list(value) == keys for value in values):
            return [dict(zip(document, row, strict=True)) for row in zip(*map(dict.values, values), strict=True)]
        fields = sum(map(_recognised, document))  # of thousands of ids one may be "code" or "answer"
        if 2 * fields < len(document):
            known = list(document) == _counted(len(document))  # numbers of rows, which another file has too
            return values if known else [{"id": name, **value} for name, value in document.items()]
    return [document]


def _known(document: Mapping[str, Any]) -> bool:
    return any(map(_recognised, document))


def _recognised(name: str) -> bool:
    return name.lower() in RECOGNISED


def _counted(count: int) -> list[str]:
    return list(map(str, range(count)))


def _nested(row: Row) -> list[Row]:
    """The rows nested in a row, each with the fields around it, else the row itself.

    An id around them is the first one's; the others, where they have none of their own, get a number behind it. What is
    around an empty list is no row, unless it may be one without it.
    """
    for name in NESTED:
        inner = None if isinstance(row, RowError) else row.get(name)
        if isinstance(inner, list) and all(isinstance(item, dict) for item in inner):
            assert not isinstance(row, RowError)
            if not inner and _is_row(row, name):
                continue
            if inner and name == "paragraphs" and not any("qas" in item for item in inner):
                continue  # of one question, as in MuSiQue
            around = {key: value for key, value in row.items() if key != name}
            ids = {key: value for key, value in around.items() if key.lower() in NAMES["id"] and not blank(value)}
            found: list[Row] = []
            for number, item in enumerate(inner, 1):
                more = {key: f"{value}:{number}" for key, value in ids.items()} if number > 1 else {}
                found += _nested({**around, **more, **item})
            return found
    return [row]


def _is_row(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row with an empty list under `name` may be one by itself: it asks or says something."""
    if name == "paragraphs":
        return not row.keys() <= {"title", name}
    return any(key.lower() in (*NAMES["question"], *NAMES["text"]) for key in row)
