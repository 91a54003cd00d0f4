from __future__ import annotations

import json
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from lbr_dist.data.record import Record, batches, content_id, exact, normalise, normalised_hash
from lbr_dist.data.sources.entity import Entity
from lbr_dist.data.sources.field_names import check_fields
from lbr_dist.data.sources.fields import Converter
from lbr_dist.data.sources.row_values import RowError, identifier
from lbr_dist.errors import UserError


def convert(row: dict, kind: str | None = None, fields: dict | None = None, max_chars: int = 100) -> Record:
    return Converter(kind, fields or {}, max_chars=max_chars, domain="med", source="file")(row)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Aspirin.", "aspirin"),
        ("  two \t words\n", "two words"),
        ("Ｆｕｌｌ　ｗｉｄｔｈ", "full width"),
        ("“Straße”!", "strasse"),
        ("(quoted)", "quoted"),
        ("ﬁne", "fine"),
        ("acetyl\u00adsalicylic\u200b", "acetylsalicylic"),
        ("\u200fשלום", "שלום"),
        ("می\u200cخواهم", "میخواهم"),
        ("“Crohn’s”, 5′ – 3′", "\"Crohn's\", 5' - 3'"),
        ("COVID\u201119 at \u22125", "covid-19 at -5"),
        ("İlaç", "ilaç"),
        ("IŞIK", "ışık"),
        ("ΔΙΑΒΗΤΗΣ", "διαβήτης"),
        ("الأعـراض", "الاعراض"),
        ("\u06a9\u062a\u0627\u0628\u06cc", "\u0643\u062a\u0627\u0628\u064a"),  # Persian and Arabic letters
        ("٢٠ ملغ", "20 ملغ"),
    ],
)
def test_texts_that_count_as_the_same(a: str, b: str) -> None:
    assert normalise(a) == normalise(b)
    assert normalised_hash(a) == normalised_hash(b)


@pytest.mark.parametrize(("a", "b"), [("C#", "C"), ("5%", "5"), ("-5", "5"), ("?", "!"), ("a b", "ab")])
def test_texts_that_differ(a: str, b: str) -> None:
    assert normalise(a) != normalise(b)


def test_the_strict_form_keeps_what_makes_an_answer_right() -> None:
    assert exact(" cafe\u0301\tau  lait ") == "café au lait"
    for text in ("C1CCCCC1", "c1ccccc1", "10²", "5!", "(0, 1)", "SHH", "don’t"):
        assert exact(text) == text


def test_normal_form_is_stable_and_never_empty() -> None:
    for text in ["ŉ", "İstanbul.", "ΐ´s", "آ\u0654", "...", "„x“", "ﷺ", "e\u0301", "ΑΣ", "a . ", "\u200b"]:
        once = normalise(text)
        assert once
        assert normalise(once) == once


def test_answer_hash_fits_int64_and_never_changes() -> None:
    assert normalised_hash("Aspirin") == -6310449035805984757  # in every prepared set: changing it needs a new format
    assert all(-(1 << 63) <= normalised_hash(str(i)) < 1 << 63 for i in range(100))
    assert any(normalised_hash(str(i)) < 0 for i in range(100))


def test_json_round_trip_has_only_the_fields_of_its_form() -> None:
    full = Record("1", question="q", answer="ä", domain="d", source="s", negatives=("n",), positives=("p",))
    plain = Record("2", text="t")
    assert Record.from_dict(full.as_dict()) == full
    assert plain.as_dict() == {"id": "2", "text": "t"}
    assert full.to_json() == (
        '{"answer":"ä","domain":"d","id":"1","negatives":["n"],"positives":["p"],"question":"q","source":"s"}'.encode()
    )


def test_batches_are_bounded_by_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbr_dist.data.record.BATCH_CHARACTERS", 10)
    monkeypatch.setattr("lbr_dist.data.record.BATCH", 3)
    lengths = [1, 1, 1, 12, 4, 6, 1]
    made = [[r.characters for r in batch] for batch in batches(Record("", text="x" * n) for n in lengths)]
    assert made == [[1, 1, 1], [12], [4, 6], [1]]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"question": "q", "answer": "a"}, "question-answer"),
        ({"prompt": "q", "response": "a"}, "question-answer"),
        ({"query": "q", "passage": "a"}, "question-answer"),
        ({"query": "q", "text": "a"}, "query-document"),
        ({"question": "q", "choices": ["a", "b"], "answer": 0}, "multiple-choice"),
    ],
)
def test_kind_and_fields_are_recognised(row: dict, kind: str) -> None:
    converter = Converter(None, {}, max_chars=100)
    record = converter(row)
    assert converter.kind == kind
    assert (record.question or "").startswith("q")
    assert record.answer == "a"


def test_plain_text_and_mapping_and_defaults() -> None:
    assert convert({"content": "t"}) == Record(content_id("t"), text="t")
    record = convert(
        {"id": 7, "ask": "q", "answer": "wrong", "tell": "a"}, fields={"question": "ask", "answer": "tell"}
    )
    assert record == Record("7", question="q", answer="a", domain="med", source="file")
    with pytest.raises(UserError, match=r"--field frage=x: no such role; the roles are question"):
        check_fields({"frage": "x"})


