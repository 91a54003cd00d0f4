from __future__ import annotations

import bz2
import contextlib
import csv
import errno
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lbr_dist.data.sources import arrow_rows, readers
from lbr_dist.data.sources.entity import Entity
from lbr_dist.data.sources.fields import Converter
from lbr_dist.data.sources.parts import Part, Source, expand
from lbr_dist.data.sources.readers import rows
from lbr_dist.data.sources.row_values import RowError, text
from lbr_dist.errors import UserError

ROWS = [{"id": f"r{i}", "question": f"Was ist {i}?", "answer": f"Größe, {i}\nzwei"} for i in range(5)]


FILES = [
    "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.xz", "a.csv", "a.tsv", "a.parquet", "a.tar", "a.tar.bz2",
]  # fmt: skip


def read(path: str | Path, tmp_path: Path, paragraphs: bool = False) -> list[tuple[int, Any]]:
    downloads = tmp_path / "downloads"
    downloads.mkdir(exist_ok=True)
    parts = expand(Source(str(path)), downloads)
    return [row for part in parts for row in rows(part, paragraphs=paragraphs)]


def lines(values: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in values).encode()


def write(folder: Path, name: str) -> Path:
    """ROWS as a file of the format of its name."""
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_bytes(lines(ROWS))
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines(ROWS)))
    elif name.endswith(".jsonl.zst"):
        path.write_bytes(zstandard.compress(lines(ROWS)))
    elif name.endswith(".json"):
        path.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=1, ensure_ascii=False).encode())
    elif name.endswith(".json.xz"):
        path.write_bytes(lzma.compress(lines(ROWS)))
    elif name.endswith((".csv", ".tsv")):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif ".tar" in name:
        with tarfile.open(path, f"w:{name.rpartition('tar')[2].lstrip('.')}") as tar:
            for row in ROWS:
                add(tar, f"a/{row['id']}.json", json.dumps(row).encode())
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert [dict(row) for _, row in read(write(tmp_path, name), tmp_path)] == ROWS


def test_saved_dataset_and_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert [row for _, row in read(tmp_path / "one", tmp_path)] == ROWS
    monkeypatch.chdir(tmp_path)
    for path in ("./one", "one/", f"{tmp_path}//one", "two/../one"):
        assert len(read(path, tmp_path)) == len(ROWS)
    assert len(read("./two@test", tmp_path)) == 1
    assert [row for _, row in read(f"{tmp_path}/two@test", tmp_path)] == ROWS[:1]
    with pytest.raises(UserError, match=r"has the splits train, test: name one, for example .*two@train"):
        read(tmp_path / "two", tmp_path)
    with pytest.raises(UserError, match=r"two@dev: has the splits .*, for example [^@]*two@train"):
        read(f"{tmp_path}/two@dev", tmp_path)
    with pytest.raises(UserError, match=r"one@test: has no splits: leave out @test to read it whole"):
        read(f"{tmp_path}/one@test", tmp_path)
    datasets.Dataset.from_list(ROWS, split="dev").save_to_disk(str(tmp_path / "three"))
    assert len(read(f"{tmp_path}/three@dev", tmp_path)) == len(ROWS)
    with pytest.raises(UserError, match=r"three@test: has the split dev alone: leave out @test"):
        read(f"{tmp_path}/three@test", tmp_path)


def test_saved_dataset_in_a_folder_of_sources(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    root, one = tmp_path / "data", datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(root / "inner" / "one"))
    (root / "z.jsonl").write_text('{"text": "last"}\n')
    parts = expand(Source(str(root)), tmp_path)
    assert [(part.base, part.format) for part in parts] == [("one", "datasets"), ("z.jsonl", "jsonl")]
    assert [row for part in parts for _, row in rows(part)] == [*ROWS, {"text": "last"}]
    datasets.DatasetDict({"dev": one, "hard": one}).save_to_disk(str(root / "two"))
    with pytest.raises(UserError, match=r"two: is a saved .* splits dev, hard, .* as .*two@dev, and leave it"):
        expand(Source(str(root)), tmp_path)


def test_a_saved_dataset_has_the_identity_of_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 1 << 30)  # HF_DATASETS_IN_MEMORY_MAX_SIZE
    found = []
    for name, chosen in (("one", ROWS), ("again/one", ROWS), ("other/one", ROWS[1:])):
        datasets.Dataset.from_list(chosen).save_to_disk(str(tmp_path / name))
        found += [expand(Source(str(tmp_path / name)), tmp_path)[0].fingerprint()]
    assert found[0] == found[1] != found[2]
    held = Part("held", "datasets", tmp_path, Source("held"), dataset=datasets.Dataset.from_list(ROWS))
    with pytest.raises(UserError, match="held: datasets holds it in memory"):
        held.fingerprint()


@pytest.mark.parametrize("form", [{"type": "numpy"}, {"type": "torch"}, {"columns": ["id"]}])
def test_saved_dataset_with_a_format_of_its_own_and_images(tmp_path: Path, form: dict[str, Any]) -> None:
    datasets = pytest.importorskip("datasets")
    kept = [{**row, "options": ["a", "b"], "label": 1} for row in ROWS]
    text = datasets.Value("string")
    features = {"id": text, "question": text, "answer": text, "options": datasets.List(text)}
    features = datasets.Features({**features, "label": datasets.Value("int64"), "image": datasets.Image()})
    saved = datasets.Dataset.from_list(
        [{**row, "image": {"bytes": b"no image", "path": None}} for row in kept], features
    )
    saved.set_format(**form)
    saved.save_to_disk(str(tmp_path / "one"))
    assert [{name: row[name] for name in kept[0]} for _, row in read(tmp_path / "one", tmp_path)] == kept


def test_hub_dataset_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"hub:nobody/nothing@train: datasets cannot load it"):
        read("hub:nobody/nothing@train", tmp_path)


