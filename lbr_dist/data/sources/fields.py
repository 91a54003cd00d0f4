"""One row of any source to one `Record`: find the fields, check them, name what is wrong.

Field names differ by data set, so common names are recognised, a mapping overrides them, and the kind of a source
follows from the fields that its rows have. A row that cannot be used raises `RowError` with a reason from a short fixed
list, because reasons are counted and reported; nothing is repaired silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lbr_dist.data.record import Record, content_id, exact
from lbr_dist.data.sources import field_names, row_values
from lbr_dist.data.sources.chat import unfold
from lbr_dist.data.sources.field_names import CODED, INDICES, NAMES, Finder, listed
from lbr_dist.data.sources.options import agrees, check_number, choose, index_of, options_of
from lbr_dist.data.sources.questions import each_question
from lbr_dist.data.sources.recognised import may_ask, read_as, refuse_nested, refuse_options_within, untold
from lbr_dist.data.sources.row_values import RowError
from lbr_dist.data.sources.verdicts import right_ones, verdict

FIRST_OPTION = "\nA. "
"""Between the stem and the options of a multiple-choice question."""


class Converter:
    """Rows of one source to records.

    Args:
        kind: one of `KINDS`, or None: the first row whose fields tell decides for the whole source.
        fields: role to field name; `options` may name several fields, joined by commas.
        max_chars: longest question, answer, option or text, in characters.
        domain, source: for rows that have no such field.
        cells: the rows are of a CSV file, where a list can only be written as a text.
        detected: an earlier row told `kind`, not the user.
        external: the rows are of an evaluation set from elsewhere, to which `fields` need not apply.
    """

    def __init__(
        self,
        kind: str | None,
        fields: Mapping[str, str],
        *,
        max_chars: int,
        domain: str = "",
        source: str = "",
        cells: bool = False,
        detected: bool = False,
        external: bool = False,
    ) -> None:
        self.kind, self.max_chars = kind, max_chars
        self._told = kind is not None and not detected
        self.domain, self.source = domain, source
        self._cells = cells
        self._finder = Finder(fields, lenient=external)
        self.indices = set[str]()
        """Which indices of right options rows had: that of the `first`, of one `inside`, or `past` the last by one."""

    @property
    def met(self) -> set[str]:
        """Roles of `fields` whose field a row had."""
        return self._finder.met

    def __call__(self, row: Mapping[str, Any]) -> Record:
        """The row's record.

        Raises:
            RowError: it cannot be used.
        """
        self._finder.meet(row)
        row = self._unfolded(row)
        if self.kind is None:
            self.kind = self._kind_of(row)
        elif not self._told:
            self._refuse_other(row)
        if self.kind == "corpus":
            text = self._joined(self._get(row, "text"), "text")
            return Record(id=self._id(row, text), text=text)
        if self.kind == "multiple-choice":
            question, answer = self._multiple_choice(row)
            more: tuple[str, ...] = ()
        else:
            question = self._question(row)
            answer, more = self._answer(row)
            self._refuse_wrong(row)
        negatives = self._texts(self._get(row, "negatives", optional=True), "negatives")
        positives = (*more, *self._texts(self._get(row, "positives", optional=True), "positives"))
        positives = tuple(text for text in dict.fromkeys(positives) if text != answer)
        return Record(
            id=self._id(row, question, answer, *negatives, "", *positives),
            question=question,
            answer=answer,
            domain=self._label(row, "domain", self.domain),
            source=self._label(row, "source", self.source),
            negatives=negatives,
            positives=positives,
        )

    def questions(self, row: Mapping[str, Any]) -> Sequence[Mapping[str, Any] | RowError]:
        """The row, or one for each of the questions that it asks."""
        return each_question(row, self._finder)

    def question_alone(self, row: Mapping[str, Any]) -> Record | None:
        """The question of a row whose answer cannot be used (withheld, as in a test set, or empty), as a plain text.

        None: the row has no question that can be used either.
        """
        try:
            row = self._unfolded(row)
            if self.kind == "corpus":
                return None
            question = self._text(self._get(row, "question"), "question")
            if self._holds(row, "options"):
                options, _ = options_of(self._get(row, "options"), self.max_chars)
                question = self._with_options(question, options)
            return Record(id=self._id(row, question), text=question)
        except RowError:
            return None

    def read_as(self, row: Mapping[str, Any], entity: str | None = None) -> str:
        """In words, the kind and the fields of a row of which a record was made; `entity` is the field of its group."""
        return read_as(row, self._unfolded(row), self.kind, self._finder, entity)

    def detect(self, row: Mapping[str, Any]) -> str:
        """The kind that the row's fields tell.

        Raises:
            RowError: they tell none.
        """
        return self._kind_of(self._unfolded(row))

    def _kind_of(self, row: Mapping[str, Any]) -> str:
        has = {role: self._finder.find(row, role) is not None for role in ("question", "answer", "text")}
        refuse_options_within(row, self._finder)
        if has["question"] and self._holds(row, "options"):
            return "multiple-choice"
        if has["question"] and has["answer"]:
            return "corpus" if self._is_text(row) else "question-answer"
        if has["question"] and has["text"]:
            return "query-document"
        if has["text"]:
            self._refuse_unasked(row)
            return "corpus"
        raise RowError("missing_field", untold(row, self._finder, cells=self._cells))

    def _refuse_other(self, row: Mapping[str, Any]) -> None:
        """See that the row holds nothing that its kind, which an earlier row told, would leave out."""
        if self.kind == "multiple-choice":
            return
        roles = ("question", "answer") if self.kind == "corpus" else ("options",)
        role = next((role for role in roles if self._holds(row, role)), None)
        if role is None or (self.kind == "corpus" and not self._holds(row, "text")):
            if self.kind == "corpus" and "text" not in self._finder.fields:
                refuse_nested(row)
            return
        if role == "answer":
            self._refuse_unasked(row)
        else:
            raise RowError(
                "wrong_type",
                f"the row has {role} ({','.join(self._finder.find(row, role) or ())}), and an earlier one told that "
                f"these are of kind {self.kind}: give those of another kind a file of their own, or name one kind for "
                "all (--kind)" + "; that one had a text and no question" * (self.kind == "corpus"),
            )

    def _holds(self, row: Mapping[str, Any], role: str) -> bool:
        names = self._finder.find(row, role)
        return names is not None and not row_values.nothing(field_names.value(row, names))

    def _refuse_unasked(self, row: Mapping[str, Any]) -> None:
        """See that no answer would be left out with the question that is not recognised, nor the question itself."""
        names = self._finder.find(row, "answer")
        if "text" in self._finder.fields:
            return
        refuse_nested(row)
        if names is None:
            return
        [name, *_] = names
        if names == self._finder.find(row, "text"):
            asked = may_ask(row, name)
            if asked is not None:
                raise RowError(
                    "missing_field",
                    f"{name} would be a text, and {asked} be left out (the row has {listed(row)}): name the question, "
                    f"for example --field question={asked}; or, for the texts alone, --kind corpus",
                )
        elif name.lower() not in ("document", "passage"):  # a text itself
            raise RowError(
                "missing_field",
                f"an answer ({name}) and no question among the fields {listed(row)}: name the question, for "
                "example --field question=text; or, for the texts alone, --kind corpus",
            )

    def _unfolded(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with a conversation as question and answer, unless the user named their fields."""
        if "question" in self._finder.fields or self.kind == "corpus":
            return row
        try:
            return unfold(row)
        except ValueError as error:
            raise RowError("wrong_type", str(error)) from None

    def _get(self, row: Mapping[str, Any], role: str, optional: bool = False) -> Any:
        names, named = self._finder.find(row, role), "answer" if role in ("right", "document") else role
        if names is not None:
            value = field_names.value(row, names)
            if role not in ("question", "answer", "document", "text"):
                return value
            parts = value if len(names) > 1 else [value]
            if self._cells:
                parts = [row_values.cell(part, named) for part in parts]
            if len(parts) == 1:
                return parts[0]
            return "\n".join(self._joined(part, role) for part in parts if part != [] and not row_values.blank(part))
        if optional:
            return None
        wanted = self._finder.fields.get(named) or ", ".join(NAMES[role])
        kind = "" if self._told else f"; an earlier row told that these are of kind {self.kind}: see --kind"
        what = "right option (--field answer=NAME)" if role == "right" else role
        raise RowError("missing_field", f"no {what}: looked for {wanted}; the row has {listed(row)}{kind}")

    def _is_text(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has a text, and nothing in the fields of a question and an answer."""
        return self._holds(row, "text") and not (self._holds(row, "question") or self._holds(row, "answer"))

    def _question(self, row: Mapping[str, Any]) -> str:
        try:
            return self._text(self._get(row, "question"), "question")
        except RowError as error:
            if error.reason != "empty" or not self._is_text(row):
                raise
            [name, *_] = self._finder.find(row, "text") or ()
            raise RowError(
                "empty",
                f"{error.detail}, and the row has a text ({name}): give such rows a source of their own, of kind "
                "corpus (corpus=FILE)",
            ) from None

    def _answer(self, row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        """The answer and, where the field holds a list, the further answers."""
        value = self._get(row, "document" if self.kind == "query-document" else "answer")
        if isinstance(value, list | tuple) or row_values.holds_list(value):
            if "answer" not in self._finder.fields and field_names.look_up(row, "correct_answer_id") is not None:
                raise RowError(
                    "wrong_type",
                    "the row has a list of answers and a correct_answer_id: read them as options (--kind "
                    "multiple-choice --field options=answers --field answer=correct_answer_id)",
                )
            if self._finder.fields.get("label") != "":
                value = right_ones(value)
            answers = dict.fromkeys(self._texts(value, "answer"))
            if not answers:
                beside = "answer" not in self._finder.fields and self._holds(row, "negatives")
                hint = ": name that of the negatives, or leave these aside (--field answer=NAME --field negatives=)"
                raise RowError("empty", "answer is empty" + hint * beside)
            first, *more = answers
            return first, tuple(more)
        return self._text(value, "answer"), ()

    def _refuse_wrong(self, row: Mapping[str, Any]) -> None:
        """See that the row's label, where data sets hold right and wrong answers, does not call the answer wrong."""
        value = self._get(row, "label", optional=True)
        if verdict(value) is False:
            name = ",".join(self._finder.find(row, "label") or ())
            raise RowError(
                "wrong_answer",
                f"{name} is {value}, so this is no answer: leave such rows out (--max-bad-share 1), or, if that is not "
                "what the field means, leave it aside (--field label=)",
            )

    def _multiple_choice(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Stem and options, one per line with a letter, as the question; the right option as the answer."""
        stem = self._text(self._get(row, "question"), "question")
        options, labels = options_of(self._get(row, "options"), self.max_chars)
        if not labels:
            columns = self._finder.find(row, "options") or ()
            labels = field_names.column_labels(columns)
            if "options" in self._finder.fields and labels[:1] == ["1"]:
                labels = []
            if labels[:1] == ["1"]:
                [name, *_] = self._finder.find(row, "right") or [""]
                told = name.lower() not in INDICES or name == self._finder.fields.get("answer")
                check_number(self._get(row, "right"), name, options, columns, told=told)
        return self._with_options(stem, options), options[self._right(row, options, labels)]

    def _right(self, row: Mapping[str, Any], options: list[str], labels: list[str]) -> int:
        """Number of the right option, which must agree with an answer beside it."""
        value = self._get(row, "right")
        [name, *_] = self._finder.find(row, "right") or ()
        if not labels and (index := index_of(value, options)) is not None and index <= len(options):
            self.indices.add("first" if index == 0 else "inside" if index < len(options) else "past")
        right = choose(value, options, labels, coded=name.lower() in CODED)
        if name.lower() != "answer" and name != self._finder.fields.get("answer"):
            answer = field_names.look_up(row, "answer")
            if not agrees(answer, right, options, labels):
                raise RowError(
                    "bad_option",
                    f"answer is {str(answer)[:40]!r} and {name} is {value!r}, another option: name the field of the "
                    "right one (--field answer=NAME)",
                )
        return right

    def _with_options(self, stem: str, options: list[str]) -> str:
        lines = [f"{chr(ord('A') + number)}. {option}" for number, option in enumerate(options)]
        return self._text("\n".join([stem, *lines]), "question")  # with `FIRST_OPTION` behind the stem

    def _joined(self, value: Any, role: str) -> str:
        """The text of a field; where it is a plain text, a list is its parts."""
        if role == "text" and isinstance(value, list):
            value = "\n".join(self._texts(value, role))
        return self._text(value, role)

    def _text(self, value: Any, role: str) -> str:
        return row_values.text(value, role, self.max_chars)

    def _texts(self, value: Any, role: str) -> tuple[str, ...]:
        return row_values.texts(value, role, self.max_chars)

    def _label(self, row: Mapping[str, Any], role: str, default: str) -> str:
        value = self._get(row, role, optional=True)
        if row_values.blank(value) or value in ([], {}):
            return default
        return exact(self._text(value if isinstance(value, str) else json.dumps(value, default=str), role))

    def _id(self, row: Mapping[str, Any], *content: str) -> str:
        value = self._get(row, "id", optional=True)
        name = row_values.identifier(value)
        return content_id(*content) if name is None else self._text(name, "id")
