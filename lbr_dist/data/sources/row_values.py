"""Values of a row, checked: texts, lists of texts, ids. What is wrong is a `RowError`; reasons are counted.

Nothing is repaired silently. A list may be written as JSON (in a cell of a CSV file), and a text may lie in an object
under `text`, with its `title` before it, as retrieval data sets have it.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from decimal import Decimal
from typing import Any
from uuid import UUID

from lbr_dist.data.record import INVISIBLE

REASONS = {
    "missing_field": "a field is missing",
    "wrong_type": "a field has the wrong type",
    "empty": "a field is empty",
    "invalid_utf8": "the text is not valid UTF-8",
    "invalid_json": "the line is not valid JSON",
    "too_long": "a field is too long",
    "wrong_answer": "the label says that the answer is wrong",
    "bad_option": "the right option is none of the options",
    "duplicate_id": "the id occurs twice with different content",
}
"""Why a row is bad."""
CONVERT = (
    ": convert a file in another encoding, as with iconv -f ENCODING -t UTF-8 (Chinese: GB18030, Japanese: CP932, "
    "Korean: CP949, Cyrillic: WINDOWS-1251, Western: WINDOWS-1252)"
)
WHOLE = re.compile(r"-?\d+\.0")
"""A whole number as pandas writes it, in a file of any format, where another row has none."""
PYTHON_LIST = re.compile(r"\s*\[\s*(['\"]).*\1\s*\]\s*", re.DOTALL)
"""What str() makes of a list of texts, where it is not JSON too."""
PYTHON_OBJECT = re.compile(r"\s*\{(?=.*'text': (array\()?\[).*\}\s*", re.DOTALL)
"""What str() makes of an object with a list under `text`, as `to_csv` writes the answers of SQuAD, likewise,"""
PYTHON_OBJECTS = re.compile(r"\s*\[\s*\{(?=.*'text': ).*\}\s*\]\s*", re.DOTALL)
"""and of a list of objects with a `text`, as it writes passages."""


class RowError(Exception):
    """A row that cannot be used."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS
        super().__init__(detail)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return RowError, (self.reason, self.detail)

    @property
    def problem(self) -> str:
        """What is wrong, in words, where a single bad row is an error."""
        return self.detail if self.reason == "wrong_type" else f"{REASONS[self.reason]} ({self.detail})"