def test_plain_text_by_line_and_by_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b'{"a": 1}\n{no JSON\n')
    assert read(path, tmp_path) == [(1, {"text": '{"a": 1}'}), (2, {"text": "{no JSON"})]
    path.write_bytes("eins\r\nzwei\n\n  \ndrei ü".encode())
    assert read(path, tmp_path) == [(1, {"text": "eins"}), (2, {"text": "zwei"}), (5, {"text": "drei ü"})]
    assert read(path, tmp_path, paragraphs=True) == [(1, {"text": "eins\r\nzwei"}), (5, {"text": "drei ü"})]


@pytest.mark.parametrize(
    "blank", ["\u00a0", "\u3000" * 99, " \u200b\t", "\ufeff\r"], ids=["HTML", "Chinese", "unseen", "mark"]
)
def test_blank_lines_with_the_spaces_of_html_and_chinese(tmp_path: Path, blank: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"{blank}\neins\n{blank}\n\u3000\u3000二\n".encode())
    expected = [(2, {"text": "eins"}), (4, {"text": "\u3000\u3000二"})]
    assert read(path, tmp_path) == read(path, tmp_path, paragraphs=True) == expected
    path.write_bytes(b"\xa0\n" + f"{blank * 30}x".encode())  # Latin-1
    (_, bad), (_, good) = read(path, tmp_path)
    assert (bad.reason, good) == ("invalid_utf8", {"text": f"{blank * 30}x".removeprefix("\ufeff")})


def test_very_long_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST", 400_000)
    path, line = tmp_path / "a.txt", b"x" * 99 + b"\n"
    path.write_bytes(b"one\n\n" + line * 4000 + b"\n" + line * 4001 + b"\n\nfour")
    one, two, (number, three), four = read(path, tmp_path, paragraphs=True)
    assert (one, four) == ((1, {"text": "one"}), (8007, {"text": "four"}))
    assert two == (3, {"text": (line * 4000).decode().rstrip()})
    assert number == 4004
    assert isinstance(three, RowError)
    assert three.reason == "too_long"


def test_plain_text_has_no_questions(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    part = expand(Source(str(path), "question-answer"), tmp_path)[0]
    with pytest.raises(UserError, match="plain text has no fields, so it cannot be of kind question-answer"):
        list(rows(part))


def test_tar_samples_of_several_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "1.question.txt", b"q")
        add(tar, "1.answer.txt", b"a")
        add(tar, "1.pkl", b"never read")
        add(tar, "2.txt", b"plain")
        add(tar, "3.json", b"{broken")
    read_rows = read(path, tmp_path)
    assert read_rows[:2] == [(1, {"question": "q", "answer": "a"}), (2, {"text": "plain"})]
    assert isinstance(read_rows[2][1], RowError)


def test_tar_members_that_are_one_sample_by_their_names_alone(tmp_path: Path) -> None:
    path = tmp_path / "papers.tar"
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(ROWS[:3]):
            add(tar, f"x/2101.{number}.json", json.dumps(row).encode())
        add(tar, "1.json", b'{"text": "same", "id": 1}')
        add(tar, "1.txt", b"same\n")
        add(tar, "1.more.json", b'{"id": 1, "domain": "d"}')
    (_, bad), (number, good) = read(path, tmp_path)
    assert isinstance(bad, RowError)
    assert re.match(r"x/2101\.1\.json has another id than the members before it, .* first dot: rename", bad.detail)
    assert (number, good) == (2, {"text": "same\n", "id": 1, "domain": "d"})


def test_tar_members_that_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for number in "12":
            add(tar, f"x/._{number}.json", b"\0\5\x16\7")  # macOS keeps attributes of a file so
            add(tar, f"x/{number}.JSON", b'{"text": "t"}')
    assert [row for _, row in read(path, tmp_path)] == [{"text": "t"}] * 2
    with tarfile.open(path, "w") as tar:
        add(tar, "train.jsonl", lines(ROWS))
    with pytest.raises(
        UserError, match=r"a\.tar: no member is a \.json or \.txt file \(one is train\.jsonl\): unpack it"
    ):
        read(path, tmp_path)


def test_undecodable_rows_are_handed_on_with_their_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n\n{"text": "\xff"}\n{"text": \n[1]\n{"text": "ok"}\n')
    found = [(n, row.reason if isinstance(row, RowError) else row["text"]) for n, row in read(path, tmp_path)]
    assert found == [(1, "ok"), (3, "invalid_utf8"), (4, "invalid_json"), (5, "wrong_type"), (6, "ok")]
    foreign = tmp_path / "a.csv"
    foreign.write_bytes("question;answer\nGröße;über\n".encode("cp1252"))
    [(_, cells)] = read(foreign, tmp_path)
    with pytest.raises(RowError, match=r"answer, character 0: .* iconv -f ENCODING .*\(Chinese: GB18030, .* Western:"):
        text(cells["answer"], "answer", 9)
    assert "byte 10: convert" in read(path, tmp_path)[1][1].detail
    path.write_text(json.dumps(ROWS[0], indent=1))
    (_, first), *_ = read(path, tmp_path)
    assert re.fullmatch(
        r"Expecting .*, at character 2: one whole object is expected", first.detail
    )  # no second line number


def test_an_array_with_something_else_in_it_and_a_cut_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "ok"}, [1]]')
    (_, good), (number, bad) = read(path, tmp_path)
    assert good == {"text": "ok"}
    assert number == 2
    assert isinstance(bad, RowError)
    path.write_text('[{"text": "ok"}, {"te')
    with pytest.raises(UserError, match=r"a\.json: damaged or not a json file"):
        read(path, tmp_path)


