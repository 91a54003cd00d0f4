"""Benchmarks in the layout of BEIR: as training rows, as what training must not hold, and as a task of mteb."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import domain, everything, run, sentence, write

from lbr_dist.data.sources.parts import Source, expand
from lbr_dist.data.sources.readers import rows
from lbr_dist.errors import UserError
from lbr_dist.evaluation.evaluate import evaluate
from lbr_dist.evaluation.held_out import load_held_out
from lbr_dist.evaluation.retrieval import BM25Search, check_data, named_task, retrieval_scores

DOCUMENTS = [
    {"_id": "d1", "title": "Aspirin", "text": "is acetylsalicylic acid"},
    {"_id": "d2", "title": "", "text": "a drug for pain"},
    {"_id": "d3", "title": "Fever", "text": "is a high temperature"},
    {"_id": 4, "title": "Nobody asks", "text": "for this one"},
    {"_id": "empty", "title": "", "text": ""},
]
QUERIES = [
    {"_id": "q1", "text": "what is aspirin", "metadata": {}},
    {"_id": "q2", "text": "what is fever"},
    {"_id": "q3", "text": "only in the other split"},
]
TEST = [("q2", "d3", 1), ("q1", "d2", 1), ("q1", "d3", 0), ("q1", "d1", 2), ("q1", "empty", -1)]
TRAIN = [("q3", "4", 1)]


def judge(file: Path, judged: list[tuple[str, str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in judged)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As BEIR's own archives unpack."""
    folder = tmp_path / "nfcorpus"
    judge(folder / "qrels" / "test.tsv", TEST)
    judge(folder / "qrels" / "train.tsv", TRAIN)
    write(folder / "corpus.jsonl", DOCUMENTS)
    write(folder / "queries.jsonl", QUERIES)
    return folder


def read(source: str) -> list[Any]:
    return [row for part in expand(Source(source), Path()) for _, row in rows(part)]


def test_a_row_is_a_judged_query(folder: Path) -> None:
    aspirin, pain, fever = ({key: d[key] for key in ("title", "text")} for d in DOCUMENTS[:3])
    assert read(f"{folder}@test") == [
        {"id": "nfcorpus:q2", "question": "what is fever", "answer": [fever], "negatives": []},
        {"id": "nfcorpus:q1", "question": "what is aspirin", "answer": [aspirin, pain], "negatives": [fever]},
    ]
    assert [row["id"] for row in read(f"{folder}@train")] == ["nfcorpus:q3"]


