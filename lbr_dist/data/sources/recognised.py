"""What is recognised of a row, in words: what it is read as, or what it lacks and the remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from lbr_dist.data.record import SPACELESS
from lbr_dist.data.sources.chat import CONVERSATIONS, INPUTS
from lbr_dist.data.sources.field_names import RECOGNISED, Finder, listed, spelled

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
    "question-answer": ("id", "domain", "source", "label"),
    "query-document": ("id", "domain", "source", "label"),
    "multiple-choice": ("id", "domain", "source", "answer"),
    "corpus": ("id",),
}
"""What is looked at beside it."""
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
            shown.append(f"{'answer' if role in ('right', 'document') else role} = {','.join(names)}")
        used.update(name if name in row else name.split(".")[0] for name in names)
        if role == "question" and any(name.lower() == "instruction" for name in names):
            used.update(name for name in row if str(name).lower() in INPUTS)
    for role in BESIDE[kind]:
        used.update(finder.find(row, role) or ())
    if entity and (name := spelled(row, entity) or spelled(row, entity.split(".")[0])):
        used.add(name)
    left = {name: None for name in row if name not in used}
    return f"{kind or 'question alone'} ({', '.join(shown)}{f'; not used: {listed(left)}' if left else ''})"


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