@pytest.mark.parametrize(
    "document",
    [
        {"version": 1, "data": [{"title": "T", "paragraphs": [{"context": "c", "qas": ROWS}]}]},
        {f"pm{i}": row for i, row in enumerate(ROWS)},
        {name: [row[name] for row in ROWS] for name in ROWS[0]},
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_of_rows_that_is_damaged(tmp_path: Path, document: dict[str, Any], indent: int | None) -> None:
    """Also where it has a single line: it is no bad row."""
    path = tmp_path / "a.json"
    content = json.dumps(document, indent=indent, ensure_ascii=False)
    place = r"line (?!1 )\d+ column" if indent else "line 1 column"
    for spoiled in (content[:-40], content + content, content.replace(":", "", 3)):
        path.write_text(spoiled, encoding="utf-8")
        with pytest.raises(UserError, match=rf"a\.json: damaged or not a json file \(.*{place}"):
            read(path, tmp_path)
    path.write_text(content, encoding="cp1252")
    with pytest.raises(UserError, match=r"a\.json: .*\(byte \d+ is not UTF-8: convert"):
        read(path, tmp_path)


@pytest.mark.parametrize(
    "first", [b'{"text": "to', b'{"text": "\xff"}', b'{"text": "one"} {"text": "two"}', b'{"a":' * 9999]
)
def test_json_lines_of_which_the_first_is_damaged(tmp_path: Path, first: bytes) -> None:
    (tmp_path / "a.json").write_bytes(first + b'\n{"text": "two"}\n{"text": "three"}\n')
    (number, bad), *good = read(tmp_path / "a.json", tmp_path)
    assert (number, bad.reason) == (1, "invalid_utf8" if b"\xff" in first else "invalid_json")
    assert good == [(2, {"text": "two"}), (3, {"text": "three"})]


def test_json_that_wraps_its_rows(tmp_path: Path) -> None:
    path, inner = tmp_path / "a.json", [{"text": "one"}, {"text": "two"}]
    for content in (json.dumps({"data": inner}), json.dumps({"version": 1, "rows": inner}, indent=2)):
        path.write_text(content)
        assert [row for _, row in read(path, tmp_path)] == inner
    path.write_text(json.dumps(inner[0], indent=2))
    assert [row for _, row in read(path, tmp_path)] == inner[:1]
    path.write_text('{"messages": [{"role": "user"}]}\n{"messages": []}\n')
    assert len(list(read(path, tmp_path))) == 2  # lines: no such name
    path.write_text('{"data": [{"text": "one"}]}\n{"data": [{"text": "two"}]}\n')
    assert len(list(read(path, tmp_path))) == 2  # lines, every one of them
    path.write_text('{"text": "torn\n{"text": "ok"}\n')
    (_, bad), (_, good) = read(path, tmp_path)
    assert isinstance(bad, RowError)
    assert good == {"text": "ok"}


PAIRS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]
NUMBERED = {str(i): row for i, row in enumerate(PAIRS)}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"columns": ["question", "answer"], "index": [0, 1, 2], "data": [list(row.values()) for row in PAIRS]}, PAIRS),
        ({name: {i: row[name] for i, row in NUMBERED.items()} for name in PAIRS[0]}, PAIRS),
        ({name: {i: NUMBERED[i][name] for i in "20"} for name in PAIRS[0]}, [PAIRS[2], PAIRS[0]]),
        ({name: [row[name] for row in PAIRS] for name in PAIRS[0]}, PAIRS),
        (NUMBERED, PAIRS),
        ({f"pm{i}": row for i, row in NUMBERED.items()}, [{"id": f"pm{i}", **row} for i, row in NUMBERED.items()]),
        (
            {"code": PAIRS[0], "tort": PAIRS[1], "venue": PAIRS[2]},
            [  # a glossary, one of whose terms is a field's name
                {"id": "code", **PAIRS[0]},
                {"id": "tort", **PAIRS[1]},
                {"id": "venue", **PAIRS[2]},
            ],
        ),
        ({"questions": PAIRS}, PAIRS),
        (
            {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "c", "qas": PAIRS}]}]},
            [{"title": "T", "context": "c", **row} for row in PAIRS],
        ),
        # one row each, which only looks like one of these
        ({"question": {"text": "q"}, "answer": {"text": "a"}}, None),
        ({"question": {"1": "q", "2": "r"}, "answer": {"1": "a"}}, None),
        ({"questions": ["q", "p"], "answer": "a"}, None),
        ({"questions": ["q", "p"], "answers": ["a"]}, None),
        ({"messages": [{}, {}], "tools": [{}, {}]}, None),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_json_in_the_forms_of_other_tools(
    tmp_path: Path, document: dict[str, Any], expected: list[Any] | None, indent: int | None
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(document, indent=indent))
    assert [row for _, row in read(tmp_path / "a.json", tmp_path)] == (expected or [document])


def test_lines_with_rows_nested_in_them(tmp_path: Path) -> None:
    lines_ = [{"header": {"dataset": "MRQA"}}, {"context": "c", "qas": PAIRS}, {"qas": [], "question": "q"}]
    (tmp_path / "a.jsonl").write_bytes(lines(lines_))
    found = read(tmp_path / "a.jsonl", tmp_path)
    assert found == [(1, lines_[0]), *((2, {"context": "c", **row}) for row in PAIRS), (3, lines_[2])]
    texts = [{"text": "one"}, {"text": "two"}, {"id": "own", "text": "three"}]
    (tmp_path / "a.jsonl").write_bytes(lines([{"id": 7, "qas": texts}]))
    assert [row["id"] for _, row in read(tmp_path / "a.jsonl", tmp_path)] == [7, "7:2", "own"]
    (tmp_path / "a.jsonl").write_bytes(lines([{"id": 0, "qas": PAIRS}, {"id": "", "qas": PAIRS}]))
    assert [row["id"] for _, row in read(tmp_path / "a.jsonl", tmp_path)] == [0, "0:2", "0:3", "", "", ""]


def test_paragraphs_whose_list_of_questions_is_empty_are_no_rows(tmp_path: Path) -> None:
    squad = {"title": "T", "paragraphs": [{"context": "c", "qas": PAIRS[:1]}, {"context": "d", "qas": []}]}
    (tmp_path / "a.json").write_text(json.dumps({"data": [squad, {"title": "U", "paragraphs": []}]}))
    assert read(tmp_path / "a.json", tmp_path) == [(1, {"title": "T", "context": "c", **PAIRS[0]})]
    texts = [{"text": "t", "qas": []}, {"heading": "h", "paragraphs": []}]
    (tmp_path / "a.jsonl").write_bytes(lines(texts))
    assert [row for _, row in read(tmp_path / "a.jsonl", tmp_path)] == texts


