"""Quotes in CSV files: one that is wrong costs one row."""

from __future__ import annotations

import io
from typing import Any

import pytest

from lbr_dist.data.csv_rows import MOST_LINES, csv_rows
from lbr_dist.data.row_values import RowError


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
def test_a_stray_quote_costs_its_row_alone(line: str, behind: str) -> None:
    rows = [f"{i},{behind}" for i in range(3 * MOST_LINES)]
    rows[5] = line
    text = "q,a\n" + "\n".join(rows) + "\n"
    found = read(text)
    problems = [(number, row) for number, row in found if isinstance(row, str)]
    ((number, problem),) = [entry for entry in problems if "quote missing" in entry[1]][:1]
    assert text.split("\n")[number - 1] == line
    assert "is a quote missing or not doubled?" in problem
    lost = len(rows) - len(good(found))
    assert lost == 1 or (behind != "plain" and lost <= 3)  # a quote behind may close it, and what follows is misread


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
