"""Whether an answer is right, where data sets hold wrong ones too: by a label of the row, or by one of each answer.

{"question": ..., "answer": ..., "label": 0}                                            WikiQA
{"question": ..., "answers": [{"text": ..., "label": 0}, {"text": ..., "label": 1}]}    MultiRC
{"question": ..., "answers": [{"text": ..., "selected": false}, ...]}                   Stack Exchange, preferences
"""

from __future__ import annotations

import re
from typing import Any

from lbr_dist.data.sources.field_names import NAMES
from lbr_dist.data.sources.row_values import RowError, holds_list, holds_text

YES = ("true", "t", "yes", "y", "right", "correct", "relevant", "duplicate")
NO = (
    *("false", "f", "no", "n", "wrong", "incorrect", "not correct", "irrelevant", "not relevant", "non relevant"),
    *("not duplicate", "not a duplicate", "not entailment"),
)
"""Words of a label, in small letters and with spaces between them."""
OF_EACH = (*NAMES["label"], "isanswer", "is_answer", "iscorrect", "correct", "is_selected", "selected")
"""Fields, in small letters, in which each of several answers may have its label."""


def verdict(label: Any) -> bool | None:
    """Whether a label calls its answer right (a number up to 1 does), or wrong (one that is not above 0).

    None: it says something else (a topic, a class, a grade), or nothing.
    """
    try:
        number = float(label)
    except (TypeError, ValueError, OverflowError):
        words = " ".join(re.split(r"[\W_]+", label.lower())).strip() if isinstance(label, str) else ""
        return True if words in YES else False if words in NO else None
    return False if number <= 0 else True if number <= 1 else None


def right_ones(answers: Any) -> Any:
    """Of a list of answers, or of an object of lists, those that their label does not call wrong; any other as it is.

    Raises:
        RowError: all of them are called wrong.
    """
    items, field = _items(answers), label_of_each(answers)
    if field is None:
        return answers
    right = [item for item in items if not (holds_text(item) and verdict(item.get(field)) is False)]
    if not right:
        raise RowError(
            "wrong_answer",
            f"{field} calls each of the answers wrong: leave such rows out (--max-bad-share 1), or, if that is not "
            "what the field means, leave it aside (--field label=)",
        )
    return right


def label_of_each(answers: Any) -> str | None:
    """The field in which each of several answers has a label; None: they have none."""
    fields = {str(name).lower(): name for item in _items(answers) if holds_text(item) for name in item}
    return next((fields[name] for name in OF_EACH if name in fields), None)


def _items(answers: Any) -> list[Any]:
    """The answers of a list, or of an object of lists, as `datasets` makes it of a list of objects."""
    if not holds_list(answers):
        return list(answers) if isinstance(answers, list | tuple) else []
    count = len(answers["text"])
    lists = {key: held for key, held in answers.items() if isinstance(held, list | tuple) and len(held) == count}
    return [dict(zip(lists, parts, strict=True)) for parts in zip(*lists.values(), strict=True)]