def test_paragraphs_without_questions_of_their_own_are_no_rows(tmp_path: Path) -> None:
    musique = {"id": "m", **PAIRS[0], "paragraphs": [{"idx": i, "paragraph_text": "p"} for i in range(20)]}
    squad = {"title": "T", "paragraphs": [{"context": "c"}, {"context": "d", "qas": PAIRS[:1]}]}
    (tmp_path / "a.jsonl").write_bytes(lines([musique, squad]))
    asked = [(1, musique), (2, {"title": "T", "context": "c"}), (2, {"title": "T", "context": "d", **PAIRS[0]})]
    assert read(tmp_path / "a.jsonl", tmp_path) == asked
    texts = {"paragraphs": [{"text": "one"}, {"text": "two"}]}
    assert Converter(None, {"text": "paragraphs"}, max_chars=9)(texts).text == "one\ntwo"


def test_a_key_that_an_object_has_twice(tmp_path: Path) -> None:
    """Parsers take the last one without a word."""
    twice = '{"question": "q", "answer": "first", "answer": "second"}'
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(f'{twice}\n{{"text": "ok"}}\n{{"text": "t", "about": {{"x": 1, "x": 1}}}}\n')
        (_, first), good, (_, third) = read(tmp_path / name, tmp_path)
        assert (first.reason, first.detail) == ("invalid_json", "an object has the key 'answer' twice")
        assert good == (2, {"text": "ok"})
        assert third.detail == "an object has the key 'x' twice"
    for content in (f"[{twice}]", twice.replace(",", ",\n"), f'{{"data": [{twice}]}}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match=r"a\.json: .*an object has the key 'answer' twice"):
            read(tmp_path / "a.json", tmp_path)


COUNTS, SWAPPED = dict(zip("ABCD", "1234", strict=True)), dict(zip("ABCD", "BADC", strict=True))
MEDMCQA = dict(zip(("opa", "opb", "opc", "opd"), "1234", strict=True))


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({**MEDMCQA, "cop": 2}, "3"),
        ({**MEDMCQA, "cop": "2"}, "3"),  # in a CSV file
        ({**MEDMCQA, "cop": "2.0"}, "3"),
        ({"options": ["1.0", "2.0", "3.0"], "cop": "1.0"}, "2.0"),
        ({**MEDMCQA, "answer": 2}, "3"),
        ({**MEDMCQA, "answer": "2"}, None),
        ({**MEDMCQA, "answer": "C"}, "3"),
        ({**MEDMCQA, "answer": "4"}, "4"),  # is no index
        ({**COUNTS, "answer": "C"}, "3"),
        ({**SWAPPED, "answer": "D"}, None),
        ({**SWAPPED, "answer_key": "D"}, "C"),
        ({**SWAPPED, "answer": "D", "answer_key": "D"}, "C"),
        ({"options": list("BADC"), "answer": "D"}, None),
        ({"options": list("BADC"), "label": 2}, "D"),
        ({"options": {"text": list("4321"), "label": list("1234")}, "answerKey": "3"}, "2"),
        ({"options": {"text": list("4321"), "label": list("1234")}, "answer": "3"}, None),
        ({"options": ["0", "1", "2"], "answer": "1"}, "1"),  # either way
        ({"options": ["x", "y"], "answer_key": "y"}, "y"),
    ],
)
def test_a_right_option_that_reads_in_two_ways(row: dict[str, Any], answer: str | None) -> None:
    converter = Converter("multiple-choice", {}, max_chars=99)
    if answer is not None:
        assert converter({"question": "q", **row}).answer == answer
        return
    with pytest.raises(
        RowError, match=r"reads both as a text and as a letter or number .* in a field answer_key"
    ) as bad:
        converter({"question": "q", **row})
    assert bad.value.reason == "bad_option"


def test_columns_that_are_named_in_another_order_keep_their_letters() -> None:
    row = {"question": "q", "option_a": "w", "option_b": "x", "option_c": "y", "answer": "C"}
    fields = {"options": "option_c,option_a"}
    assert Converter(None, fields, max_chars=99)(row).answer == "y"


@pytest.mark.parametrize(
    ("names", "right"),
    [
        (("choice0", "choice1", "choice2"), "2"),
        (("choice_0", "choice_1", "choice_2"), 2),
        (("option1", "option2", "option3"), "3"),
        (("Option A", "Option B", "Option C"), "C"),
        (("choice_a", "choice_b", "choice_c"), "c"),
        (("opt-a", "opt-b", "opt-c"), "z"),
    ],
)
def test_options_in_fields_with_a_letter_or_number(names: tuple[str, ...], right: object) -> None:
    for order in (names, names[::-1]):
        row = {name: "xyz"[names.index(name)] for name in order}
        found = Converter(None, {}, max_chars=99)({"question": "q", **row, "answer": right})
        assert (found.question, found.answer) == ("q\nA. x\nB. y\nC. z", "z")


def test_numbers_of_fields_that_may_be_indices() -> None:
    copa = {"question": "q", "choice1": "x", "choice2": "y", "label": 1}
    with pytest.raises(RowError, match=r"label is 1, which reads both as the number of a field .*--field answer=label"):
        Converter(None, {}, max_chars=99)(copa)
    assert Converter(None, {"answer": "label"}, max_chars=99)(copa).answer == "x"
    assert Converter(None, {}, max_chars=99)({**copa, "label": "B"}).answer == "y"
    for row in (copa, {**copa, "label": 0}, {**copa, "label": "0"}, {**copa, "label": [0]}):
        with pytest.raises(RowError, match=r"name the options, .* from 0 \(--field options=choice1,choice2\)"):
            Converter(None, {}, max_chars=99)(row)
    for label, answer in ((0, "x"), (1, "y"), ("1", "y")):
        named = Converter(None, {"options": "choice1,choice2"}, max_chars=99)({**copa, "label": label})
        assert named.answer == answer
    with pytest.raises(RowError, match="reads both as a text and"):
        Converter(None, {}, max_chars=99)({"question": "q", "option1": "2", "option2": "1", "answer": "1"})
    counted = {"question": "q", "choice0": "x", "choice1": "y", "label": 1}
    assert Converter(None, {}, max_chars=99)(counted).answer == "y"
    lettered = {"question": "q", "option_1": "x", "option_a": "w", "option_b": "y", "answer": "B"}
    assert Converter(None, {}, max_chars=99)(lettered).answer == "y"
    for row in ({"choice": "x", "choices_left": "2"}, {"option_x": "x", "option_y": "y"}, {"opt": "x", "ops": "y"}):
        assert Converter(None, {}, max_chars=99)({"question": "q", **row, "answer": "a"}).answer == "a"