def test_the_same_in_other_formats(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed, and as data sets on the hub have it: a folder of Parquet files for each of the three."""
    before = read(f"{folder}@test")
    corpus, queries = folder / "corpus.jsonl", folder / "queries.jsonl"
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    corpus.unlink()
    queries.unlink()
    (folder / "queries").mkdir()
    pq.write_table(
        pa.Table.from_pylist([{"_id": q["_id"], "text": q["text"]} for q in QUERIES]), folder / "queries/a.parquet"
    )
    for file in (folder / "qrels").iterdir():
        file.unlink()
    for number, judged in enumerate((TEST[:2], TEST[2:])):
        names = ("query-id", "corpus-id", "score")
        table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in judged])
        pq.write_table(table, folder / "qrels" / f"test-0000{number}-of-00002.parquet")
    monkeypatch.chdir(folder)
    assert read(".") == before, "its only split need not be named"


def change(name: str, old: str, new: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return apply


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", ""), "line 2: has no query-id .* the first line"),
        (change("qrels/test.tsv", "q1\td1\t2", "q1\td1\t0.5"), "test.tsv: line 5: score '0.5' is not a whole number"),
        (change("qrels/test.tsv", "q1\td1\t2", "q1\td2\t2"), "query q1, document d2 has score 2 here and 1 above"),
        (change("qrels/test.tsv", "q2\td3", "q9\td3"), "@test: judges query q9, which is not in .*queries.jsonl"),
        (change("qrels/test.tsv", "q2\td3", "q2\td9"), "judges document d9 for query q2, .* not in .*corpus.jsonl"),
        (change("corpus.jsonl", '"d2"', '"d1"'), "corpus.jsonl: line 2: a second document of the id d1"),
        (change("corpus.jsonl", '"_id": "d2", ', ""), r"corpus.jsonl: line 2: has no _id \(the row has title, text\)"),
        (change("corpus.jsonl", '"text": "a drug', '"body": "a drug'), "line 2: document d2 has no text"),
        (change("corpus.jsonl", "a drug for pain", ""), "document d2 is empty, and relevant to query q1"),
        (change("corpus.jsonl", '{"_id": "d2"', '{"_id": d2'), "corpus.jsonl: line 2: the line is not valid JSON"),
        (change("queries.jsonl", "what is fever", " "), "queries.jsonl: line 2: query q2 has no text"),
        (change("queries.jsonl", '"q3"', '"q2"'), "queries.jsonl: line 3: a second query of the id q2"),
        (lambda folder: judge(folder / "qrels/test.tsv", []), "test.tsv: has no judgements"),
        (lambda folder: (folder / "corpus.jsonl").unlink(), "has judgements .* and no corpus: .* corpus.jsonl"),
        (lambda folder: write(folder / "queries.csv", []), "has queries.csv and queries.jsonl: leave one of them"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=message):
        read(f"{folder}@test")


def test_a_split_is_named_where_there_are_several(folder: Path) -> None:
    for source in (str(folder), f"{folder}@dev"):
        with pytest.raises(
            UserError, match=r"has the splits test, train in qrels: name one, for example .*nfcorpus@test"
        ):
            expand(Source(source), Path())


def test_a_benchmark_in_a_folder_of_sources_is_not_read_by_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nfcorpus: is a benchmark, .* name it by itself, as .*/nfcorpus@SPLIT"):
        expand(Source(str(tmp_path)), Path())
    (folder / "queries.jsonl").unlink()
    (folder / "qrels").rename(folder / ".qrels")
    assert len(expand(Source(str(tmp_path)), Path())) == 1
    (folder / "notes/qrels").mkdir(parents=True)
    write(folder / "notes/qrels/a.jsonl", DOCUMENTS)
    assert len(expand(Source(str(tmp_path)), Path())) == 2


@pytest.mark.parametrize("corpus", ["corpus.jsonl.gz", "corpus.json", "corpus"])
def test_a_benchmark_without_judgements_is_not_read_by_file(folder: Path, tmp_path: Path, corpus: str) -> None:
    """Training would learn its queries."""
    (folder / "qrels").rename(folder / "notes")
    if corpus == "corpus":
        (folder / "corpus").mkdir()
    (folder / "corpus.jsonl").rename(folder / corpus / ("a.csv" if corpus == "corpus" else ""))
    for source in (folder, tmp_path, folder.parent / "nf*"):
        with pytest.raises(UserError, match=rf"nfcorpus: .* no judgements .*: add qrels/.* name .*/{corpus} alone"):
            expand(Source(str(source)), Path())
    assert len(expand(Source(f"{folder}/q*.jsonl"), Path())) == 1


def test_its_texts_alone_are_a_file(folder: Path) -> None:
    with pytest.raises(UserError, match=r"@test: .* not of kind corpus: for the texts alone name .*corpus\.jsonl"):
        expand(Source.parse(f"corpus={folder}@test", None, {}), Path())


def test_a_benchmark_trains_on_one_split_and_keeps_the_other_out(tmp_path: Path) -> None:
    """Judged documents are answers, the best first; of the other split nothing is left, not as a negative either."""
    found, rng = domain(), random.Random(1)
    bench = tmp_path / "bench"
    judge(
        bench / "qrels" / "train.tsv", [(f"q{i}", f"d{i}", 1) for i in range(40)] + [("q0", "d41", 0), ("q1", "x1", 0)]
    )
    judge(bench / "qrels" / "test.tsv", [(f"q{i}", f"d{i}", 1) for i in range(40, 50)])
    texts = [{"_id": f"d{i}", "title": "", "text": sentence(rng)} for i in range(50)]
    write(bench / "corpus.jsonl", [*texts, {"_id": "x1", "text": "surely not"}])
    write(bench / "queries.jsonl", [{"_id": f"q{i}", "text": f"about {i} {sentence(rng, 9)}"} for i in range(50)])
    shared = {**found[0], "question": texts[45]["text"]}
    own = write(
        tmp_path / "own.jsonl", [{"frage": row["question"], **row, "question": None} for row in (shared, *found[9:])]
    )
    fields = {"question": "frage"}
    run([str(own), f"{bench}@train"], tmp_path / "out", fields=fields, decontaminate=[f"{bench}@test"])
    kept = {row["id"]: row for side in everything(tmp_path / "out").values() for row in side}
    assert {name for name in kept if name.startswith("bench:")} == {f"bench:q{i}" for i in range(40)}
    assert kept["bench:q3"]["answer"] == texts[3]["text"]
    assert (kept["bench:q0"].get("negatives"), kept["bench:q1"]["negatives"]) == (None, ["surely not"])
    assert shared["id"] not in kept
    assert found[-1]["id"] in kept


def test_mteb_ranks_the_whole_corpus_by_grades(folder: Path) -> None:
    """nDCG@10 of BM25 from its definition: the gain of a document is its grade."""
    task = named_task(f"{folder}@test")
    check_data(task)
    scores = retrieval_scores(BM25Search(), task)
    task.load_data()
    data = task.dataset["default"]["test"]
    assert data["corpus"]["text"][0] == "Aspirin is acetylsalicylic acid"
    assert data["corpus"].num_rows == len(DOCUMENTS)
    assert data["relevant_docs"] == {"q0": {"p2": 1}, "q1": {"p0": 2, "p1": 1}}
    search = BM25Search()
    search.index(data["corpus"])
    found = search.search(data["queries"], top_k=10)
    expected = []
    for query, grades in data["relevant_docs"].items():
        ranked = sorted(found[query], key=lambda name: -found[query][name])
        gains = [grades.get(name, 0) / np.log2(place) for place, name in enumerate(ranked, 2)]
        ideal = sum(grade / np.log2(place) for place, grade in enumerate(sorted(grades.values(), reverse=True), 2))
        expected.append(sum(gains) / ideal)
    assert scores["ndcg_at_10"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert 0 < scores["ndcg_at_10"] < 1


def test_a_benchmark_in_the_place_of_a_set(folder: Path, tmp_path: Path) -> None:
    """All that `lbr eval` measures on held-out questions, on its queries."""
    judge(folder / "qrels" / "test.tsv", [*TEST, ("q3", "d1", 0)])
    data = load_held_out(f"{folder}@test")
    assert (data.name, data.queries) == ("nfcorpus@test", ["what is fever", "what is aspirin"])
    assert (data.positives, data.grades) == ([[2], [1, 0]], [[1], [1, 2]])
    assert data.references == ["Fever is a high temperature", "Aspirin is acetylsalicylic acid"]
    assert (data.answers, len(data.passages)) == (3, 5)
    with pytest.raises(UserError, match=r"--distractors 5: .* is a benchmark, with a corpus"):
        load_held_out(f"{folder}@test", distractors=5)
    task = [f"{folder}@test"]
    results = evaluate(["bm25"], f"{folder}@test", tmp_path / "out", tasks=task, generate=0, progress=False)
    model = results["models"][0]
    assert model["retrieval"]["ndcg_at_10"] == model["tasks"]["nfcorpus@test"]["ndcg_at_10"]
    text = (tmp_path / "out" / "eval.md").read_text()
    assert text.startswith("nfcorpus@test: 2 held-out questions over 3 answers and 2 distractors.")
    before = data.fingerprint
    change("corpus.jsonl", "acid", "ACID")(folder)
    assert load_held_out(f"{folder}@test").fingerprint != before


def test_a_query_that_is_a_document_does_not_find_itself(folder: Path, tmp_path: Path) -> None:
    """As in ArguAna, where BEIR leaves it out; a document that is judged relevant counts, whatever its id."""
    fever = {"_id": "d3", "text": "Fever is a high temperature"}
    write(folder / "queries.jsonl", [*QUERIES, fever, {"_id": "d1", "text": "aspirin"}])
    judge(folder / "qrels" / "test.tsv", [("d3", "d2", 1), ("d1", "d1", 1)])
    write(folder / "corpus.jsonl", [*DOCUMENTS, {"_id": "high", "text": "high is a drug"}])
    data = load_held_out(f"{folder}@test")
    assert data.itself == {0: 2}
    results = evaluate(["bm25"], f"{folder}@test", tmp_path / "out", generate=0, progress=False)
    assert results["models"][0]["retrieval"]["mrr_at_10"] == pytest.approx((1 / 2 + 1) / 2)


def test_what_is_no_benchmark_is_no_task(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--task .*: neither a task of mteb nor a benchmark in the layout of BEIR"):
        named_task(str(tmp_path))
    judge(folder / "qrels" / "test.tsv", [("q1", "d1", 0)])
    with pytest.raises(UserError, match="no query has a relevant document"):
        check_data(named_task(f"{folder}@test"))


def test_its_scores_stand_in_the_table(folder: Path, tmp_path: Path) -> None:
    """Under the folder's name; under what was typed where two have one name."""
    own = write(tmp_path / "own.jsonl", domain())
    run([str(own)], tmp_path / "set")
    other = tmp_path / "other" / "nfcorpus"
    other.parent.mkdir()
    other.symlink_to(folder)
    settings: dict[str, Any] = {"generate": 0, "progress": False}
    results = evaluate(["bm25"], tmp_path / "set", tmp_path / "out", tasks=[f"{folder}@test"], **settings)
    assert results["models"][0]["tasks"]["nfcorpus@test"]["main_score"] > 0
    assert "| nfcorpus@test |" in (tmp_path / "out" / "eval.md").read_text()
    both = [f"{folder}@test", f"{other}@test"]
    results = evaluate(["bm25"], tmp_path / "set", tmp_path / "out", tasks=both, **settings)
    assert list(results["models"][0]["tasks"]) == both
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == results
