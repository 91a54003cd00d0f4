"""Evaluation sets from elsewhere: what is in them is kept out of training, or the run says why it cannot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from prepared import domain, everything, questions_and_texts, run, sentence, write

from lbr_dist.data.preparation import minhash
from lbr_dist.data.record import normalise
from lbr_dist.errors import UserError


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    return questions_and_texts(tmp_path)


def test_decontamination_drops_whole_components(sources: list[str], tmp_path: Path) -> None:
    rows = domain()
    outside = [
        {"query": "unheard of", "document": rows[0]["answer"] + "!"},
        {"query": rows[-1]["question"].upper(), "document": "unheard of too"},
        {"text": sentence(random.Random(9))},  # the first of the corpus
    ]
    write(tmp_path / "beir.jsonl", outside[:2])
    write(tmp_path / "texts.jsonl", outside[2:])
    report = run(sources, tmp_path / "out", decontaminate=[str(tmp_path / "beir.jsonl"), str(tmp_path / "texts.jsonl")])
    kept = {row["id"] for side in everything(tmp_path / "out").values() for row in side}
    gone = [row["id"] for row in rows if row["id"] not in kept]
    assert {name.split(":")[0] for name in gone} == {"e0", "e99"}
    assert len(gone) == sum(row["id"].startswith(("e0:", "e99:")) for row in rows)
    assert report.data["dropped"]["connected_to_external_evaluation"] == len(gone)
    texts = [normalise(row["text"]) for row in everything(tmp_path / "out")["gl"] if "text" in row]
    assert normalise(outside[2]["text"]) not in texts
    assert not [text for text in texts if normalise(rows[0]["answer"]) in text]


def test_a_set_of_which_nothing_is_left(tmp_path: Path) -> None:
    path = write(tmp_path / "qa.jsonl", domain())
    with pytest.raises(UserError, match=r"qa.jsonl: no record is left .* \(dropped: \d+ connected_to_external_eval"):
        run([str(path)], tmp_path / "out", decontaminate=[str(path)])
    with pytest.raises(UserError, match=r"no record is left .* \(dropped: \d+ left_out_by_sizes\): .* larger sizes"):
        run([str(path)], tmp_path / "out", sizes={"gl": 0.001, "cl": 0, "eval": 0})
    assert not (tmp_path / "out").exists()


def test_a_corpus_is_decontaminated_of_questions(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [{"id": str(i), "text": sentence(rng)} for i in range(60)]
    outside = [{"question": "unheard of", "answer": texts[7]["text"]}]
    corpus, questions = write(tmp_path / "corpus.jsonl", texts), write(tmp_path / "questions.jsonl", outside)
    run([str(corpus)], tmp_path / "out", kind="corpus", sizes={"cl": 0}, decontaminate=[str(questions)])
    kept = {row["id"] for row in everything(tmp_path / "out")["gl"]}
    assert kept == {row["id"] for row in texts} - {"7"}


def test_renamed_fields_of_the_sources_need_not_be_those_of_the_evaluation_set(tmp_path: Path) -> None:
    rows = domain()
    renamed = [{"frage": row["question"], "antwort": row["answer"]} for row in rows]
    own, outside = write(tmp_path / "own.jsonl", renamed), write(tmp_path / "bench.jsonl", rows[:40])
    fields = {"question": "frage", "answer": "antwort"}
    run([str(own)], tmp_path / "out", fields=fields, decontaminate=[str(outside)])
    kept = {row["question"] for side in everything(tmp_path / "out").values() for row in side}
    assert not kept & {row["question"] for row in rows[:40]}
    assert kept & {row["question"] for row in rows[60:]}
    write(tmp_path / "same.jsonl", renamed[:40])
    run([str(own)], tmp_path / "again", fields=fields, decontaminate=[str(tmp_path / "same.jsonl")])
    assert everything(tmp_path / "again") == everything(tmp_path / "out")


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (
            ['{"frage": "q", "antwort": "a"}'],
            "1 of 1 rows cannot be read.*line 1: cannot tell .* fields frage, antwort",
        ),
        (['{"question": "q", "answer": "a"}'] * 300 + ["{"], "1 of 301 rows .* invalid_json .first: .*line 301"),
        ([], "has no rows"),
    ],
)
def test_an_evaluation_set_that_cannot_be_read_whole(
    sources: list[str], tmp_path: Path, lines: list[str], problem: str
) -> None:
    (tmp_path / "bench.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"--decontaminate {tmp_path}/bench.jsonl: {problem}"):
        run(sources, tmp_path / "out", decontaminate=[str(tmp_path / "bench.jsonl")], max_bad_share=1)


OPTIONS = {"opa": "one", "opb": "two", "opc": "three", "opd": "four"}


@pytest.mark.parametrize(
    "withheld",
    [
        lambda row: {"question": row["question"]},
        lambda row: {"question": row["question"], "answer": None},
        lambda row: {"question": row["question"], "answer": ""},
    ],
)
def test_withheld_answers_leave_the_question(tmp_path: Path, withheld: Any) -> None:
    rows = domain()
    own, outside = write(tmp_path / "own.jsonl", rows), write(tmp_path / "test.jsonl", [withheld(r) for r in rows[:9]])
    report = run([str(own)], tmp_path / "out", decontaminate=[str(outside)])
    kept = {row["id"].split(":")[0] for side in everything(tmp_path / "out").values() for row in side}
    assert not kept & {row["id"].split(":")[0] for row in rows[:9]}  # whole entities go, as with answers
    assert report.data["decontaminate"] == {"read": 9, "by_question_alone": 9}
    assert any("9 --decontaminate rows have no usable answer" in line for line in report.lines)


def test_choices_behind_an_open_question_are_kept_out_too(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = [{"question": f"which one {i}", "options": [sentence(rng, 3) for _ in "ABCD"], "answer": "D"}
            for i in range(60)]  # fmt: skip
    own = write(tmp_path / "own.jsonl", rows)
    outside = write(tmp_path / "exam.jsonl", [{"question": sentence(rng), "answer": sentence(rng)}, *rows[:10]])
    report = run([str(own)], tmp_path / "out", decontaminate=[str(outside)])
    assert report.data["dropped"]["connected_to_external_evaluation"] == 10
    assert report.data["decontaminate"] == {"read": 11, "by_question_alone": 10}
    with pytest.raises(UserError, match=r"10 of 11 rows are bad.* the row has options .*, and an earlier one told"):
        run([str(outside)], tmp_path / "other")


def test_withheld_choices_leave_the_question_with_its_options(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = [{"question": sentence(rng), **OPTIONS, "cop": i % 4} for i in range(200)]
    own, outside = tmp_path / "own.jsonl", tmp_path / "test.jsonl"
    write(own, rows)
    write(outside, [{**row, "cop": -1} for row in rows[:20]])
    report = run([str(own)], tmp_path / "out", decontaminate=[str(outside)])
    assert report.data["dropped"]["connected_to_external_evaluation"] == 20
    kept = json.dumps(everything(tmp_path / "out"))
    assert rows[7]["question"] not in kept
    assert sum(row["question"] in kept for row in rows) == 180


def test_very_many_alike_texts_of_which_some_quote_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropping those that quote makes runs of alike texts shorter, so that the proof compares others of them."""
    monkeypatch.setattr(minhash, "LARGE_RUN", 100)
    rng, words = random.Random(3), [f"w{number}" for number in range(50_000)]
    fixed = [f"f{number}" for number in range(45)]
    questions = [" ".join(rng.choices(words, k=8)) for _ in range(50)]

    def report(part: str) -> str:
        return " ".join([*fixed[:20], part, *fixed[20:34], rng.choice(words), *fixed[34:]])

    quoting = [report(rng.choice(questions)) for _ in range(300)]
    texts = [report(" ".join(rng.choices(words, k=8))) for _ in range(900)]
    outside = [
        {"question": f"case {number}", "answer": report(" ".join(rng.choices(words, k=8)))} for number in range(10)
    ]
    outside += [{"question": question, "answer": f"short {number}"} for number, question in enumerate(questions)]
    corpus = write(tmp_path / "corpus.jsonl", [{"text": text} for text in quoting + texts])
    bench = write(tmp_path / "bench.jsonl", outside)
    run([str(corpus)], tmp_path / "out", sizes={"cl": 0}, decontaminate=[str(bench)])
    kept = {row["text"] for row in everything(tmp_path / "out")["gl"]}
    assert kept
    assert not kept & set(quoting)