@pytest.mark.parametrize("name", ["correct", "answer_idx", "answerKey", "cop", "correct_answer"])
def test_a_right_option_and_an_answer_that_are_different_options(name: str) -> None:
    row = {"question": "q", "options": {"A": "w", "B": "x", "C": "y", "D": "z"}, "answer": "y", name: "D"}
    with pytest.raises(RowError, match=rf"answer is 'y' and {name} is 'D', another option: .*--field answer=NAME"):
        Converter(None, {}, max_chars=99)(row)
    for answer in ("z", "D", 3, None, "because of Y", ["y"]):  # MedQA, or an explanation
        assert Converter(None, {}, max_chars=99)({**row, "answer": answer}).answer == "z"
    assert Converter(None, {"answer": name}, max_chars=99)(row).answer == "z"


def test_answers_of_which_one_is_right_are_options() -> None:
    quail = {"question": "q", "answers": ["w", "x", "right"], "correct_answer_id": 2}
    with pytest.raises(RowError, match=r"--kind multiple-choice --field options=answers --field answer=correct_answer"):
        Converter(None, {}, max_chars=99)(quail)
    named = {"options": "answers", "answer": "correct_answer_id"}
    assert Converter("multiple-choice", named, max_chars=99)(quail).answer == "right"
    assert Converter("multiple-choice", named, max_chars=99)({**quail, "correct_answer_id": "2"}).answer == "right"
    assert Converter(None, {}, max_chars=99)({**quail, "correct_answer_id": None}).answer == "w"


@pytest.mark.parametrize(
    ("right", "met"),
    [(0, {"first"}), ("1", {"inside"}), (2.0, {"past"}), (3, set()), ("b", set()), ("x", set()), ([1], {"inside"})],
)
def test_how_right_options_are_counted_is_taken_down(right: object, met: set[str]) -> None:
    converter = Converter(None, {}, max_chars=99)
    with contextlib.suppress(RowError):
        converter({"question": "q", "options": ["x", "y"], "answer": right})
    assert converter.indices == met
    converter({"question": "q", "options": {"1": "x", "2": "y"}, "answer": "1"})
    assert converter.indices == met


def test_lists_of_answers_are_counted_under_text_too() -> None:
    row = {"questions": ["one", "two"], "answers": {"text": ["y", "z"], "answer_start": [1, 2]}}
    [bad] = Converter(None, {}, max_chars=9).questions(row)
    assert isinstance(bad, RowError)
    assert "2 questions and 2 answers" in bad.detail
    assert len(Converter(None, {}, max_chars=9).questions({**row, "answers": {"text": ["y"]}})) == 2


def test_code_beside_its_text_is_an_answer() -> None:
    mbpp = {"task_id": 1, "text": "Write it.", "code": "def f(): ..."}
    with pytest.raises(RowError, match=r"an answer \(code\) and no question .*--field question=text; .*--kind corpus"):
        Converter(None, {}, max_chars=99)(mbpp)
    found = Converter(None, {"question": "text"}, max_chars=99)(mbpp)
    assert (found.question, found.answer) == ("Write it.", "def f(): ...")
    for name in ("text", "code", "document", "passage", "body", "abstract"):
        assert Converter(None, {}, max_chars=99)({"title": "t", name: "x"}).text == "x"


def test_labels_of_databases_and_blank_ones() -> None:
    row = {"question": "q", "answer": "a", "domain": " ", "source": "\t"}
    found = Converter(None, {}, max_chars=99, domain="med", source="file")({**row, "is_correct": "t"})
    assert (found.domain, found.source) == ("med", "file")
    with pytest.raises(RowError, match="is_correct is f, so this is no answer"):
        Converter(None, {}, max_chars=99)({**row, "is_correct": "f"})


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "|")])
def test_other_separators(tmp_path: Path, name: str, separator: str) -> None:
    path = tmp_path / name
    path.write_text(f"question {separator} answer\nq, or not{separator}a\n")
    assert [row for _, row in read(path, tmp_path)] == [{"question": "q, or not", "answer": "a"}]


