"""Quotes in CSV files: one that is wrong costs one row; what cells hold."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from lbr_dist.data.sources import csv_rows as module
from lbr_dist.data.sources.csv_rows import csv_rows
from lbr_dist.data.sources.fields import Converter
from lbr_dist.data.sources.row_values import RowError


def read(text: str, delimiter: str = ",") -> list[tuple[int, Any]]:
    found = csv_rows(io.BufferedReader(io.BytesIO(text.encode())), delimiter)  # type: ignore[arg-type]
    return [(number, row.detail if isinstance(row, RowError) else row) for number, row in found]


def good(found: list[tuple[int, Any]]) -> dict[int, Any]:
    return {number: row["a"] for number, row in found if not isinstance(row, str)}


def test_rows_are_named_by_their_first_line() -> None:
    found = read('q,a\r\n1,"x\r\ny"\r\n\r\n2,z\n3\n4,"say ""hi"""\n5,6" pipe\n')
    assert found == [
        (2, {"q": "1", "a": "x\r\ny"}),
        (5, {"q": "2", "a": "z"}),
        (6, {"q": "3"}),
        (7, {"q": "4", "a": 'say "hi"'}),
        (8, {"q": "5", "a": '6" pipe'}),
    ]


@pytest.mark.parametrize("before", ["\n\r\n", "\ufeff\n", ";;\n"])
def test_blank_lines_before_the_header(before: str) -> None:
    assert [row for _, row in read(before + "q;a\n1;x, y\n")] == [{"q": "1", "a": "x, y"}]


@pytest.mark.parametrize("line", ['5,"never closed', '5,"said "so" and went', '"5,x', '5,"x" y'])
@pytest.mark.parametrize("behind", ["plain", '"quoted"', '"over\ntwo"'])
def test_a_stray_quote_costs_its_row_alone(line: str, behind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 1 << 16)
    rows = [f"{i},{behind}" for i in range(3000)]
    rows[5] = line
    text = "q,a\n" + "\n".join(rows) + "\n"
    found = read(text)
    problems = [(number, row) for number, row in found if isinstance(row, str)]
    ((number, problem),) = [entry for entry in problems if "quote missing" in entry[1]][:1]
    assert text.split("\n")[number - 1] == line
    assert "is a quote missing or not doubled?" in problem
    lost = len(rows) - len(good(found))
    assert lost == 1 or (behind != "plain" and lost <= 3)  # a quote behind may close it, and what follows is misread


def test_two_quotes_in_two_rows_of_a_tsv_make_no_row_of_both() -> None:
    lines = ["q\ta", '1\t"I am here,', "2\tplain", '3\tand there."', "4\tlast"]
    (number, problem), *others = read("\n".join(lines) + "\n", "\t")
    assert (number, [(n, row["a"]) for n, row in others]) == (2, [(3, "plain"), (4, 'and there."'), (5, "last")])
    assert (
        "is a quote missing or not doubled? (2 cells over several lines, the header has 2; each line has as" in problem
    )
    code = 'q\ta\n1\t"def f():\n\treturn 1\n"\n2\t"one\ntwo\tthree\tfour"\n'
    assert [row["a"] for _, row in read(code, "\t")] == ["def f():\n\treturn 1\n", "one\ntwo\tthree\tfour"]
    assert [row["a"] for _, row in read('a\n"one\ntwo"\n', "\t")] == ["one\ntwo"]


def test_empty_cells_beyond_the_header_are_none() -> None:
    """As MITRE writes its CWE lists: a comma more at the end of each row, but not of the header."""
    found = read('q,a\n1,x,\n2,"over\ntwo",,\n3,x,y\n')
    assert found[:2] == [(2, {"q": "1", "a": "x"}), (3, {"q": "2", "a": "over\ntwo"})]
    assert found[2] == (5, "the line has 3 cells, more than the header: 2")


@pytest.mark.parametrize("count", [999, 1200, 50_000])
def test_a_cell_of_very_many_lines_is_one_cell(count: int) -> None:
    cell = "".join(f"    put({i}, {i * i})\n" for i in range(count))
    assert read(f'q,a\n1,x\n2,"T = {{\n{cell}}}"\n3,y\n') == [
        (2, {"q": "1", "a": "x"}),
        (3, {"q": "2", "a": f"T = {{\n{cell}}}"}),
        (count + 5, {"q": "3", "a": "y"}),
    ]


