"""Which field of a row plays which role: names that are recognised, and the mapping that overrides them."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lbr_dist.errors import UserError

KINDS = ("question-answer", "query-document", "multiple-choice", "corpus")
"""What the rows of a source are. The first two differ only in the field names that are looked for first."""

NAMES: dict[str, tuple[str, ...]] = {
    "question": (
        *("question", "questions", "query", "prompt", "instruction", "stem", "question_stem", "problem", "anchor"),
        *("input", "docstring", "func_documentation_string"),
    ),
    "answer": (
        *("answer", "answers", "response", "output", "completion", "correct_answer", "long_answer", "ideal_answer"),
        *("document", "passage", "positive", "pos", "positive_passages", "canonical_solution", "code"),
        *("func_code_string",),
    ),
    "positive": ("positive", "pos", "positive_passages"),
    "document": ("document", "passage", "positive", "pos", "positive_passages", "text", "answer", "response", "code"),
    "options": (
        *("options", "choices", "opa,opb,opc,opd", "option_a,option_b,option_c,option_d"),
        *("A,B,C,D,E", "A,B,C,D"),
    ),
    "right": (
        *("answer_idx", "answer_index", "answerKey", "answer_key", "correct", "correct_option", "cop"),
        *("correct_answer", "label", "answer"),
    ),
    "text": ("text", "content", "contents", "document", "passage", "body", "abstract", "code"),
    "id": ("id", "_id", "uid", "qid"),
    "domain": ("domain",),
    "source": ("source",),
    "negatives": ("negatives", "negative", "hard_negatives", "neg", "negative_passages"),
    "positives": ("positives",),
    "label": ("label", "is_duplicate", "is_correct"),
}
"""Field names that are recognised for each role, in capitals or not; the first that a row has wins. Commas join several
fields of one role. Beside negatives an answer is first looked for under the names of what they are negatives to
(`positive`): by its length or style, a short answer beside passages would give itself away."""
PAIRS = (("body", "ideal_answer"), ("nl", "code"), ("intent", "snippet"), ("claim", "document"), ("claim", "passage"))
"""A question and its answer under names that say as much only beside each other: BioASQ, CONCODE, CoNaLa, SciFact."""

CODED = (
    *("answer_idx", "answer_index", "answerkey", "answer_key", "correct_option", "correct_answer_id", "cop", "label"),
)
"""Fields, in small letters, with the label, letter or number of the right option and not its text."""
INDICES = ("answer_idx", "answer_index", "correct_answer_id", "cop", "label")
"""Those of them in which a number may count from 0 though the options' own names count from 1 (COPA)."""
COLUMN = re.compile(r"(op_?|)([A-Z])|((?:opt|option|choice)[ _-]?)([A-Z]|\d{1,2})", re.IGNORECASE)
"""A field with the option of a letter or number: what comes before it, and the letter or number."""
FIRST = ("A", "0", "1")
"""What the first of such fields may have."""

RECOGNISED = frozenset(
    part.lower() for names in NAMES.values() for name in names for part in name.split(",") if len(part) > 1
)
MAPPABLE = ("question", "answer", "options", "text", "id", "domain", "source", "negatives", "positives", "label")
"""Roles that a field mapping may name."""

NUMBERED = re.compile(r"negatives?_?\d+", re.IGNORECASE)
MOST_LISTED = 300
"""Characters of field names in a message."""
UNNAMED = "(unnamed column)"
"""What a message calls a field whose name is empty, as pandas writes that of its index."""
MOST_FORMS = 1000
"""Forms of rows (field names in order) whose roles are remembered."""


class Finder:
    """Finds roles in rows; the answer for rows of one form (their fields in order) is remembered.

    Args:
        fields: role to field name, where the user named it. Commas join several fields, dots lead into objects, unless
            a field has that very name; an empty name says that no field has the role.
        lenient: where a row lacks a field of that name, the names that are recognised count.
    """

    def __init__(self, fields: Mapping[str, str], *, lenient: bool = False) -> None:
        self.fields = {role: unicodedata.normalize("NFC", name) for role, name in fields.items()}
        self._lenient = lenient
        self.met = set[str]()
        """Roles of `fields` whose field a row had."""
        self._unmet = [role for role, name in self.fields.items() if name]
        self._found: dict[tuple[str, tuple[str, ...]], tuple[str, ...] | None] = {}

    def meet(self, row: Mapping[str, Any]) -> None:
        """Take down which of the fields that the user named the row has, whatever its kind."""
        if self._unmet:
            self.met.update(role for role in self._unmet if _has(row, _parts(row, self.fields[role])))
            self._unmet = [role for role in self._unmet if role not in self.met]

    def find(self, row: Mapping[str, Any], role: str) -> tuple[str, ...] | None:
        """Names of the row's fields for a role; None: it has none."""
        if role == "answer" and "answer" not in self.fields and self.find(row, "negatives") is not None:
            beside = self._recognised(row, "positive")
            if beside is not None:
                return beside
        named = "answer" if role in ("right", "document") else role
        mapped = self.fields.get(named)
        if mapped == "":
            return None
        if mapped is not None:
            parts = _parts(row, mapped)
            if _has(row, parts):
                self.met.add(named)
                return parts
            if not self._lenient:
                return None
        return self._recognised(row, role)

    def _recognised(self, row: Mapping[str, Any], role: str) -> tuple[str, ...] | None:
        key = role, tuple(row)
        if key not in self._found:
            if len(self._found) >= MOST_FORMS:
                self._found.clear()
            self._found[key] = _recognise(row, role)
        return self._found[key]