def test_missing_id_is_made_of_the_content() -> None:
    first = convert({"question": "q", "answer": "a"})
    assert first.id == convert({"query": "q", "output": "a", "id": ""}).id
    assert first.id != convert({"question": "q", "answer": "b"}).id
    assert content_id("ab", "c") != content_id("a", "bc")
    assert first.id == convert({"question": "q", "answer": "a", "id": float("nan")}).id  # what pandas makes of none
    for given in (7.0, Decimal(7), Decimal("7.00")):
        assert convert({"question": "q", "answer": "a", "id": given}).id == "7"
    name = "12345678-1234-5678-1234-567812345678"
    assert convert({"question": "q", "answer": "a", "id": UUID(name)}).id == name
    with pytest.raises(RowError, match="id is a number, not a text or a whole number"):
        convert({"question": "q", "answer": "a", "id": 7.5})


@pytest.mark.parametrize(
    ("options", "right"),
    [
        (["x", "right"], 1),
        (["x", "right"], "B"),
        (["x", "right"], "b"),
        (["x", "right"], "right"),
        (["x", "right"], "1"),
        (["x", "right"], 1.0),
        (["x", "right"], "1.0"),
        (["x", "right"], Decimal(1)),
        ({"text": ["x", "right"], "label": ["1", "2"]}, "2"),
        ({"text": ["x", "right"], "label": ["1", "2"]}, "2.0"),
        ({"text": ["x", "right"], "label": [1, 2]}, 2.0),
        ({"text": ["x", "right"], "label": [1, 2]}, 2),
        ([{"text": "x", "label": "1"}, {"text": "right", "label": "2"}], "2"),
        ({"A": "x", "B": "right"}, "B"),
        ({"1": "x", "2": "right"}, 2),
        ({"A": "x", "B": "right", "C": None}, "B"),
        ({"A": "x", "B": "right", "C": float("nan"), "D": " "}, "B"),
        ({"C": "x", "D": "right"}, "d "),
        ({"text": ["x", "right", None, ""], "label": ["A", "B", "C", "D"]}, "B"),
        ({"text": ["x", "right"], "label": None}, 1),
        ('["x", "right"]', "1"),
    ],
)
def test_multiple_choice(options: object, right: object) -> None:
    record = convert({"question": "stem", "options": options, "answer": right})
    assert record.question == "stem\nA. x\nB. right"
    assert record.answer == "right"


def test_conversations() -> None:
    turns = [
        ("system", "be kind"),
        ("user", "fever?"),
        ("assistant", "since when?"),
        ("user", "today"),
        ("assistant", "rest"),
    ]
    openai = {"id": "1", "messages": [{"role": role, "content": text} for role, text in turns]}
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = {"id": "1", "conversations": [{"from": names[role], "value": text} for role, text in turns]}
    for row in (openai, sharegpt, {**openai, "messages": json.dumps(openai["messages"])}):
        record = convert(row)
        assert (record.question, record.answer) == ("fever?\nsince when?\ntoday", "rest")
    dolly = {"instruction": "When?", "context": "In 2000.", "response": "2000", "category": "closed_qa"}
    assert convert(dolly).question == "When?\nIn 2000."
    assert convert({**dolly, "context": ""}).question == "When?"
    alpaca = {"instruction": "Answer the patient.", "input": "fever?", "output": "rest"}
    assert convert(alpaca).question == "Answer the patient.\nfever?"
    assert convert({**alpaca, "input": ""}).question == "Answer the patient."
    assert convert(alpaca, fields={"question": "input"}).question == "fever?"
    for told in ("", " ", None):
        assert convert({**alpaca, "instruction": told}).question == "fever?"
    for row in (openai, sharegpt, dolly, alpaca):  # as a spreadsheet writes them
        assert convert({name.title(): value for name, value in row.items()}) == convert(row)
    assert convert({"Messages": None, **openai}).answer == "rest"
    assert convert({"id": "1", "Messages": 12, "text": "a forum's thread"}).text == "a forum's thread"
    assert convert({**openai, "Question": "q", "Answer": "a"}).answer == "a"


@pytest.mark.parametrize("said", [None, "", "\n", []])
def test_conversations_with_parts_and_tools(said: object) -> None:
    turns: list[dict] = [
        {"role": "user", "content": [{"type": "text", "text": "how much"}, {"type": "text", "text": "is 6 x 7?"}]},
        {"role": "assistant", "content": said, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    found = convert({"messages": turns})
    assert (found.question, found.answer) == ("how much\nis 6 x 7?\n42", "It is 42.")
    assert convert({"messages": [*turns, turns[2], turns[1]]}) == found


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ("hello", "messages is not a list of turns"),
        ({"role": "user"}, "messages is not a list of turns"),
        ([{"role": "user", "content": "a"}], r"messages: no reply \(assistant"),
        ([{"role": "assistant", "content": "a"}], "no reply"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "messages, turn 1: not an object with role and content",
        ),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "messages, turn 2: not an object"),
    ],
)
def test_conversations_of_another_form(turns: object, problem: str) -> None:
    with pytest.raises(RowError, match=problem):
        convert({"messages": turns})