@pytest.mark.parametrize("answer", [{"answer": "D"}, {}])
def test_the_stem_of_a_multiple_choice_question_is_kept_out_without_its_options(
    tmp_path: Path, answer: dict[str, str]
) -> None:
    rng = random.Random(1)
    stems = [sentence(rng, 12) for _ in range(20)]
    exam = [{"question": stem, "options": [sentence(rng, 3) for _ in "ABCD"], **answer} for stem in stems]
    asked = [{"question": stem, "answer": sentence(rng)} for stem in stems[:10]]
    others = [{"question": sentence(rng, 12), "answer": sentence(rng)} for _ in range(40)]
    pages = [{"text": f"{sentence(rng)} {stem} {sentence(rng)}"} for stem in stems[10:]] + [{"text": sentence(rng)}]
    sources = [write(tmp_path / "own.jsonl", asked + others), write(tmp_path / "pages.jsonl", pages)]
    report = run([*map(str, sources)], tmp_path / "out", decontaminate=[str(write(tmp_path / "exam.jsonl", exam))])
    assert report.data["dropped"]["connected_to_external_evaluation"] == 10
    assert report.data["dropped"]["text_contains_evaluation"] == 10
    # and of the set's own evaluation side
    pages = [{"text": f"{sentence(rng)} {row['question']} {sentence(rng)}"} for row in exam]
    sources = [
        write(tmp_path / "exam.jsonl", [{**row, "answer": "D"} for row in exam]),
        write(tmp_path / "p.jsonl", pages),
    ]
    report = run([*map(str, sources)], tmp_path / "own", sizes={"eval": 5, "cl": 5})
    assert report.data["dropped"]["text_contains_evaluation"] == 5


def test_an_evaluation_set_of_code_is_read_by_its_questions(tmp_path: Path) -> None:
    rows = domain()
    sources = [str(write(tmp_path / "qa.jsonl", rows))]
    concode = write(tmp_path / "concode.jsonl", [{"nl": rows[0]["question"], "code": "unheard of"}])
    report = run(sources, tmp_path / "out", decontaminate=[str(concode)])
    assert report.data["dropped"]["connected_to_external_evaluation"] > 0
    assert f"--decontaminate {concode}: question-answer (question = nl, answer = code)" in report.lines
    cosqa = write(tmp_path / "cosqa.jsonl", [{"doc": rows[0]["question"], "code": "unheard of"}])
    with pytest.raises(UserError, match=r"--decontaminate .*cosqa.jsonl: 1 of 1 rows cannot be read.*question=doc"):
        run(sources, tmp_path / "other", decontaminate=[str(cosqa)])