@pytest.mark.parametrize("separator", [";", ",", "|", "\t", "^"])
def test_a_separator_that_excel_names_in_the_first_line(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(f"\ufeffsep={separator}\r\nquestion{separator}answer\r\n\r\nq: or not{separator}a\r\n".encode())
    assert read(path, tmp_path) == [(4, {"question": "q: or not", "answer": "a"})]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "question,answer\n".encode("utf-16"), "UTF-16"),
        ("a.txt", "one\ntwo\n".encode("utf-16-le"), "UTF-16LE"),
        ("a.txt", "one\ntwo\n".encode("utf-16-be"), "UTF-16BE"),
        ("a.jsonl", "{}\n".encode("utf-32"), "UTF-32"),
        ("a.txt", b"one\rtwo\rthree", r"carriage returns alone, .* \(tr '\\r' '\\n'\)"),
        ("a.jsonl", b'{"text": "one"}\r{"text": "two"}\r', "carriage returns alone"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), r"gzip: let its name end in \.gz"),
        ("a.csv.gz", gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "compressed twice: decompress it once"),
        ("a.jsonl", bz2.compress(b"{}"), r"bzip2: let its name end in \.bz2"),
        ("a.txt", b'{"text": "one"}\n\n{"text": "two"}\nthree\n', r"a\.txt: holds JSON lines: .* end in \.jsonl"),
        ("a.txt.gz", gzip.compress(b'{"text": "one"}', mtime=0), "holds JSON lines"),
        ("a.csv", b"PK\x03\x04\x14\0\0\0", "zip archive, as Excel's files are too: unpack it"),
        ("a.jsonl", b"PAR1\x15\x04\x15", r"Parquet: let its name end in \.parquet"),
        ("a.txt", b"%PDF-1.7\n%\xe2\xe3", "is a PDF: export its text"),
        ("a.csv", lzma.compress(b"{}"), r"xz: let its name end in \.xz"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        ("a.txt.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    ],
)
def test_content_of_another_kind(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        list(read(tmp_path / name, tmp_path))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_of_fields_are_found_in_any_form(tmp_path: Path, form: Any) -> None:
    (tmp_path / "a.csv").write_text(unicodedata.normalize(form, "Câu hỏi,Trả lời,mã\nq,a,7\n"), encoding="utf-8")
    [(_, row)] = read(tmp_path / "a.csv", tmp_path)
    for asked in ("NFC", "NFD"):
        named = {"question": "Câu hỏi", "answer": "Trả lời", "id": "mã"}
        fields = {role: unicodedata.normalize(asked, name) for role, name in named.items()}
        record = Converter(None, fields, max_chars=10)(row)
        assert (record.question, record.answer, record.id) == ("q", "a", "7")
        assert Entity.parse(unicodedata.normalize(asked, "MÃ")).of(row, record) == "7"


def test_names_of_fields_that_differ_in_form_alone_stay_two(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"e\u0301": 1, "\u00e9": 2}\n', encoding="utf-8")
    assert read(tmp_path / "a.jsonl", tmp_path) == [(1, {"e\u0301": 1, "\u00e9": 2})]


def test_csv_with_bad_bytes_and_ragged_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfquestion,answer\nq,\xff\nq\nq,a,b\n")
    (_, bad_bytes), (_, short), (number, long) = read(path, tmp_path)
    assert bad_bytes["answer"] == "\udcff"  # refused as invalid UTF-8 when it becomes a record
    assert short == {"question": "q"}
    assert number == 4
    assert isinstance(long, RowError)


def test_folders_and_globs_are_sorted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "sub/c.txt", "notes.md", "config.json"):
        (folder / name).write_text(name)
    assert [row["text"] for _, row in read(folder, tmp_path)] == ["a.txt", "b.txt", "sub/c.txt"]
    assert [row["text"] for _, row in read(f"{folder}/**/*.txt", tmp_path)] == ["a.txt", "b.txt", "sub/c.txt"]
    assert [row["text"] for _, row in read(f"{folder}/[b]*.txt", tmp_path)] == ["b.txt"]


def test_what_a_folder_holds_is_read_or_counted(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for place in (folder / "deep", folder / ".hidden", elsewhere, folder / "made" / "gl"):
        place.mkdir(parents=True)
    for name in ("A.TXT", "deep/b.Txt", ".hidden/c.txt", ".d.txt", "e.json", "f.JSON", "i.json.gz", "g.pdf", "README"):
        (folder / name).write_text(name)
    (folder / "made/manifest.json").write_text('{"format": 1, "splits": {}, "fingerprint": ""}')  # an earlier output
    (folder / "made/gl/000000.tar").write_bytes(b"")
    (folder / "deep/manifest.json").write_text('{"splits": []}')  # none of ours
    (elsewhere / "manifest.json").write_text("[" * 100_000)
    (elsewhere / "h.txt").write_text("h.txt")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(folder)
    passed_over: Counter[str] = Counter()
    parts = expand(Source(str(folder)), tmp_path, passed_over)
    assert [part.name.removeprefix(f"{folder}/") for part in parts] == ["A.TXT", "deep/b.Txt", "linked/h.txt"]
    assert [row["text"] for part in parts for _, row in rows(part)] == ["A.TXT", "deep/b.Txt", "h.txt"]  # type: ignore[call-overload]
    assert passed_over == {".json": 5, ".pdf": 1, "README": 1, "prepared set": 1}
    (folder / "deep" / "circle").symlink_to(folder / "deep")
    alone: Counter[str] = Counter()
    expand(Source(str(folder / "deep")), tmp_path, alone)
    assert list(alone) == [".json"]
    (folder / "only").mkdir()
    (folder / "only/squad.json").write_text("[]")
    with pytest.raises(UserError, match=r"only: a folder without source files .*; it has 1 \.json"):
        expand(Source(str(folder / "only")), tmp_path)
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone.jsonl: is a link to a file that does not exist"):
        expand(Source(str(folder)), tmp_path)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_a_folder_with_the_state_of_another_tool_is_no_saved_data_set(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", "a.jsonl")
    (tmp_path / "in" / name).write_text("{}")
    assert [row for _, row in read(tmp_path / "in", tmp_path)] == ROWS


def test_names_that_hold_an_ending_and_do_not_end_in_it(tmp_path: Path) -> None:
    for name in ("q.txt", "notes.txt summary.docx", "scan.csv (1).zip", "#q.jsonl#", "my notes.csv of 2024.TXT.GZ"):
        (tmp_path / name).write_bytes(gzip.compress(b"t") if name.endswith("GZ") else b"t")
    passed_over: Counter[str] = Counter()
    parts = expand(Source(str(tmp_path)), tmp_path, passed_over)
    assert [part.path.name for part in parts] == ["my notes.csv of 2024.TXT.GZ", "q.txt"]
    assert [row["text"] for part in parts for _, row in rows(part)] == ["t", "t"]  # type: ignore[call-overload]
    assert passed_over == {".docx": 1, ".zip": 1, ".jsonl#": 1}


def test_globs_match_what_is_hidden_only_by_its_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".in/q.txt", ".in/._q.txt", ".in/.old/q.txt", ".in/new/q.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("t")

    def found(pattern: str) -> list[str]:
        return [part.name.removeprefix(f"{tmp_path}/.in/") for part in expand(Source(pattern), tmp_path)]

    assert found(f"{tmp_path}/.in/*.txt") == ["q.txt"]
    assert found(f"{tmp_path}/.in/**/*.txt") == ["new/q.txt", "q.txt"]
    assert found(f"{tmp_path}/.in/._*.txt") == ["._q.txt"]
    assert found(f"{tmp_path}/.i*/.old/*.txt") == [".old/q.txt"]
    monkeypatch.chdir(tmp_path / ".in/new")
    assert found("../*.txt") == ["../q.txt"]
    with pytest.raises(UserError, match="no such file, folder or glob"):
        found(f"{tmp_path}/*/q.txt")


def test_globs_match_folders_as_if_each_was_named(tmp_path: Path) -> None:
    for name in ("g/a.jsonl", "g/sub/b.jsonl", "g/sub/low/c.json", "g/.old/d.jsonl", "g/sub/notes.pdf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "t"}')

    def found(pattern: str) -> list[str]:
        passed_over.clear()
        parts = expand(Source(f"{tmp_path}/{pattern}"), tmp_path, passed_over)
        return [part.name.removeprefix(f"{tmp_path}/") for part in parts]

    passed_over = Counter[str]()
    assert found("g/*") == ["g/a.jsonl", "g/sub/b.jsonl"]
    assert passed_over == {".pdf": 1, ".json": 1}
    assert found("g/**/*") == found("g/**") == ["g/a.jsonl", "g/sub/b.jsonl", "g/sub/low/c.json"]
    assert passed_over == {".pdf": 1}
    assert found("*/s*") == ["g/sub/b.jsonl"]
    assert found("**/.o*") == ["g/.old/d.jsonl"]
    assert found("g/*/*.jsonl") == ["g/sub/b.jsonl"]
    (tmp_path / "g/empty").mkdir()
    with pytest.raises(UserError, match=r"g/empty: a folder without source files .*; it has no files"):
        found("g/*")
    (tmp_path / "g/empty/gone.jsonl").symlink_to("nowhere")
    [part] = expand(Source(f"{tmp_path}/g/e*/*.jsonl"), tmp_path)
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot be read"):
        part.fingerprint()


@pytest.mark.parametrize("pattern", ["g/*", "g/*/*.jsonl", "g/**/*.jsonl", "g/secret/*"])
def test_globs_pass_over_no_folder_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    def closed(place: Any = ".") -> Any:
        if Path(place) == tmp_path / "g/secret":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
        return real(place)

    for name in ("g/ok/a.jsonl", "g/secret/b.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text('{"text": "t"}')
    real = os.scandir
    monkeypatch.setattr(os, "scandir", closed)  # root, as whom tests may run, may read everything
    with pytest.raises(UserError, match=r"g/secret: cannot be read \(Permission denied\)"):
        expand(Source(str(tmp_path / pattern)), tmp_path)


def test_dates_that_python_does_not_know(tmp_path: Path) -> None:
    days = pa.array([0, 10_000_000], pa.int32()).cast(pa.date32())
    moments = pa.array([1, 2**62], pa.timestamp("us"))
    table = pa.table({"question": ["q", "r"], "answer": ["a", "b"], "day": days, "at": moments, "exact": moments})
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = (row for _, row in read(tmp_path / "a.parquet", tmp_path))
    assert (first["day"], first["at"]) == ("1970-01-01", "1970-01-01 00:00:00.000001")
    assert second["question"] == "r"
    inside = pa.StructArray.from_arrays([days, pa.array([1, 2**62], pa.duration("us"))], ["day", "took"])
    listed = [pa.ListArray.from_arrays([0, 1, 2], inside), pa.LargeListArray.from_arrays([0, 1, 2], inside)]
    names = ["question", "about", "list", "large"]
    pq.write_table(pa.table([table["question"], inside, *listed], names), tmp_path / "b.parquet")
    first, second = (row for _, row in read(tmp_path / "b.parquet", tmp_path))
    held = {"day": "1970-01-01", "took": "1"}
    assert first == {"question": "q", "about": held, "list": [held], "large": [held]}
    assert second["question"] == "r"
    pair = pa.FixedSizeListArray.from_arrays(pa.concat_arrays([days, days]), 2)
    keyed = pa.MapArray.from_arrays([0, 1, 2], ["since", "since"], days)
    pq.write_table(pa.table([table["question"], pair, keyed], ["question", "pair", "map"]), tmp_path / "c.parquet")
    first, second = (row for _, row in read(tmp_path / "c.parquet", tmp_path))
    far = second["map"]["since"]
    assert first == {"question": "q", "pair": ["1970-01-01", far], "map": {"since": "1970-01-01"}}


def test_a_map_of_a_parquet_file_is_an_object(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.string())
    maps = pa.array([[("answer", "a"), ("by", "x")], None, [("answer", "b"), ("answer", "c")]], kind)
    pq.write_table(pa.table({"question": ["q", "r", "s"], "about": maps}), tmp_path / "a.parquet")
    found = [row["about"] for _, row in read(tmp_path / "a.parquet", tmp_path)]
    assert found == [{"answer": "a", "by": "x"}, None, [("answer", "b"), ("answer", "c")]]


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
def test_few_long_rows_are_decoded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Also where they are among short ones."""
    monkeypatch.setattr(arrow_rows, "BATCH_BYTES", 100_000)
    kept = [{"text": f"{i}" * (20_000 if i % 50 < 9 else 5)} for i in range(300)]
    read_, decoded = list[int](), list[int]()
    small, dicts = arrow_rows._small, arrow_rows._dicts
    monkeypatch.setattr(arrow_rows, "_small", lambda batch: read_.append(batch.nbytes) or small(batch))  # type: ignore[func-returns-value]
    monkeypatch.setattr(arrow_rows, "_dicts", lambda batch: decoded.append(batch.nbytes) or dicts(batch))  # type: ignore[func-returns-value]
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(kept), path, row_group_size=9, use_dictionary=False)
    else:
        path = tmp_path / "a"
        pytest.importorskip("datasets").Dataset.from_list(kept).save_to_disk(str(path))
    assert read(path, tmp_path) == list(enumerate(kept, 1))
    assert max(decoded) <= 100_000
    if kind == "parquet":
        assert max(read_) < 300_000


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    """As a join writes them: a row could have either value."""
    columns = [pa.array(["right"]), pa.array(["other"])]
    pq.write_table(pa.table(columns, ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: .*its columns name 'text' twice"):
        read(tmp_path / "a.parquet", tmp_path)


def test_a_parquet_string_that_is_not_utf8_is_a_bad_row_and_no_more(tmp_path: Path) -> None:
    raw = pa.array([b"one", b"tw\xff", b"three"]).cast(pa.string(), safe=False)
    with pytest.raises(UnicodeDecodeError):
        raw.to_pylist()
    names = pa.StructArray.from_arrays([pa.array(["a", "b", "c"])], ["name"])
    pq.write_table(pa.table({"text": raw, "about": names}), tmp_path / "a.parquet")
    first, second, third = read(tmp_path / "a.parquet", tmp_path)
    assert first == (1, {"text": "one", "about": {"name": "a"}})
    assert third == (3, {"text": "three", "about": {"name": "c"}})
    assert second[0] == 2
    assert isinstance(second[1], RowError)
    assert (second[1].reason, second[1].detail) == ("invalid_utf8", "byte 2 of a string")


def test_json_that_is_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"a.json: damaged or not a json file"):
        read(tmp_path / "a.json", tmp_path)


def test_pipe_source(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl.gz")
    assert [row for _, row in read(f"pipe:cat '{path}'", tmp_path)] == ROWS


KEY = "-H 'Authorization: Bearer SECRET'"


@pytest.mark.parametrize(
    ("address", "name", "base"),
    [
        ("https://me:SECRET@host/x/qa.csv.gz?sig=SECRET", "https://host/x/qa.csv.gz", "qa.csv.gz"),
        ("https://host/get?sig=SECRET/1&file=qa.csv.gz#2", "https://host/get", "get"),
        ("gs://bucket/qa.csv.gz", "gs://bucket/qa.csv.gz", "qa.csv.gz"),
        (f"pipe:curl -s {KEY} https://host/x/qa.csv.gz", "pipe:.../qa.csv.gz", "qa.csv.gz"),
        (f'pipe:curl {KEY} "host/qa.csv.gz?sig=SECRET" | cat', "pipe:.../qa.csv.gz", "qa.csv.gz"),
        ("pipe:scp me:SECRET@host:qa.csv.gz /dev/stdout|head", "pipe:.../qa.csv.gz", "qa.csv.gz"),
        (f"pipe:curl {KEY} 'https://host/get?file=qa.csv.gz'", "pipe", "pipe"),
    ],
)
def test_an_address_and_a_command_are_named_without_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, name: str, base: str
) -> None:
    def fetch(url: str, target: Path) -> None:
        assert url == address
        target.write_bytes(gzip.compress(b"text\nt\n"))

    def away(url: str, target: Path) -> None:
        raise UserError(f"{url}: nobody answers there")

    (tmp_path / "downloads").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("lbr_dist.data.remote.fetch", fetch)
        [part] = expand(Source(address), tmp_path / "downloads")
        assert (part.name, part.base, part.format, part.compression) == (name, base, "csv", ".gz")
        assert [row for _, row in rows(part)] == [{"text": "t"}]
        assert "SECRET" not in json.dumps(part.fingerprint())
        patch.setattr("lbr_dist.data.remote.fetch", away)
        with pytest.raises(UserError) as caught:
            expand(Source(address), tmp_path / "downloads")
        assert str(caught.value) == f"{name}: nobody answers there"
    with pytest.raises(UserError, match="unknown format") as caught:
        expand(Source(address.replace(".csv.gz", "")), tmp_path / "downloads")
    assert "SECRET" not in str(caught.value)


def test_names_of_files_on_this_machine_stay_as_they_are(tmp_path: Path) -> None:
    for name in ("what?.jsonl", "a#b.jsonl", "me@host.jsonl"):
        (tmp_path / name).write_text('{"text": "t"}')
        [part] = expand(Source(str(tmp_path / name)), tmp_path)
        assert (part.name, part.base) == (str(tmp_path / name), name)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-20],
            "a.jsonl.gz: damaged or not a jsonl file",
        ),
        ("a.jsonl.zst", b"not zstd", "a.jsonl.zst: damaged or not a jsonl file"),
        ("a.parquet", b"PAR1 no", "a.parquet: damaged or not a parquet file"),
        ("a.tar", b"x" * 600, "a.tar: damaged or not a tar file"),
        ("a.xlsx", b"", "a.xlsx: unknown format; names end in .jsonl"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name, tmp_path)
    assert message in str(caught.value)


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    for path in ("missing.jsonl", "none*.jsonl"):
        with pytest.raises(UserError, match="no such file, folder or glob with source files"):
            read(tmp_path / path, tmp_path)
    with pytest.raises(UserError, match=r"x\.jsonl: cannot be read \(File name too long\)"):
        read("x" * 300 + "x.jsonl", tmp_path)
    with pytest.raises(UserError, match="webdataset has no opener"):
        read("s9://bucket/a.jsonl", tmp_path)
    with pytest.raises(UserError, match=r"file://.*/missing\.jsonl: no such file"):
        read(f"file://{tmp_path}/missing.jsonl", tmp_path)


def test_a_source_in_a_folder_of_another_user_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path, **_: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "stat", closed)
    with pytest.raises(UserError, match=r"/x\.jsonl: cannot be read \(Permission denied\)"):
        expand(Source(str(tmp_path / "x.jsonl")), tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_file_names_that_are_not_utf8(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    foreign = path.rename(tmp_path / os.fsdecode(b"gr\xf6\xdfe-" + name.encode()))
    assert [dict(row) for _, row in read(foreign, tmp_path)] == ROWS


def test_kind_prefix() -> None:
    assert Source.parse("corpus=a.txt", None, {}) == Source("a.txt", "corpus", {})
    assert Source.parse("a=b.txt", "corpus", {}) == Source("a=b.txt", "corpus", {})
    with pytest.raises(UserError, match="--kind poem: no such kind; the kinds are question-answer"):
        Source.parse("a.txt", "poem", {})