def test_names_in_capitals_and_options_in_fields_of_their_own() -> None:
    assert convert({"ID": "7", "Question": "q", "Answer": "a", "answer_note": "x"}).id == "7"
    row = {"question": "q", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2, "exp": "why"}
    assert convert(row).answer == "y"
    ceval = {"id": 0, "question": "q", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "C", "explanation": ""}
    assert convert(ceval).answer == "y"
    assert (convert(ceval).question or "").endswith("\nC. y\nD. z")
    assert convert({**ceval, "E": "v", "answer": "E"}).answer == "v"
    with pytest.raises(RowError, match="'4' is none of the 4 options; a number counts from 0, unless"):
        convert({**row, "cop": 4})


def test_options_in_columns_end_where_the_rest_is_blank() -> None:
    stem = {"question": "q", "A": "x", "B": "y"}
    for row in ({**stem, "C": None, "D": "", "answer": "B"}, {**stem, "C": "z", "D": "w", "E": "", "answer": "B"}):
        assert convert(row).answer == "y"
    with pytest.raises(RowError, match="options is empty"):
        convert({**stem, "C": "", "D": "w", "answer": "D"})


@pytest.mark.parametrize(("given", "second"), [(7, "7:2"), (0, "0:2"), ("", None), (None, None), (float("nan"), None)])
def test_the_second_question_of_a_row_has_an_id_of_its_own(given: object, second: str | None) -> None:
    """Where the row has one: pandas writes NaN where there is none."""
    row = {"id": given, "questions": ["one", "two"], "answer": "a"}
    _, other = Converter(None, {}, max_chars=9).questions(row)
    assert not isinstance(other, RowError)
    assert identifier(other["id"]) == second


@pytest.mark.parametrize("questions", [[{"input_text": "q", "turn_id": 1}], {"a": "q"}, [["q"], [7]]])
def test_questions_that_are_no_texts(questions: object) -> None:
    """CoQA, as it is published, has objects."""
    [row] = Converter(None, {}, max_chars=9).questions({"questions": questions, "answer": "a"})
    assert not isinstance(row, RowError)
    with pytest.raises(RowError, match=r"question is .*, not a text"):
        convert(dict(row))


@pytest.mark.parametrize("field", ["options", "negatives", "questions"])
def test_what_is_nested_without_end_is_a_text(field: str) -> None:
    row = {"question": "q", "answer": "a", "options": ["a", "b"], field: "[" * 100_000}
    converter = Converter("multiple-choice" if field == "options" else "question-answer", {}, max_chars=9)
    for one in converter.questions(row):
        with pytest.raises(RowError, match=r"has 100000 characters|options is a text, not a list"):
            converter({key: value for key, value in one.items() if key != "question" or field != "questions"})