@pytest.mark.parametrize("line", ['{},"never closed', '{} 12",10,"14'])
@pytest.mark.parametrize("every", [1, 20, 400])
def test_very_many_wrong_quotes_do_not_take_very_long(line: str, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of these lines closes the quote of the one before and opens another, so each is read to the bound."""
    for name, bound in (("MOST", 1 << 17), ("LEAST", 1 << 12), ("IN_VAIN", 1 << 18)):
        monkeypatch.setattr(module, name, bound)
    rows = [line.format(i) if i % every == 0 else f"{i}," + "x" * 100 for i in range(2000)]
    handed: list[str] = []
    real = module._Lines.__next__
    monkeypatch.setattr(module._Lines, "__next__", lambda lines: handed.append(line := real(lines)) or line)
    found = good(read("q,a\n" + "\n".join(rows)))
    wrong = len(range(0, 2000, every))
    assert sum(map(len, handed)) < (1 << 18) + 3 * sum(map(len, rows)) + wrong * (1 << 12)
    assert len(found) == 2000 - wrong


def test_a_row_of_more_than_the_bound_costs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 1000)
    (number, problem), *others = read('q,a\n1,"' + "x\n" * 99 + '"\n2,y\n')
    assert number == 2
    assert "(it runs over more than 63 lines)" in str(problem)
    assert others[-1] == (102, {"q": "2", "a": "y"})
    assert good(read('q,a\n1,"' + "x" * 9999 + '\n"\n2,y\n')) == {4: "y"}


@pytest.mark.parametrize("ends", ['4,5"', '4,5",x,y'])
def test_a_quote_that_a_later_line_closes_costs_its_row_alone(ends: str) -> None:
    found = read(f'q,a\n1,x\n"2,is open\n3,y\n{ends}\n5,z\n')
    assert {2: "x", 4: "y", 6: "z"}.items() <= good(found).items()
    problems = {number: row for number, row in found if isinstance(row, str)}
    assert "is a quote missing or not doubled?" in problems[3]


def test_lines_of_empty_cells_are_blank() -> None:
    assert read("q,a,,\n1,x,,\n,,,\n,,,\n2,,,\n") == [
        (2, {"q": "1", "a": "x", "": ""}),
        (5, {"q": "2", "a": "", "": ""}),
    ]


def test_an_open_quote_at_the_end_of_the_file() -> None:
    assert good(read('q,a\n1,x\n2,"y\n3,z')) == {2: "x", 4: "z"}


def test_headers_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="its header: "):
        read('q,"a\n1,x\n')
    with pytest.raises(ValueError, match="its header names 'a' twice"):
        read("q,a,a\n1,x,y\n")
    assert read("") == []
    assert read(",q,\n0,1,2\n") == [(2, {"": "2", "q": "1"})]


@pytest.mark.parametrize("again", ["q , a", "\ufeffq ,a"])
def test_the_header_again_where_files_were_joined(again: str) -> None:
    found = read(f"q ,a\n1,x\n{again}\n2,q\na,q\n")
    assert good(found) == {2: "x", 4: "q", 5: "q"}
    assert "the names of the columns again: were files joined?" in dict(found)[3]


def test_what_databases_write_for_nothing_is_null() -> None:
    found = read("q\ta\n1\t\\N\n2\t\\N.\n", "\t")
    assert [row for _, row in found] == [{"q": "1", "a": None}, {"q": "2", "a": "\\N."}]


PASSAGES = [{"docid": "1", "title": "T", "text": "one"}, {"docid": "2", "title": "", "text": "two"}]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answers": [{"text": "Saint", "answer_start": 5}]},
        {"query": "q", "positive_passages": PASSAGES, "negative_passages": PASSAGES[:1]},
        {"query": {"title": "T", "text": "q"}, "text": {"text": "t"}},
        {"abstract": ["One.", None, "Two."]},
        {"abstract": PASSAGES},
    ],
)
def test_json_in_cells_is_read_as_in_json_lines(row: dict[str, Any]) -> None:
    cells = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
    assert Converter(None, {}, max_chars=99, cells=True)(cells) == Converter(None, {}, max_chars=99)(row)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answers": "[{'text': 'Saint', 'answer_start': 5}]"},
        {"query": "q", "answer": "a", "negative_passages": str(PASSAGES).replace("}, {", "}\n {")},  # numpy's
        {"abstract": "['One.', 'Two.']"},
        {"questions": "['one', 'two']", "answer": "a"},
    ],
)
def test_lists_as_python_prints_them_are_refused_in_every_field(row: dict[str, str]) -> None:
    with pytest.raises(RowError, match=r" is a list( of objects)? as Python prints it: write it as JSON"):
        Converter(None, {}, max_chars=99, cells=True)(row)


@pytest.mark.parametrize("cell", ["[1, 2]", '{"a": 1}', '[{"a": 1}]', "[{'a': 1}]", "{'text': 'a'}, {'b'}", '"x"'])
def test_texts_that_only_look_like_lists(cell: str) -> None:
    for row in ({"question": "q", "answer": cell}, {"question": cell, "answer": "a"}):
        found = Converter(None, {}, max_chars=99, cells=True)(row)
        assert (found.question, found.answer) == tuple(row.values())