def listed(row: Mapping[str, Any]) -> str:
    """The names of a row's fields, for a message: the first of very many."""
    names = ", ".join(str(name) or UNNAMED for name in row) or "(none)"
    return names if len(names) <= MOST_LISTED else f"{names[:MOST_LISTED]} ... ({len(row)} fields)"


_MISSING = object()


def reach(row: Mapping[str, Any], name: str) -> Any:
    """The value of a field; dots lead into objects unless a field has that very name.

    NaN, which pandas makes of nothing, is null.
    """
    value: Any = row
    for part in [name] if name in row else name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return None if isinstance(value, float) and math.isnan(value) else value


def _parts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The fields that the user named with commas, unless one has that very name."""
    return (name,) if _has(row, [name]) else tuple(name.split(","))


def _has(row: Mapping[str, Any], names: Iterable[str]) -> bool:
    return all(reach(row, name) is not _MISSING for name in names)


def look_up(row: Mapping[str, Any], name: str) -> Any:
    """The value of a field that the user named, in capitals or not, or in an object; None where there is none."""
    found = reach(row, name)
    if found is _MISSING:
        other = spelled(row, name)
        return None if other is None else reach(row, other)
    return found


def spelled(row: Mapping[str, Any], name: str) -> str | None:
    """The row's own name of a field that the user named, in capitals or not; None: it has none."""
    return name if name in row else next((other for other in row if str(other).lower() == name.lower()), None)


def value(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """What the fields that `Finder.find` named hold: a list where there are several."""
    values = [reach(row, name) for name in names]
    return values if len(values) > 1 else values[0]


def column_labels(names: tuple[str, ...]) -> list[str]:
    """The letters or numbers of the options that are in these fields; none where not each is the field of one."""
    found = [label for _, label in map(_column, names) if label]
    return found if len(found) == len(names) > 1 else []


def _column(name: str) -> tuple[str, str]:
    """What comes before the letter or number of the option that a field holds, and that itself; else nothing."""
    match = COLUMN.fullmatch(name)
    return ((match[1] or match[3] or "").lower(), (match[2] or match[4]).upper()) if match else ("", "")


def _columns(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Fields of one name with a letter or number each, in order."""
    groups: dict[tuple[str, bool], dict[str, str]] = {}
    for name in map(str, row):
        stem, label = _column(name)
        if stem:
            groups.setdefault((stem, label.isdecimal()), {}).setdefault(label, name)
    for group in groups.values():
        labels = sorted(group, key=lambda label: (len(label), label))
        if len(labels) > 1 and labels[0] in FIRST:
            return tuple(group[label] for label in labels)
    return None


def _recognise(row: Mapping[str, Any], role: str) -> tuple[str, ...] | None:
    lower = {str(name).lower(): name for name in reversed(list(row))}
    for name in NAMES[role]:
        if "," in name and (columns := _columns(row)) is not None:
            return columns
        parts = [part if part in row else lower.get(part.lower()) for part in name.split(",")]
        if None not in parts:
            return tuple(map(str, parts))
    for pair in PAIRS:
        if role in ("question", "answer") and all(name in lower for name in pair):
            return (str(lower[pair[role == "answer"]]),)
    if role == "negatives":  # a column each: negative_1, negative_2 ...
        return tuple(name for name in map(str, row) if NUMBERED.fullmatch(name)) or None
    return None


def check_fields(fields: Mapping[str, str]) -> None:
    """Refuse a mapping of roles that do not exist.

    Raises:
        UserError: names the role and the valid ones.
    """
    for role in fields:
        if role not in MAPPABLE:
            raise UserError(f"--field {role}={fields[role]}: no such role; the roles are {', '.join(MAPPABLE)}")


def composed(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with its fields' names in NFC, as far as they stay different."""
    if "".join(row).isascii():
        return row
    names = [unicodedata.normalize("NFC", name) for name in row]
    return dict(zip(names, row.values(), strict=True)) if len({*names}) == len(row) else row


def check_distinct(names: Iterable[str], where: str) -> None:
    """Check that no name of a field is there twice: a row would have the last one's value, without a word.

    Raises:
        ValueError: one is; `where` says whose names they are.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{where} {twice[0]!r} twice")