def test_forms_of_well_known_sets() -> None:
    squad = {"id": "1", "context": "c", "question": "q?", "answers": {"text": ["a", "b", "a"], "answer_start": [1, 2]}}
    assert convert(squad).answer == "a"
    assert convert(squad).positives == ("b",)
    tevatron = {
        "query": "q?",
        "positive_passages": [{"docid": "1", "title": "T", "text": "one"}, {"docid": "2", "title": "", "text": "two"}],
        "negative_passages": [{"docid": "3", "title": "N", "text": "three"}],
    }
    found = convert(tevatron)
    assert (found.answer, found.positives, found.negatives) == ("T one", ("two",), ("N three",))
    columns = {"docid": ["1", "2", "4"], "title": ["T", "", None], "text": ["one", "two", ""]}
    assert convert({**tevatron, "positive_passages": columns}) == found
    mined = {"anchor": "q", "positive": "a", "negative_1": "x", "negative_2": "y"}
    assert convert(mined).negatives == ("x", "y")
    assert convert({"question": "q", "context": {}, "long_answer": "long", "final_decision": "yes"}).answer == "long"
    code = convert({"func_documentation_string": "adds", "func_code_string": "def add(): ..."})
    assert (code.question, code.answer) == ("adds", "def add(): ...")
    assert convert({"input": "q", "output": "a"}).question == "q"
    assert convert({"question": "q", "choices": ["x", "y"], "correct_answer": "y"}).answer == "y"
    openbook = {"id": "7", "question_stem": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
    assert convert(openbook).answer == "y"


def test_a_text_in_parts() -> None:
    assert convert({"doc_id": 1, "title": "t", "abstract": ["One.", "", "Two."]}).text == "One.\nTwo."  # SciFact
    parts = {"text": "title,abstract"}
    assert convert({"title": "t", "abstract": ["One.", "Two."]}, fields=parts).text == "t\nOne.\nTwo."
    assert convert({"title": "t", "abstract": []}, fields=parts).text == "t"
    assert convert({"paper_id": "p", "abstract": [{"text": "One.", "section": "Abstract"}]}).text == "One."  # S2ORC
    for abstract, problem in (([], "text is empty"), ([1], "text is a number"), (["x" * 60, "y" * 60], "more than")):
        with pytest.raises(RowError, match=problem):
            convert({"abstract": abstract})


def test_bioasq() -> None:
    row = {"id": "5a", "type": "summary", "body": "q?", "ideal_answer": ["a", "b"], "snippets": [{"text": "s"}]}
    found = convert(row)
    assert (found.id, found.question, found.answer, found.positives) == ("5a", "q?", "a", ("b",))
    assert convert({"title": "t", "body": "no question"}).text == "no question"


def test_a_mapping_leads_into_objects() -> None:
    trivia = {"question": "q?", "answer": {"value": "Paris", "aliases": ["Paname"]}}
    with pytest.raises(RowError, match=r"--field answer=FIELD\.PART"):
        convert(trivia)
    assert convert(trivia, fields={"answer": "answer.value"}).answer == "Paris"
    assert convert({"q.text": "dotted", "answer": "a"}, fields={"question": "q.text"}).question == "dotted"
    with pytest.raises(RowError, match=r"looked for answer\.other"):
        convert(trivia, "question-answer", fields={"answer": "answer.other"})


def test_labels_of_any_type_and_fields_that_are_to_be_ignored() -> None:
    row = {"question": "q", "answer": "a", "domain": 3, "source": ["x", "y"], "negatives": 0}
    with pytest.raises(RowError, match="negatives is a number"):
        convert(row)
    found = convert(row, fields={"negatives": ""})
    assert (found.domain, found.source, found.negatives) == ("3", '["x", "y"]', ())
    assert convert({**row, "source": {}, "negatives": None}).source == "file"


@pytest.mark.parametrize(
    ("answer", "written"),
    [
        (11760, "11760"),
        (-0.5, "-0.5"),
        (2.0, "2.0"),
        (4e-05, "4e-05"),
        (Decimal("0.50"), "0.50"),
        (0.10000000149011612, None),  # 0.1 in 32 bits
        (float("inf"), None),
    ],
)
def test_a_number_is_an_answer_where_it_is_as_written(answer: Any, written: str | None) -> None:
    if written is not None:
        assert convert({"question": "q", "answer": answer}).answer == written
        return
    with pytest.raises(RowError, match="answer is a number, not a text: write it as one, in quotes"):
        convert({"question": "q", "answer": answer})


def test_a_right_option_in_a_list() -> None:
    row = {"question": "q", "choices": ["x", "y", "z"]}
    assert convert({**row, "answer": ["c"]}).answer == "z"
    assert convert({**row, "answer_idx": [1]}).answer == "y"
    with pytest.raises(RowError, match=r"has 2 right options, where one is expected: .*--max-bad-share 1"):
        convert({**row, "answer": ["a", "c"]})


def test_multiple_choice_over_several_fields() -> None:
    row = {"question": "stem", "opa": "x", "opb": "right", "cop": 1}
    assert convert(row, "multiple-choice", {"options": "opa,opb", "answer": "cop"}).answer == "right"


def test_lists_of_answers_and_negatives() -> None:
    record = convert({"query": "q", "positive": ["a", "b", "", " "], "negative": "n"})
    assert (record.answer, record.positives, record.negatives) == ("a", ("b",), ("n",))
    marked = [{"text": "", "answer_start": -1}, {"text": "a"}, "\u200b", {"text": "b"}]  # by several annotators
    assert convert({"question": "q", "answers": marked}).positives == ("b",)
    row = {"question": "q", "answer": "a", "negatives": [{"title": "T", "text": ""}, {"title": "", "text": " "}]}
    assert convert(row).negatives == ("T ",)


def test_answers_of_a_list_that_are_called_wrong_are_left_out() -> None:
    multirc = [{"text": "x", "label": 0}, {"text": "a", "label": 1}, {"text": "b", "label": 1}]
    columns = {"text": ["x", "a", "b"], "is_correct": [False, True, None], "idx": [1, 2]}
    for answers in (multirc, columns, [{"text": "x", "Selected": "false"}, {"text": "a", "Selected": True}, "b"]):
        found = convert({"question": "q", "answers": answers})
        assert (found.answer, found.positives) == ("a", ("b",))
        assert convert({"question": "q", "answers": answers}, fields={"label": ""}).answer == "x"
    with pytest.raises(RowError, match=r"label calls each of the answers wrong: .*--max-bad-share 1") as bad:
        convert({"question": "q", "answers": multirc[:1]})
    assert bad.value.reason == "wrong_answer"
    asked = Converter("question-answer", {}, max_chars=9)
    assert "answer = answers" in asked.read_as({"question": "q", "answers": multirc[:1]})  # withheld, in a test set


def test_an_answer_beside_negatives_is_what_they_are_negatives_to() -> None:
    row = {"query": "q", "answers": ["short"], "pos": ["a long passage"], "neg": ["another long one"]}
    assert convert(row).answer == "a long passage"
    assert convert(row, fields={"answer": "answers"}).answer == "short"
    assert convert(row, fields={"negatives": ""}).answer == "short"
    assert convert({"question": "q", "answer": "a", "negative_1": "n"}).answer == "a"
    with pytest.raises(RowError, match=r"answer is empty: .*\(--field answer=NAME --field negatives=\)"):
        convert({**row, "pos": []})


def test_further_right_answers_are_there_once_and_without_the_answer() -> None:
    row = {"query": "q", "positives": ["p1", "p2"], "negatives": ["n"]}
    found = convert(row, fields={"answer": "positives"})
    assert (found.answer, found.positives) == ("p1", ("p2",))


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"passage": {"text": "t", "questions": [{"question": "q?", "answers": []}]}}, r"passage\.questions"),
        ({"passage": "t", "qa_pairs": [{"Query": "q?", "answer": "a"}]}, "qa_pairs"),
        ({"text": "t", "parts": [[{"asked": {"items": [{"question": "q?"}]}}]]}, r"parts\.asked\.items"),
    ],
)
def test_questions_in_a_text_are_not_left_out(row: dict, name: str) -> None:
    texts = Converter(None, {}, max_chars=100)
    texts({"text": "t", "links": [{"anchor": "x", "question": ""}]})
    for converter in (Converter(None, {}, max_chars=100), texts):
        with pytest.raises(RowError, match=rf"{name} is a list of objects with questions, .*: write one row for each"):
            converter(row)
    assert convert(row, "corpus").text == "t"