def text(value: Any, role: str, max_chars: int) -> str:
    """The text that a field holds; an answer may be a number.

    Raises:
        RowError: it is none, or empty, or has more than `max_chars` characters.
    """
    if holds_text(value):
        title = value.get("title")
        value = f"{title} {value['text']}" if isinstance(title, str) and title else value["text"]
    if role == "answer" and _is_exact(value):
        value = str(value)
    if not isinstance(value, str):
        if value is None:
            raise RowError("empty", f"{role} is null")
        hint = ": write it as one, in quotes" if isinstance(value, int | float | Decimal) else ""
        if isinstance(value, bytes):
            hint = ": cast the column to strings"
        if isinstance(value, Mapping):
            hint = f": name a field in it, for example --field {role}=FIELD.PART"
        if role == "question" and isinstance(value, list | tuple):
            hint = ": write one row for each"
        raise RowError("wrong_type", f"{role} is {type_name(value)}, not a text{hint}")
    if unseen(value):
        raise RowError("empty", f"{role} is empty")
    if len(value) > max_chars:
        raise RowError("too_long", f"{role} has {len(value)} characters, more than --max-chars {max_chars}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            hint = CONVERT * ("\udc80" <= value[error.start] <= "\udcff")  # a byte that csv_rows handed on
            raise RowError("invalid_utf8", f"{role}, character {error.start}{hint}") from None
    return value


def texts(value: Any, role: str, max_chars: int) -> tuple[str, ...]:
    """A list of texts, or the list under `text` of an object; one text is a list of one, empty ones are left out."""
    value = parsed(value)
    _refuse_python(value, role)
    if holds_list(value):
        value = _titled(value)
    if blank(value):
        return ()
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise RowError("wrong_type", f"{role} is {type_name(value)}, not a list of texts")
    items = [item for item in value if not _is_nothing(item)]
    if any(isinstance(item, Mapping) and not holds_text(item) for item in items):
        hint = "--field leads into none: let each be a text, or hold it under text"
        raise RowError("wrong_type", f"{role} is a list of objects without a text, and {hint}")
    if any(isinstance(item, list | tuple) for item in items):
        raise RowError("wrong_type", f"{role} is a list of lists: write one text for each")
    if role == "answer" and any(map(_is_exact, items)):
        hint = "write each as a text, in quotes, or, where it is one answer, the list"
        raise RowError("wrong_type", f"answer is a list of numbers: {hint}")
    return tuple(text(item, role, max_chars) for item in items)


def _is_nothing(item: Any) -> bool:
    """Whether an item of a list is null or nothing that can be seen, or an object with such a text and no title."""
    value = item["text"] if holds_text(item) and blank(item.get("title")) else item
    return blank(value) or (isinstance(value, str) and unseen(value))


def _is_exact(value: Any) -> bool:
    """Whether a value is a number that is read as it is written, up to zeros at its end."""
    if isinstance(value, float):
        return math.isfinite(value) and len(Decimal(repr(value)).as_tuple().digits) <= sys.float_info.dig
    return isinstance(value, int | Decimal) and not isinstance(value, bool)


def _titled(value: Mapping[str, Any]) -> list[Any]:
    """The texts of an object of lists, which `datasets` makes of a list of objects; with titles, where it has them."""
    items, titles = value["text"], value.get("title")
    if not isinstance(titles, list | tuple) or len(titles) != len(items):
        return list(items)
    return [
        {"title": title, "text": item} if isinstance(item, str) and not blank(title) else item
        for title, item in zip(titles, items, strict=True)
    ]


def unseen(value: str) -> bool:
    """Whether a text has nothing but spaces and what is invisible."""
    return not value or value.isspace() or not (value.isascii() or INVISIBLE.sub("", value).strip())


def blank(value: Any) -> bool:
    """Whether a value is null, also as pandas writes it, or a text of nothing but spaces."""
    nothing = value is None or (isinstance(value, float) and math.isnan(value))
    return nothing or (isinstance(value, str) and not value.strip())


def nothing(value: Any) -> bool:
    """Whether a value is blank, or a list or an object of what is blank or empty."""
    value = parsed(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
    return all(blank(part) or part in ([], {}) for part in parts)


def holds_list(value: Any) -> bool:
    """Whether a value is an object with a list under `text`."""
    return isinstance(value, Mapping) and isinstance(value.get("text"), list | tuple)


def holds_text(value: Any) -> bool:
    """Whether a value is an object with a text under `text`."""
    return isinstance(value, Mapping) and isinstance(value.get("text"), str)


def parsed(value: Any) -> Any:
    """Lists and objects that a CSV cell holds as JSON."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def cell(value: Any, role: str) -> Any:
    """A text, or the object with a text or a list under `text`, or the list of texts or such objects, that it is in
    JSON.

    Raises:
        RowError: it is one of these as Python prints it.
    """
    found = parsed(value)
    if holds_list(found) or holds_text(found):
        return found
    if isinstance(found, list) and all(blank(item) or isinstance(item, str) or holds_text(item) for item in found):
        return found
    _refuse_python(value, role)
    return value


def _refuse_python(value: Any, role: str) -> None:
    forms = {"a list": PYTHON_LIST, "an object": PYTHON_OBJECT, "a list of objects": PYTHON_OBJECTS}
    for name, form in forms.items():
        if isinstance(value, str) and form.fullmatch(value):
            raise RowError("wrong_type", f"{role} is {name} as Python prints it: write it as JSON (json.dumps)")


def identifier(value: Any) -> str | None:
    """The text of an id; None: there is none. pandas makes NaN of none, and databases have a type for UUIDs.

    Raises:
        RowError: neither a text nor a whole number, or not UTF-8.
    """
    value = str(value) if isinstance(value, UUID) else whole(value)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError("wrong_type", f"id is {type_name(value)}, not a text or a whole number")
    return text(str(value), "id", sys.maxsize)


def whole(value: Any) -> Any:
    """A whole number as int: pandas makes floats of those of a column with an empty cell, databases have decimals."""
    return int(value) if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value) else value


def type_name(value: Any) -> str:
    """What a value is, in words."""
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
