"""What is recognised of a row, in words: what it is read as, or what it lacks and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from lbr_dist.data.record import SPACELESS
from lbr_dist.data.sources.chat import CONVERSATIONS, INPUTS
from lbr_dist.data.sources.field_names import NAMES, RECOGNISED, Finder, listed, reach, spelled
from lbr_dist.data.sources.row_values import RowError, nothing, parsed
from lbr_dist.data.sources.verdicts import label_of_each, verdict

ROLES: dict[str | None, tuple[str, ...]] = {
    None: ("question", "options"),
    "question-answer": ("question", "answer", "positives", "negatives"),
    "query-document": ("question", "document", "positives", "negatives"),
    "multiple-choice": ("question", "options", "right", "positives", "negatives"),
    "corpus": ("text",),
}
"""What rows of a kind are read for; None: an evaluation set's row that is a question alone."""
BESIDE: dict[str | None, tuple[str, ...]] = {
    None: ("id",),
    "question-answer": ("id", "domain", "source"),
    "query-document": ("id", "domain", "source"),
    "multiple-choice": ("id", "domain", "source"),
    "corpus": ("id",),
}
"""What is looked at beside it, as are a label, where it says that an answer is right, and an answer beside a right
option."""
ABOUT = re.compile(
    r"(?:.*[\W_])?(?:title|subtitle|name|url|uri|link|meta|metadata|info|date|time|timestamp|year|at|published|created"
    r"|updated|modified|source|publisher|journal|venue|language|lang|author|creator|editor|license|licence|copyright"
    r"|path|file|filename|repo|repository|section|category|type|topic|subject|tag|keyword|label|split|dataset|domain"
    r"|format|id|hash|version|country|city|location|place|address|court|email)s?",
    re.IGNORECASE,
)
"""Fields that say something about a text, and ask nothing."""
_WORD = re.compile(f"[{SPACELESS}]{{2}}|[^\\W\\d_{SPACELESS}][^\\s{SPACELESS}]*")
"""A word of letters; in scripts without spaces two characters."""
ASKS = 3
"""Words from which a text may be a question."""
MAP = 20
"""An object with more texts than this, none of them in a field that is recognised, is taken for a map of them."""
EACH = "write one row for each"
ASKED = ("question", "questions", "query", "question_stem")
"""Fields with a question, in small letters, in objects that are in a list."""


def read_as(
    row: Mapping[str, Any], unfolded: Mapping[str, Any], kind: str | None, finder: Finder, entity: str | None = None
) -> str:
    """The kind of a row and the fields that it was read from, those of `unfolded` by their names in `row`; `entity`,
    the field that groups rows, is used too.

    "question-answer (question = prompt, answer = text; not used: test, entry_point)"
    """
    folded = [name for name in row if name not in unfolded]
    said = [name for name in folded if str(name).lower() in CONVERSATIONS]
    shown, used = [], {*folded}
    for role in ROLES[kind]:
        names = list(finder.find(unfolded, role) or ())
        if role == "question":
            names = said or [*names, *folded]
        elif role in ("answer", "document"):
            names = said or names
        if names:
            by = _label_of_each(unfolded, names, finder) if role in ("answer", "document") else ""
            shown.append(f"{'answer' if role in ('right', 'document') else role} = {','.join(names)}{by}")
        used.update(names)
        if role == "question" and any(name.lower() == "instruction" for name in names):
            used.update(name for name in row if str(name).lower() in INPUTS)
    for role in BESIDE[kind]:
        used.update(finder.find(row, role) or ())
    if kind in ("question-answer", "query-document") and (names := list(finder.find(row, "label") or ())):
        used.update(names if verdict(reach(row, names[0])) is not None else ())
    if kind == "multiple-choice" and "answer" not in finder.fields:
        used.update(name for name in row if str(name).lower() == "answer")
    if entity and (name := spelled(row, entity) or spelled(row, entity.split(".")[0])):
        used.add(name)
    left = dict.fromkeys(_left(row, used))
    return f"{kind or 'question alone'} ({', '.join(shown)}{f'; not used: {listed(left)}' if left else ''})"


def _left(row: Mapping[str, Any], used: set[Any]) -> Iterator[Any]:
    """The fields that are not used, and of an object of which only parts are, its other parts."""
    for name, value in row.items():
        if name in used:
            continue
        parts = [str(part) for part in used if str(part).startswith(f"{name}.")] if isinstance(value, Mapping) else []
        others = (f"{name}.{part}" for part in value) if parts else (name,)
        yield from (other for other in others if not any(f"{part}.".startswith(f"{other}.") for part in parts))