def test_a_question_with_options_in_an_object() -> None:
    arc = {"question": {"stem": "q", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]}}
    fields = {"question": "question.stem", "options": "question.choices"}
    for row in (arc, {**arc, "answerKey": "B"}):
        with pytest.raises(RowError, match=r"--field question=question\.stem --field options=question\.choices"):
            convert(row)
    assert convert({**arc, "answerKey": "B"}, fields=fields).answer == "y"
    half = Converter(None, {"question": "question.stem", "answer": "answerKey"}, max_chars=100)
    half({**arc, "answerKey": "B"})
    assert half.read_as({**arc, "answerKey": "B"}).endswith("; not used: question.choices)")


def test_nan_is_nothing() -> None:
    nan = float("nan")
    record = convert(
        {"question": "q", "answer": "a", "negatives": nan, "negative_1": nan, "domain": nan, "source": nan}
    )
    assert (record.negatives, record.domain, record.source) == ((), "med", "file")
    with pytest.raises(RowError, match="answer is null"):
        convert({"question": "q", "answer": nan})
    assert Entity.parse("patient").of({"patient": nan}, record) is None


def test_several_fields_make_one_text() -> None:
    row = {"title": "Aspirin", "note": "", "text": "A drug."}
    assert convert(row, fields={"text": "title,note,text"}).text == "Aspirin\nA drug."
    asked = {"question": "When?", "context": "Hours.", "answer": "Nine."}
    assert convert(asked, fields={"question": "context,question"}).question == "Hours.\nWhen?"
    found = {"query": "q", **row}
    for kind in ("question-answer", "query-document"):
        assert convert(found, kind, fields={"answer": "title,text"}).answer == "Aspirin\nA drug."
    with pytest.raises(RowError, match="text is empty"):
        convert({"title": None, "text": " "}, fields={"text": "title,text"})


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"question": "q"}, "missing_field", "no answer: looked for answer, answers"),
        ({"question": 3, "answer": "a"}, "wrong_type", "question is a number, not a text: write it as one, in quotes"),
        ({"question": "q", "answer": True}, "wrong_type", "answer is true or false, not a text: write it as one"),
        ({"question": ["q"], "answer": "a"}, "wrong_type", "question is a list, not a text: write one row for each"),
        ({"question": "q", "answer": [[4, "a"]]}, "wrong_type", "answer is a list of lists: write one text for each"),
        ({"question": "q", "answer": [1, 2]}, "wrong_type", "answer is a list of numbers: write each as a text"),
        ({"question": "q", "output": [{"answer": "a"}]}, "wrong_type", "list of objects without a text, and --field"),
        ({"question": "q", "answer": ["", {"text": " "}, None]}, "empty", "answer is empty"),
        ({"question": "q", "answer": None}, "empty", "answer is null"),
        ({"question": " \n", "answer": "a"}, "empty", "question is empty"),
        ({"question": "\ufeff \u200b", "answer": "a"}, "empty", "question is empty"),
        ({"question": "q", "answer": []}, "empty", "answer is empty"),
        ({"question": "q", "answer": "a\ud800"}, "invalid_utf8", "answer, character 1"),
        ({"question": "q", "answer": "a", "label": 0}, "wrong_answer", "label is 0, so this is no answer"),
        ({"question": "q", "answer": "a", "Is_correct": False}, "wrong_answer", "Is_correct is False"),
        ({"question": "q", "answer": "a" * 101}, "too_long", "answer has 101 characters, more than --max-chars 100"),
        ({"question": "q", "answer": "a", "id": True}, "wrong_type", "id is true or false"),
        ({"question": "q", "answer": "a", "negatives": {"x": 1}}, "wrong_type", "negatives is an object"),
    ],
)
def test_bad_rows_are_named(row: dict, reason: str, detail: str) -> None:
    with pytest.raises(RowError) as caught:
        convert(row, "question-answer")
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_labels_of_right_and_wrong_answers() -> None:
    row = {"question": "q", "answer": "a", "label": "0"}
    for label in ("1", 1, True, 0.5, 2, None, "topic", float("nan"), [0]):
        assert convert({**row, "label": label}).answer == "a"
    for label in (-1, "-0.5", Decimal(0), "No", " irrelevant", "Not_Relevant"):
        with pytest.raises(RowError, match="so this is no answer"):
            convert({**row, "label": label})
    assert convert(row, fields={"label": ""}).answer == "a"
    pair = {"question1": "q", "question2": "a", "same": 0}
    with pytest.raises(RowError, match="same is 0"):
        convert(pair, fields={"question": "question1", "answer": "question2", "label": "same"})


