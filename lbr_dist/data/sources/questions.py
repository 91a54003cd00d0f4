"""Rows that ask the same in several ways, under `questions`: a list of texts, or of such lists, and one answer.

{"questions": [["...", "..."]], "answers": ["..."]}    HuaTuo
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lbr_dist.data.sources.field_names import Finder, reach
from lbr_dist.data.sources.row_values import RowError, blank, holds_list, parsed

FIELD = "questions"


def each_question(row: Mapping[str, Any], finder: Finder) -> Sequence[Mapping[str, Any] | RowError]:
    """A row for each different question, all but the first with a number behind their id; any other row as it is."""
    names = finder.find(row, "question")
    if names is None or len(names) > 1 or names[0].lower() != FIELD:
        return [row]
    asked = list(_texts(parsed(row[names[0]])))
    if not asked or not all(isinstance(question, str) for question in asked):
        return [row]
    asked = list(dict.fromkeys(asked))
    if len(asked) > 1 and (count := _answers(row, finder)) > 1:
        detail = f"{len(asked)} questions and {count} answers: give each question a row of its own"
        return [RowError("wrong_type", detail)]
    return [{**row, names[0]: question, **_numbered(row, finder, at)} for at, question in enumerate(asked, 1)]


def _texts(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif not blank(value):
        yield value


def _answers(row: Mapping[str, Any], finder: Finder) -> int:
    names = finder.find(row, "answer")
    value: Any = parsed(reach(row, names[0])) if names and len(names) == 1 else None
    if holds_list(value):
        value = value["text"]
    return len(value) if isinstance(value, list | tuple) else 1


def _numbered(row: Mapping[str, Any], finder: Finder, at: int) -> dict[str, Any]:
    names = finder.find(row, "id")
    given = at > 1 and names is not None and names[0] in row and not blank(row[names[0]])
    return {names[0]: f"{row[names[0]]}:{at}"} if given and names is not None else {}