def _label_of_each(row: Mapping[str, Any], names: list[str], finder: Finder) -> str:
    """By which label those of several answers that are right were taken, for `read_as`."""
    if len(names) > 1 or finder.fields.get("label") == "":
        return ""
    label = label_of_each(parsed(reach(row, names[0])))
    return f" but those whose {label} is false" if label else ""


def refuse_nested(row: Mapping[str, Any]) -> None:
    """See that no questions lie in lists of objects, at any depth, of a row that would be a text.

    Raises:
        RowError: names the list.
    """
    left: list[tuple[str, Any]] = [("", row)]
    while left:
        name, value = left.pop()
        if isinstance(value, list | tuple):
            objects = [item for item in value if isinstance(item, Mapping)]
            if any(str(key).lower() in ASKED and not nothing(held) for item in objects for key, held in item.items()):
                raise RowError(
                    "missing_field",
                    f"{name} is a list of objects with questions, which would be left out: {EACH}; or, for the texts "
                    "alone, --kind corpus",
                )
            left += [(name, item) for item in value if isinstance(item, Mapping | list | tuple)]
        elif isinstance(value, Mapping):
            left += [(f"{name}.{key}" if name else str(key), item) for key, item in value.items()]


def refuse_options_within(row: Mapping[str, Any], finder: Finder) -> None:
    """See that the object in the field of a question holds no options: ARC, OpenBookQA, CommonsenseQA.

    Raises:
        RowError: names the parts.
    """
    [name, *_] = finder.find(row, "question") or ("",)
    value = row.get(name)
    if "question" in finder.fields or not isinstance(value, Mapping):
        return
    options = next((part for part in value if str(part).lower() in NAMES["options"]), None)
    stem = next((part for part in value if str(part).lower() in (*NAMES["question"], "text")), None)
    if options is not None and stem is not None:
        raise RowError(
            "wrong_type",
            f"{name} is an object with options: name its parts (--field question={name}.{stem} --field "
            f"options={name}.{options})",
        )


def may_ask(row: Mapping[str, Any], text: str) -> str | None:
    """The first field beside a text that no role has and that may hold its question; None: there is none."""
    return next((str(name) for name, value in row.items() if name != text and _asks(str(name), value)), None)


def _asks(name: str, value: Any) -> bool:
    if not isinstance(value, str) or ABOUT.fullmatch(name) or name.lower() in RECOGNISED:
        return False
    return len(list(islice(_WORD.finditer(value), ASKS))) == ASKS


def untold(row: Mapping[str, Any], finder: Finder, *, cells: bool) -> str:
    """What a row lacks whose fields tell no kind, and the remedy; `cells`: it is of a CSV file."""
    lacking = [f"{role}={name}" for role, name in finder.fields.items() if name and finder.find(row, role) is None]
    among = f"among the fields {listed(row)}" + f", which have none of --field {', '.join(lacking)}" * bool(lacking)
    cannot = f"cannot tell question, answer or text {among}"
    found = {role: ",".join(names) for role in ("question", "options", "answer") if (names := finder.find(row, role))}
    lists = {str(name): None for name, value in row.items() if isinstance(value, list) and _all(value, Mapping)}
    if lists and (not found or found.get("question") in lists):
        nested = {found["question"]: None} if found else lists
        return f"{cannot}: {listed(nested)} {'is a list' if len(nested) == 1 else 'are lists'} of objects: {EACH}"
    if found:
        lacks = "answer" if "question" in found else "question"
        there = " and ".join(f"{role} ({name})" for role, name in found.items())
        more = f"; or, for these texts alone, --kind corpus --field text={found.get('question') or found.get('answer')}"
        more = more * (len(found) == 1 and "options" not in found)
        more += f"; or, where {listed(lists)} has the rows, {EACH} of its objects" * bool(lists)
        return f"{there} and no {lacks} {among}: name the {lacks} (--field {lacks}=NAME){more}"
    if maps := [name for name, value in row.items() if isinstance(value, Mapping) and _is_map(value)]:
        return f"{cannot}: {maps[0]} is a map of texts: {EACH}"
    if _is_map(row):
        return f"{cannot}: the row is a map of texts: {EACH}"
    header = " (the first line of a CSV file has to hold their names)" * cells
    return f"{cannot}: name them, for example --field question=prompt{header}"


def _is_map(value: Mapping[str, Any]) -> bool:
    return len(value) > MAP and _all(list(value.values()), str)


def _all(values: list[Any], kind: type) -> bool:
    return len(values) > 0 and all(isinstance(value, kind) for value in values)