@pytest.mark.parametrize("right", ["C", 2, -1, "other", 1.5, "1.5", float("nan"), Decimal("1.5"), "-1.0"])
def test_right_option_must_exist(right: object) -> None:
    with pytest.raises(RowError) as caught:
        convert({"question": "q", "options": ["a", "b"], "answer": right})
    assert caught.value.reason in ("bad_option", "wrong_type")


@pytest.mark.parametrize(
    ("options", "right"),
    [
        ({"A": "x", "B": None, "C": "y"}, "B"),
        ({"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "0"),
        ({"text": ["x", "y", "z"], "label": [1, 2, 3]}, 0),
        (["x", "y", ""], "C"),
        (["x", "y"], "9" * 5000),
        (["x", "y"], 2.0),
        (["x", "y"], "2.0"),
        ({"text": ["x", "y", "z"], "label": [1, 2, 3]}, "0.0"),
    ],
)
def test_a_letter_or_number_beside_the_labels_is_no_place(options: object, right: object) -> None:
    with pytest.raises(RowError, match="is none of the"):
        convert({"question": "q", "options": options, "answer": right})


def test_a_label_and_an_answer_that_are_different_options() -> None:
    row = {"question": "q", "options": ["a", "b", "c"], "answer": "C", "Label": 0}
    with pytest.raises(
        RowError, match=r"answer is 'C' and Label is 0, another option: .*--field answer=NAME"
    ) as caught:
        convert(row)
    assert caught.value.reason == "bad_option"
    assert convert(row, fields={"answer": "answer"}).answer == "c"
    assert convert(row, fields={"answer": "Label"}).answer == "a"
    for answer in ("a", "A", 0, "", None, "as everybody knows", ["c"]):
        assert convert({**row, "answer": answer}).answer == "a"
    sums = {
        "question": "1 + 1",
        "options": ["1", "2", "3"],
        "answer": 2,
        "label": 1,
    }  # 2 is an option, not a number of one
    assert convert(sums).answer == "2"
    for answer in ("2.0", 2.0):
        assert convert({"question": "1 + 1", "options": ["1.0", "2.0", "3.0"], "answer": answer}).answer == "2.0"


def test_a_right_option_that_is_not_found_says_how_to_name_it() -> None:
    with pytest.raises(RowError, match=r"no right option \(--field answer=NAME\): looked for answer_idx"):
        convert({"question": "q", "options": ["a", "b"], "gold": 1})
    with pytest.raises(RowError, match="looked for glod; the row has"):
        convert({"question": "q", "options": ["a", "b"], "gold": 1}, fields={"answer": "glod"})


def test_unrecognised_fields_are_listed_with_the_remedy() -> None:
    with pytest.raises(RowError, match=r"among the fields foo, bar: .*--field question=prompt"):
        convert({"foo": "q", "bar": "a"})
    with pytest.raises(RowError, match=r"answer, which have none of --field question=foo: name the question \("):
        convert({"Foo": "q", "answer": "a"}, fields={"question": "foo", "answer": "answer"})
    with pytest.raises(RowError, match=r"c0, c1, .* \.\.\. \(5000 fields\)") as caught:
        convert({f"c{i}": "x" for i in range(5000)})
    assert len(str(caught.value)) < 500
    with pytest.raises(RowError, match="the first line of a CSV file"):
        Converter(None, {}, max_chars=9, cells=True)({"what is it?": "q2", "it is this": "a2"})


OBJECTS, TEXTS = [{"a": 1}], {f"term {i}": "what it means" for i in range(30)}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "q", "test": "t"},
         r"^question \(prompt\) and no answer among the fields prompt, test: name the answer \(--field answer=NAME\); "
         r"or, for these texts alone, --kind corpus --field text=prompt$"),
        ({"problem": OBJECTS}, "problem is a list of objects: write one row for each$"),
        ({"table": {}, "notes": OBJECTS, "questions": OBJECTS}, ": questions is a list of objects: write one row"),
        ({"train": OBJECTS, "valid": OBJECTS}, ": train, valid are lists of objects: write one row for each$"),
        ({"instruction": "q", "instances": OBJECTS}, r"answer=NAME\).*; or, where instances has the rows, write one"),
        ({"problem_text": "q", "choices": ["x", "y"], "answer": "x"},
         r"^options \(choices\) and answer \(answer\) and no question .*: name the question \(--field question=NAME\)"),
        (TEXTS, ": the row is a map of texts: write one row for each$"),
        ({"terms": TEXTS}, ": terms is a map of texts: write one row for each$"),
    ],
)  # fmt: skip
def test_a_row_that_lacks_a_role_says_which_and_the_remedy_that_helps(row: dict, problem: str) -> None:
    with pytest.raises(RowError, match=problem):
        convert(row)


