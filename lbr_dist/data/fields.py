"""One row of any source to one `Record`: find the fields, check them, name what is wrong.

Field names differ by data set, so common names are recognised, a mapping overrides them, and the kind of a source
follows from the fields that its rows have. A row that cannot be used raises `RowError` with a reason from a short fixed
list, because reasons are counted and reported; nothing is repaired silently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lbr_dist.data.chat import unfold
from lbr_dist.data.record import Record, content_id
from lbr_dist.errors import UserError

KINDS = ("question-answer", "query-document", "multiple-choice", "corpus")
"""What the rows of a source are. The first two differ only in the field names that are looked for first."""

NAMES: dict[str, tuple[str, ...]] = {
    "question": ("question", "query", "prompt", "instruction", "stem", "problem", "anchor"),
    "answer": ("answer", "response", "output", "completion", "document", "passage", "positive", "pos"),
    "document": ("document", "passage", "positive", "pos", "text", "answer", "response"),
    "options": ("options", "choices", "opa,opb,opc,opd"),
    "right": (
        "answer_idx",
        "answer_index",
        "answerKey",
        "answer_key",
        "correct",
        "correct_option",
        "cop",
        "label",
        "answer",
    ),
    "text": ("text", "content", "document", "passage", "body", "abstract"),
    "id": ("id", "_id", "uid", "qid"),
    "domain": ("domain",),
    "source": ("source",),
    "negatives": ("negatives", "negative", "hard_negatives", "neg"),
    "positives": ("positives",),
}
"""Field names that are recognised for each role, in capitals or not; the first that a row has wins. Commas join several
fields of one role."""

MAPPABLE = ("question", "answer", "options", "text", "id", "domain", "source", "negatives", "positives")
"""Roles that a field mapping may name."""

MOST_FORMS = 1000
"""Forms of rows (field names in order) whose roles are remembered."""

REASONS = {
    "missing_field": "a field is missing",
    "wrong_type": "a field has the wrong type",
    "empty": "a field is empty",
    "invalid_utf8": "the text is not valid UTF-8",
    "invalid_json": "the line is not valid JSON",
    "too_long": "a field is too long",
    "bad_option": "the right option is none of the options",
    "duplicate_id": "the id occurs twice with different content",
}
"""Why a row is bad."""


class RowError(Exception):
    """A row that cannot be used."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS
        super().__init__(detail)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return RowError, (self.reason, self.detail)


@dataclass(frozen=True)
class Entity:
    """What groups rows that must share a side: a field, and of it what `pattern` captures (its first group, or all)."""

    field: str
    pattern: re.Pattern[str] | None

    @classmethod
    def parse(cls, text: str) -> Entity:
        """`FIELD` or `FIELD~REGEX`, for example `id~(.*):` for all of the id up to its last colon.

        Raises:
            UserError: the regular expression is not one.
        """
        name, tilde, pattern = text.partition("~")
        try:
            return cls(name, re.compile(pattern) if tilde else None)
        except re.error as error:
            raise UserError(f"--entity {text}: not a regular expression ({error})") from error

    def of(self, row: Mapping[str, Any], record: Record) -> str | None:
        """The row's group; None: it has none and stands alone."""
        value = record.id if self.field == "id" else row.get(self.field)
        if value is None or self.pattern is None:
            return None if value is None else str(value)
        match = self.pattern.search(str(value))
        if match is None:
            return None
        return match.group(1) if self.pattern.groups else match.group(0)


