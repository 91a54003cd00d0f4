"""The options of a multiple-choice row, and which of them is right: by its label, text, letter or index.

Where a value reads in two ways, and these are different options, it is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from lbr_dist.data.sources.field_names import column_labels
from lbr_dist.data.sources.row_values import WHOLE, RowError, blank, holds_list, parsed, text, type_name, whole

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def options_of(value: Any, max_chars: int) -> tuple[list[str], list[str]]:
    """Option texts and their labels: a list of texts or of {"text": ..., "label": ...}, {"text": [...], "label": [...]}
    or {"A": ..., "B": ...}.

    In the last form one that is null or blank is no option: columnar files give all rows the options of the row that
    has the most. In the others this holds for those at the end, which no letter or index of another depends on.
    """
    labels: list[str] = []
    value = parsed(value)
    if isinstance(value, Mapping):
        if holds_list(value):
            given = value.get("label")
            labels = [str(label) for label in given] if isinstance(given, list | tuple) else []
            value = value["text"]
        else:
            value = {str(label): option for label, option in value.items() if not blank(option)}
            labels, value = list(value), list(value.values())
    if not isinstance(value, list | tuple):
        raise RowError("wrong_type", f"options is {type_name(value)}, not a list")
    while value and blank(value[-1]):
        value = value[:-1]
    found = [text(option, "options", max_chars) for option in value]
    if value and all(isinstance(option, Mapping) and "label" in option for option in value):
        labels = [str(option["label"]) for option in value]
    if not 2 <= len(found) <= 26:
        raise RowError("bad_option", f"{len(found)} options; 2 to 26 are expected")
    return found, labels


def choose(value: Any, options: list[str], labels: list[str], *, coded: bool = False) -> int:
    """Number of the right option, from its label, its text, its letter or its index (from 0).

    Args:
        coded: the value comes out of a field for labels, letters and numbers: it is a text only if it is none of these.

    Raises:
        RowError: it is none of the options, or the text of one and the label, letter or index of another.
    """
    if isinstance(value, list | tuple):
        if len(value) != 1:
            hint = "leave such rows out (--max-bad-share 1)"
            raise RowError("wrong_type", f"the row has {len(value)} right options, where one is expected: {hint}")
        [value] = value
    by_text, by_code = readings(value, options, labels)
    repaired = WHOLE.fullmatch(str(value).strip()) is not None
    number = by_text if by_code is None or (repaired and by_text is not None and not coded) else by_code
    if number is None:
        hint = "; a number counts from 0, unless the options have labels"
        shown = str(whole(value)).strip()
        raise RowError("bad_option", f"{shown[:40]!r} is none of the {len(options)} options{hint * shown.isdecimal()}")
    if by_text is not None and options[by_text] != options[number] and not coded:
        raise RowError(
            "bad_option",
            f"{str(value)[:40]!r} reads both as a text and as a letter or number of different options: give the letter "
            "or number of the right one, in a field answer_key",
        )
    return number


def readings(value: Any, options: list[str], labels: list[str]) -> tuple[int | None, int | None]:
    """Numbers of the options that a value names: as their text, and as their label, letter or index.

    Where the labels are letters, a letter is one of them and says nothing about the place; likewise a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        raise RowError("wrong_type", f"the right option is {type_name(value)}, not a text or a whole number")
    written, number = str(value), -1
    name = _code(value)
    known = [label.strip().upper() for label in labels]
    if written in labels:
        number = labels.index(written)
    elif name in known:
        number = known.index(name)
    elif name in LETTERS and not any(label in LETTERS for label in known):
        number = LETTERS.index(name)
    elif name.isdecimal() and len(name) < 3 and not any(label.isdecimal() for label in known):
        number = int(name)
    by_text = options.index(written) if written in options and not isinstance(value, int) else None
    return by_text, number if 0 <= number < len(options) else None


def index_of(value: Any, options: list[str]) -> int | None:
    """The number that a right option is given as, among options without labels; None: it is a letter or a text."""
    [value] = value if isinstance(value, list | tuple) and len(value) == 1 else [value]
    name = _code(value)
    is_text = str(value) in options and not isinstance(value, int)
    return int(name) if name.isdecimal() and len(name) < 3 and not is_text else None


def _code(value: Any) -> str:
    """A label, a letter in capitals, or a whole number, as it may be written."""
    name = str(whole(value)).strip().upper()
    return name[:-2] if WHOLE.fullmatch(name) else name


def check_number(value: Any, name: str, options: list[str], columns: Sequence[str], *, told: bool) -> None:
    """See that a number is no index from 0, where the fields that hold the options count from 1.

    Args:
        value, name: the right option, and the field that gives it.
        columns: the fields of the options.
        told: the number is that of a field, as the user or its name says.

    Raises:
        RowError: it may be one.
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        [value] = value
    if isinstance(value, list | tuple) or blank(value):
        return
    by_text, number = readings(value, options, column_labels(tuple(columns)))
    _, index = readings(value, options, [])
    named = f"name the options, which then count from 0 (--field options={','.join(columns)})"
    if number is None and by_text is None and index is not None:
        raise RowError("bad_option", f"{name} is {value!r}, and the fields of the options count from 1: {named}")
    if not told and number is not None and index is not None and number != index:
        raise RowError(
            "bad_option",
            f"{name} is {value!r}, which reads both as the number of a field and as an index from 0: if it is the "
            f"former, say so (--field answer={name}), else {named}",
        )


def agrees(answer: Any, right: int, options: list[str], labels: list[str]) -> bool:
    """Whether an answer names the right option, or none: it is an explanation."""
    if blank(answer) or str(answer).strip() == options[right]:
        return True
    try:
        named = [options[number] for number in readings(answer, options, labels) if number is not None]
    except RowError:
        return True
    return not named or options[right] in named