def test_names_that_are_a_question_and_its_answer_beside_each_other() -> None:
    for row in ({"nl": "q", "code": "a"}, {"intent": "q", "snippet": "a"}, {"claim": "q", "document": "a"}):
        assert (convert(row).question, convert(row).answer) == ("q", "a")
    for row in ({"intent": "book", "text": "t"}, {"nl": "zin", "text": "t"}, {"snippet": "t ...", "text": "t"}):
        assert convert(row).text == "t"
    pack = {"prompt": "def f():", "canonical_solution": "return 1", "text": "One.", "instruction": "Write f."}
    assert (convert(pack).question, convert(pack).answer) == ("def f():", "return 1")


@pytest.mark.parametrize("name", ["code", "document", "passage"])
@pytest.mark.parametrize("question", ["python check relation", "怎么排序一个列表"])
def test_what_may_be_a_question_beside_an_answer_is_not_left_out(name: str, question: str) -> None:
    texts = Converter(None, {}, max_chars=100)
    plain = {
        "id": 1,
        name: "t",
        "Title": "The art of it",
        "source_url": "http://a b c",
        "licence": "Apache License 2 x",
    }
    row = {**plain, "doc": question}
    for each in ({**plain, "date": "12 March 2020", "path": "a/b c d", "stars": 7, "lines": "3 4 5"}, plain):
        assert texts(each).text == "t"
    for converter in (texts, Converter(None, {}, max_chars=100), Converter("corpus", {}, max_chars=100, detected=True)):
        with pytest.raises(
            RowError, match=rf"{name} would be a text, and doc be left out .*--field question=doc; or, .*"
        ):
            converter(row)
    assert convert(row, "corpus").text == convert(row, fields={"text": name}).text == "t"
    assert convert(row, fields={"question": "doc"}).question == question


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"id": 1, "prompt": "q", "text": "a", "test": 1},
         "query-document (question = prompt, answer = text; not used: test)"),
        ({"Question": "q", "answer": "a", "label": 1}, "question-answer (question = Question, answer = answer)"),
        ({"instruction": "q", "input": "", "output": "a"}, "question-answer (question = instruction, answer = output)"),
        ({"instruction": "q", "input": "x", "output": "a"},
         "question-answer (question = instruction,input, answer = output)"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tag": "x"},
         "question-answer (question = messages, answer = messages; not used: tag)"),
        ({"question": "q", "opa": "x", "opb": "y", "cop": 0, "exp": "why"},
         "multiple-choice (question = question, options = opa,opb, answer = cop; not used: exp)"),
        ({"question": "q", "passage": "p", "options": ["x", "y"], "label": 0},
         "multiple-choice (question = question, options = options, answer = label; not used: passage)"),
        ({"question": "q", "answer": "a", "label": "neutral"},
         "question-answer (question = question, answer = answer; not used: label)"),
        ({"question": "q", "answers": [{"text": "x", "isAnswer": False}, {"text": "y", "isAnswer": True}]},
         "question-answer (question = question, answer = answers but those whose isAnswer is false)"),
        ({"title": "t", "body": "b"}, "corpus (text = body; not used: title)"),
    ],
)  # fmt: skip
def test_what_a_row_is_read_as_is_told_in_words(row: dict, told: str) -> None:
    converter = Converter(None, {}, max_chars=100)
    converter(row)
    assert converter.read_as(row) == told


def test_named_fields_are_told_by_their_names() -> None:
    row = {"q": "q", "a": {"value": "a", "alias": "b"}, "c": "context"}
    converter = Converter(None, {"question": "c,q", "answer": "a.value"}, max_chars=100)
    converter(row)
    assert converter.read_as(row) == "question-answer (question = c,q, answer = a.value; not used: a.alias)"
    deep = {"question": "q", "a": {"b": {"c": "a"}, "d": 1}, "": 0}
    converter = Converter(None, {"answer": "a.b.c"}, max_chars=100)
    converter(deep)
    assert converter.read_as(deep).endswith("answer = a.b.c; not used: a.d, (unnamed column))")


@pytest.mark.parametrize("entity", ["gene", "Gene", "gene.name"])
def test_the_field_of_the_group_is_used(entity: str) -> None:
    row = {"question": "q", "answer": "a", "gene": {"name": "SHH"}, "more": 1}
    converter = Converter(None, {}, max_chars=100)
    converter(row)
    assert converter.read_as(row, entity).endswith("; not used: more)")


def test_a_field_whose_name_has_a_comma() -> None:
    fields = {"question": "Frage, kurz", "answer": "a,b"}
    assert convert({"Frage, kurz": "q", "a": "x", "b": "y"}, fields=fields).question == "q"
    assert convert({"Frage, kurz": "q", "a": "x", "b": "y"}, fields=fields).answer == "x\ny"