class Converter:
    """Rows of one source to records.

    Args:
        kind: one of `KINDS`, or None: the first row whose fields tell decides for the whole source.
        fields: role to field name; `options` may name several fields, joined by commas.
        max_chars: longest question, answer, option or text, in characters.
        domain, source: for rows that have no such field.
    """

    def __init__(
        self, kind: str | None, fields: Mapping[str, str], *, max_chars: int, domain: str = "", source: str = ""
    ) -> None:
        self.kind, self.fields, self.max_chars = kind, dict(fields), max_chars
        self.domain, self.source = domain, source
        self._found: dict[tuple[str, tuple[str, ...]], str | None] = {}

    def __call__(self, row: Mapping[str, Any]) -> Record:
        """The row's record.

        Raises:
            RowError: it cannot be used.
        """
        row = self._unfolded(row)
        if self.kind is None:
            self.kind = self.detect(row)
        if self.kind == "corpus":
            text = self._text(self._get(row, "text"), "text")
            return Record(id=self._id(row, text), text=text)
        if self.kind == "multiple-choice":
            question, answer = self._multiple_choice(row)
            more: tuple[str, ...] = ()
        else:
            question = self._text(self._get(row, "question"), "question")
            answer, more = self._answer(row)
        negatives = self._texts(self._get(row, "negatives", optional=True), "negatives")
        positives = more + self._texts(self._get(row, "positives", optional=True), "positives")
        return Record(
            id=self._id(row, question, answer, *negatives, "", *positives),
            question=question,
            answer=answer,
            domain=self._label(row, "domain", self.domain),
            source=self._label(row, "source", self.source),
            negatives=negatives,
            positives=positives,
        )

    def detect(self, row: Mapping[str, Any]) -> str:
        """The kind that the row's fields tell.

        Raises:
            RowError: they tell none.
        """
        row = self._unfolded(row)
        has = {role: self._find(row, role) is not None for role in ("question", "answer", "options", "text")}
        if has["question"] and has["options"]:
            return "multiple-choice"
        if has["question"] and has["answer"]:
            return "question-answer"
        if has["question"] and has["text"]:
            return "query-document"
        if has["text"]:
            return "corpus"
        raise RowError(
            "missing_field",
            f"cannot tell question, answer or text among the fields {', '.join(map(str, row)) or '(none)'}: "
            "name them, for example --field question=prompt",
        )

    def _unfolded(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with a conversation as question and answer, unless the user named their fields."""
        if "question" in self.fields or self.kind == "corpus":
            return row
        try:
            return unfold(row)
        except ValueError as error:
            raise RowError("wrong_type", str(error)) from None

    def _find(self, row: Mapping[str, Any], role: str) -> str | None:
        """Name of the row's field for a role, several joined by commas; None: it has none."""
        key = role, tuple(row)
        if key not in self._found:
            if len(self._found) >= MOST_FORMS:
                self._found.clear()
            self._found[key] = self._look(row, role)
        return self._found[key]

    def _look(self, row: Mapping[str, Any], role: str) -> str | None:
        mapped = self.fields.get("answer" if role in ("right", "document") else role)
        if mapped is not None:
            return mapped if all(part in row for part in mapped.split(",")) else None
        lower = {name.lower(): name for name in reversed(list(row))}
        for name in NAMES[role]:
            parts = [part if part in row else lower.get(part.lower()) for part in name.split(",")]
            if None not in parts:
                return ",".join(map(str, parts))
        return None

    def _get(self, row: Mapping[str, Any], role: str, optional: bool = False) -> Any:
        name = self._find(row, role)
        if name is None:
            if optional:
                return None
            wanted = self.fields.get(role) or ", ".join(NAMES[role])
            raise RowError("missing_field", f"no {role}: looked for {wanted}; the row has {', '.join(map(str, row))}")
        if name not in row:  # several fields, joined by commas
            return [row[part] for part in name.split(",")]
        return row[name]

    def _answer(self, row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        """The answer and, where the field holds a list, the further answers."""
        value = self._get(row, "document" if self.kind == "query-document" else "answer")
        if isinstance(value, list | tuple):
            first, *more = self._texts(value, "answer") or (self._text("", "answer"),)
            return first, tuple(more)
        return self._text(value, "answer"), ()

    def _multiple_choice(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Stem and options, one per line with a letter, as the question; the right option as the answer."""
        stem = self._text(self._get(row, "question"), "question")
        options, labels = self._options(self._get(row, "options"))
        right = _choose(self._get(row, "right"), options, labels)
        lines = [f"{chr(ord('A') + number)}. {option}" for number, option in enumerate(options)]
        return self._text("\n".join([stem, *lines]), "question"), options[right]

    def _options(self, value: Any) -> tuple[list[str], list[str]]:
        """Option texts and their labels, from a list, {"text": [...], "label": [...]} or {"A": ..., "B": ...}."""
        labels: list[str] = []
        value = _maybe_json(value)
        if isinstance(value, Mapping):
            if "text" in value and isinstance(value["text"], list | tuple):
                labels = [str(label) for label in value.get("label", ())]
                value = value["text"]
            else:
                labels, value = [str(label) for label in value], list(value.values())
        if not isinstance(value, list | tuple):
            raise RowError("wrong_type", f"options is {_type(value)}, not a list")
        options = [self._text(option, "options") for option in value]
        if not 2 <= len(options) <= 26:
            raise RowError("bad_option", f"{len(options)} options; 2 to 26 are expected")
        return options, labels

    def _text(self, value: Any, role: str) -> str:
        if not isinstance(value, str):
            if value is None:
                raise RowError("empty", f"{role} is null")
            raise RowError("wrong_type", f"{role} is {_type(value)}, not a text")
        if not value or value.isspace():
            raise RowError("empty", f"{role} is empty")
        if len(value) > self.max_chars:
            raise RowError("too_long", f"{role} has {len(value)} characters, more than --max-chars {self.max_chars}")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise RowError("invalid_utf8", f"{role}, character {error.start}") from None
        return value

    def _texts(self, value: Any, role: str) -> tuple[str, ...]:
        """A list of texts; one text counts as a list of one, empty ones are left out."""
        value = _maybe_json(value)
        if value is None or value == "":
            return ()
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list | tuple):
            raise RowError("wrong_type", f"{role} is {_type(value)}, not a list of texts")
        return tuple(self._text(text, role) for text in value if text not in (None, ""))

    def _label(self, row: Mapping[str, Any], role: str, default: str) -> str:
        value = self._get(row, role, optional=True)
        return self._text(value, role) if value not in (None, "") else default

    def _id(self, row: Mapping[str, Any], *content: str) -> str:
        value = self._get(row, "id", optional=True)
        if value is None or value == "":
            return content_id(*content)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise RowError("wrong_type", f"id is {_type(value)}, not a text or a whole number")
        return self._text(str(value), "id")


def check_fields(fields: Mapping[str, str]) -> None:
    """Refuse a mapping of roles that do not exist.

    Raises:
        UserError: names the role and the valid ones.
    """
    for role in fields:
        if role not in MAPPABLE:
            raise UserError(f"--field {role}={fields[role]}: no such role; the roles are {', '.join(MAPPABLE)}")


def _choose(value: Any, options: list[str], labels: list[str]) -> int:
    """Number of the right option, from its label, its text, its letter or its index (from 0)."""
    number = -1
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str):
        if value in labels:
            number = labels.index(value)
        elif value in options:
            number = options.index(value)
        elif len(value.strip()) == 1 and value.strip().upper() in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
            number = ord(value.strip().upper()) - ord("A")
        elif value.strip().isdecimal():
            number = int(value)
    else:
        raise RowError("wrong_type", f"the right option is {_type(value)}, not a text or a whole number")
    if not 0 <= number < len(options):
        raise RowError("bad_option", f"{str(value)[:40]!r} is none of the {len(options)} options")
    return number


def _maybe_json(value: Any) -> Any:
    """Lists and objects that a CSV cell holds as JSON."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _type(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