def test_names_of_a_domain_are_one_in_any_form() -> None:
    for name in ("Me\u0301decine", "M\u00e9decine", " M\u00e9decine "):
        assert convert({"question": "q", "answer": "a", "domain": name}).domain == "Médecine"


def test_a_kind_that_an_earlier_row_told_is_named() -> None:
    converter = Converter(None, {}, max_chars=100)
    converter({"text": "t"})
    with pytest.raises(RowError, match=r"no text: .* an earlier row told that these are of kind corpus: see --kind"):
        converter({"question": "q", "answer": "a"})


QA, MC = {"question": "q", "answer": "a"}, {"question": "q", "options": ["a", "b"], "answer": "B"}
FIELD_AND_KIND = r"the row has {} \({}\), and an earlier one told that these are of kind {}: .*--kind"


@pytest.mark.parametrize(
    ("first", "row", "left_out"),
    [
        (QA, MC, ("options", "options", "question-answer")),
        (QA, {"question": "q", "answer": "A", "Opa": "a", "opb": "b", "opc": "", "opd": ""},
         ("options", "Opa,opb,opc,opd", "question-answer")),
        ({"query": "q", "text": "t"}, {**MC, "text": "t"}, ("options", "options", "query-document")),
        ({"text": "t"}, {**QA, "passage": "p"}, ("question", "question", "corpus")),
        ({"text": "t"}, {"query": "q", "text": "t"}, ("question", "query", "corpus")),
    ],
)  # fmt: skip
def test_a_row_of_another_kind_than_the_first_is_bad(first: dict, row: dict, left_out: tuple[str, ...]) -> None:
    converter = Converter(None, {}, max_chars=100)
    converter(first)
    later = Converter(converter.kind, {}, max_chars=100, detected=True)  # of a later block
    for each in (converter, later):
        with pytest.raises(RowError, match=FIELD_AND_KIND.format(*left_out)):
            each(row)
        each(first)
    Converter(converter.kind, {}, max_chars=100)(row)  # the user named the kind


@pytest.mark.parametrize("options", [None, [], "", "[]", {}, {"A": None, "B": " "}, {"text": [], "label": []}])
def test_options_of_nothing_are_none(options: object) -> None:
    converter = Converter(None, {}, max_chars=100)
    for row in ({**QA, "options": options}, QA, {**QA, "choices": options}):
        assert converter(row).answer == "a"
    assert converter.kind == "question-answer"
    found = converter.question_alone({"question": "q", "options": options, "answer": None})
    assert found is not None
    assert found.text == "q"
    texts = Converter(None, {}, max_chars=100)
    for row in ({"text": "t"}, {"text": "t", "question": None, "answer": ""}, {"text": "t", "document": "d"}):
        assert texts(row).text == "t"
    with pytest.raises(RowError, match=r"an answer \(answer\) and no question"):
        texts({"text": "t", "answer": "a"})


def test_fields_of_nothing_do_not_make_questions_of_texts() -> None:
    texts, blank = Converter(None, {}, max_chars=100), {"question": None, "answer": "", "text": "t"}
    assert texts(blank).text == texts({"text": "t"}).text == "t"
    asked = Converter(None, {}, max_chars=100)
    for row in ({**QA, "text": "context"}, {**blank, "question": "q", "answer": "a"}):
        assert asked(row).question == "q"
    with pytest.raises(RowError, match=r"question is null, and the row has a text \(text\): give .* of kind corpus"):
        asked(blank)
    for row in ({**blank, "text": ""}, {**blank, "answer": "a"}):
        with pytest.raises(RowError, match=r"^question is null$"):
            asked(row)


@pytest.mark.parametrize("row", [{"text": "a clause", "answer": "Yes"}, {"Title": "t", "Body": "q?", "Answers": ["a"]}])
def test_an_answer_without_a_question_is_not_left_out(row: dict) -> None:
    with pytest.raises(RowError, match=r"an answer \([aA]nswers?\) and no question .*--field question=text"):
        convert(row)
    text = list(row)[-2]
    assert convert(row, "corpus").text == convert(row, fields={"text": text}).text == row[text]
    assert convert(row, fields={"question": text}).question == row[text]
    assert convert({"document": "d", "text": "t"}).text == "t"


def test_entity() -> None:
    record = Record("chem:CHEBI:1:0", text="t")
    assert Entity.parse("id~(.*):").of({}, record) == "chem:CHEBI:1"
    assert Entity.parse("id~CHEBI:\\d+").of({}, record) == "CHEBI:1"
    assert Entity.parse("patient").of({"patient": 3}, record) == "3"
    assert Entity.parse("patient").of({"patient": 3.0}, record) == "3"  # as pandas writes it where a row has none
    assert Entity.parse("patient").of({"patient": "3.0"}, record) == "3"  # in a CSV file
    assert Entity.parse("patient").of({"patient": 1.5}, record) == "1.5"
    assert Entity.parse("patient").of({}, record) is None
    assert Entity.parse("id~nothing").of({}, record) is None
    with pytest.raises(UserError, match="not a regular expression"):
        Entity.parse("id~(")
