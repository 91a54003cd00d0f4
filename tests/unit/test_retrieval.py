import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lbr_dist.errors import UserError
from lbr_dist.evaluation import retrieval
from lbr_dist.evaluation.held_out import HeldOut, load_held_out
from lbr_dist.evaluation.retrieval import (
    BM25Search,
    MtebEncoder,
    check_data,
    held_out_task,
    is_retrieval,
    named_task,
    retrieval_scores,
)
from lbr_dist.inference.bm25 import BM25, best, words


class Vectors:
    """An encoder that looks its vectors up."""

    name = "vectors"
    cut = 0

    def __init__(self, table):
        self.table, self.sides = table, set()

    def encode(self, texts, side="passage", progress=False):
        self.sides.add(side)
        rows = np.stack([self.table[text] for text in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def problem(queries=50, passages=300, seed=0):
    rng = np.random.default_rng(seed)
    p = rng.normal(size=(passages, 12))
    positives = [sorted({i, *rng.integers(0, passages, rng.integers(0, 3)).tolist()}) for i in range(queries)]
    q = np.stack([p[rows].mean(0) for rows in positives]) + 0.8 * rng.normal(size=(queries, 12))
    data = HeldOut("toy", "f", [f"q {i}" for i in range(queries)], [f"p {i}" for i in range(passages)], positives)
    return data, Vectors({**dict(zip(data.queries, q, strict=True)), **dict(zip(data.passages, p, strict=True))})


def by_hand(rows_QK, positives):
    """nDCG@10, Recall@10, MRR@10 and MAP@10 from ranked rows, from their definitions."""
    ndcg, recall, mrr, mean_ap = [], [], [], []
    for ranked, right in zip(rows_QK, positives, strict=True):
        hits = np.isin(ranked[:10], right)
        ideal = (1 / np.log2(np.arange(2, 2 + min(10, len(right))))).sum()
        ndcg.append((hits / np.log2(np.arange(2, 12))).sum() / ideal)
        recall.append(hits.sum() / len(right))
        mrr.append(1 / (1 + hits.argmax()) if hits.any() else 0.0)
        mean_ap.append((hits * np.cumsum(hits) / np.arange(1, 11)).sum() / len(right))
    return {
        "ndcg_at_10": np.mean(ndcg),
        "recall_at_10": np.mean(recall),
        "mrr_at_10": np.mean(mrr),
        "map_at_10": np.mean(mean_ap),
    }


def test_mteb_agrees_with_a_numpy_computation():
    data, encoder = problem()
    wrapped = MtebEncoder(encoder, keep=True)
    scores = retrieval_scores(wrapped, held_out_task(data))
    assert np.array_equal(np.concatenate(wrapped.vectors["query"]), encoder.encode(data.queries))
    assert np.array_equal(np.concatenate(wrapped.vectors["passage"]), encoder.encode(data.passages))
    similarity = encoder.encode(data.queries) @ encoder.encode(data.passages).T
    expected = by_hand(np.argsort(-similarity, axis=1), data.positives)
    assert encoder.sides == {"query", "passage"}
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert 0.1 < scores["ndcg_at_10"] < 0.99
    assert scores["main_score"] == scores["ndcg_at_10"]


def test_a_query_that_is_a_document_takes_no_place_of_the_hundred():
    """mteb ranks it with the others, and takes it out of what was ranked."""
    data, encoder = problem(passages=101)
    itself = {row: row for row in range(50)}
    encoder.table |= {query: encoder.table[f"p {row}"] for row, query in enumerate(data.queries)}
    last = np.argsort(-(encoder.encode(data.queries) @ encoder.encode(data.passages).T), axis=1)[:, -1].tolist()
    data = HeldOut("toy", "f", data.queries, data.passages, [[row] for row in last], itself=itself)
    scores = retrieval_scores(MtebEncoder(encoder), held_out_task(data))
    assert scores["recall_at_100"] == 1
    assert scores["ndcg_at_100"] == pytest.approx(1 / np.log2(101), abs=1e-5)


def test_a_large_corpus_is_embedded_in_blocks(monkeypatch):
    data, encoder = problem()
    whole, sizes, encode = MtebEncoder(encoder, keep=True), [], encoder.encode
    expected = retrieval_scores(whole, held_out_task(data))
    monkeypatch.setattr(retrieval, "BLOCK_TEXTS", 7)
    monkeypatch.setattr(encoder, "encode", lambda texts, *rest: sizes.append(len(texts)) or encode(texts, *rest))
    wrapped = MtebEncoder(encoder, keep=True)
    assert retrieval_scores(wrapped, held_out_task(data)) == expected
    assert set(sizes) == {7, 50 % 7, 300 % 7}
    for side in ("query", "passage"):
        assert np.array_equal(np.concatenate(wrapped.vectors[side]), np.concatenate(whole.vectors[side]))


def test_bm25_through_mteb_agrees_with_the_formula():
    rng = np.random.default_rng(3)
    vocabulary = [f"w{i}" for i in range(80)]
    passages = [" ".join(rng.choice(vocabulary, rng.integers(5, 20))) for _ in range(60)]
    queries = [" ".join(rng.choice(passage.split(), 4)) for passage in passages[:30]]
    data = HeldOut("lexical", "f", queries, passages, [[i] for i in range(30)])

    tokens = [passage.split() for passage in passages]
    mean_length = np.mean([len(t) for t in tokens])
    frequency = {w: sum(w in t for t in tokens) for w in vocabulary}
    scores = np.zeros((30, 60))
    for i, query in enumerate(queries):
        for j, passage in enumerate(tokens):
            for word in query.split():
                count = passage.count(word)
                idf = np.log(1 + (60 - frequency[word] + 0.5) / (frequency[word] + 0.5))
                scores[i, j] += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(passage) / mean_length))
    rows, found = BM25(passages).search(queries, 60)
    assert np.take_along_axis(scores, rows, 1) == pytest.approx(found, abs=1e-4)
    assert found == pytest.approx(-np.sort(-scores, axis=1), abs=1e-4)

    got = retrieval_scores(BM25Search(), held_out_task(data))
    expected = by_hand(np.argsort(-scores, axis=1, kind="stable"), data.positives)
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=0.02)  # equal scores rank differently


def test_bm25_words():
    assert words("Alpha-Beta 2b, ÉCOLE") == ["alpha", "beta", "2b", "école"]
    assert words("糖尿病 type 2") == ["糖", "尿", "病", "type", "2"]
    assert words("हिन्दी में दवा") == ["हिन्दी", "में", "दवा"]
    assert words("cafe\u0301") == words("café")
    assert words("acetyl\u00adsalicylic Ｆｕｌｌ") == ["acetylsalicylic", "full"]
    assert words("get_user_name(__init__, x\uff3fy)") == ["get", "user", "name", "init", "x", "y"]


def test_the_best_are_those_of_a_stable_sort():
    rng = np.random.default_rng(0)
    for _ in range(300):
        scores = rng.integers(0, rng.integers(1, 50), rng.integers(1, 60)).astype(np.float32) / 3
        k = int(rng.integers(0, len(scores) + 1))
        assert best(scores, k).tolist() == np.argsort(-scores, kind="stable")[:k].tolist()
    passages = [" ".join(rng.choice(["a", "b", "c", "d"], rng.integers(0, 5))) for _ in range(200)]
    index = BM25(passages)
    for k in (1, 7, 150, 300):
        rows, scores = index.search(["a", "b c", "d d a", "e"], k)
        for query, ranked, found in zip(["a", "b c", "d d a", "e"], rows, scores, strict=True):
            expected = np.argsort(-index.scores(query), kind="stable")[:k]
            assert ranked.tolist() == expected.tolist()
            assert found.tolist() == index.scores(query)[expected].tolist()


def test_bm25_without_a_known_word():
    rows, scores = BM25(["", "one two"]).search(["three", "", "two"], 2)
    assert scores[:2].tolist() == [[0, 0], [0, 0]]
    assert rows[2].tolist() == [1, 0]
    assert BM25(["", "!"]).search(["a"], 5)[1].tolist() == [[0, 0]]


def test_bm25_is_not_credited_for_what_it_did_not_find():
    """Answers come first in the corpus: filled up with passages of score 0, every query would find its own."""
    passages = ["alpha one", "beta two", "gamma three", *(f"other {i}" for i in range(200))]
    data = HeldOut("lexical", "f", ["alpha", "zeta", "eta"], passages, [[0], [1], [2]])
    got = retrieval_scores(BM25Search(), held_out_task(data))
    assert {got[name] for name in ("recall_at_10", "recall_at_100", "ndcg_at_100")} == {0.33333}
    data = HeldOut("lexical", "f", ["zeta"], passages, [[1]])
    assert retrieval_scores(BM25Search(), held_out_task(data))["recall_at_100"] == 0


def test_bm25_ranks_every_candidate_that_a_task_names_and_no_other(monkeypatch):
    from datasets import Dataset

    monkeypatch.delattr(BM25, "search")  # which would sort the corpus for each query

    search = BM25Search()
    search.index(Dataset.from_dict({"id": ["a", "b", "c"], "text": ["one two", "two", "three"]}))
    queries = Dataset.from_dict({"id": ["q"], "text": ["one two"]})
    found = search.search(queries, top_k=1, top_ranked={"q": ["c", "a"]})
    assert set(found["q"]) == {"a", "c"}
    assert found["q"]["a"] > found["q"]["c"] == 0
    assert list(found["q"]) == ["c", "a"]


def test_an_unknown_task_names_itself():
    with pytest.raises(UserError, match="--task NoSuchTask: mteb has no such task"):
        named_task("NoSuchTask")


def test_a_task_whose_data_is_not_here_is_the_users_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, encoder = problem()
    with pytest.raises(UserError, match="mteb task NFCorpus: cannot be run"):
        retrieval_scores(MtebEncoder(encoder), named_task("NFCorpus"))
    with pytest.raises(UserError, match="mteb task NFCorpus: cannot be run"):
        check_data(named_task("NFCorpus"))


def test_an_aggregate_is_its_parts():
    """CQADupstackRetrieval, of BEIR, has no data of its own: that of its twelve parts is looked for."""
    task = named_task("CQADupstackRetrieval")
    loaded = []
    for part in task.tasks:
        part.load_data = lambda name=part.metadata.name: loaded.append(name)
    check_data(task)
    assert len(loaded) == 12
    assert is_retrieval(task)
    assert not is_retrieval(named_task("STSBenchmark"))


@pytest.mark.parametrize("error", [ValueError("Couldn't find cache"), KeyError("corpus"), RuntimeError("script")])
def test_a_task_whose_data_is_here_in_part_is_named(error):
    task = named_task("NFCorpus")

    def load():
        raise error

    task.load_data = load
    with pytest.raises(UserError, match="mteb task NFCorpus: cannot be run"):
        check_data(task)


def qa(number, question, answer, **more):
    return {"id": f"r{number}", "question": question, "answer": answer, "domain": "d", "source": "s", **more}


@pytest.fixture
def prepared(monkeypatch):
    """A prepared set in memory: shards are the data engineer's, this is what they give."""
    splits = {
        "eval": [
            qa(0, "What is ADA?", "a disease"),
            qa(1, " What is ADA? ", "A deaminase."),
            qa(2, "Sole?", "a disease", positives=["an illness"]),
            {"id": "t", "text": "a plain text"},
        ],
        "gl": [
            qa(3, "g", "A deaminase"),
            qa(4, "g2", "gl answer"),
            qa(5, "g3", "GL answer!"),
            {"id": "x", "text": "gl text"},
        ],
        "cl": [qa(6, "c", "cl answer"), qa(7, "c2", "cl answer 2")],
    }
    from types import SimpleNamespace

    from lbr_dist.data.record import normalised_hash
    from lbr_dist.evaluation import held_out

    class Reader:
        def __init__(self, opened, split):
            self.rows = splits[split]
            hashes = np.array([normalised_hash(r.get("text", r.get("answer"))) for r in self.rows], dtype=np.int64)

            class Index(list):
                answer_hash = hashes

            self.index = Index(self.rows)

        def read(self, rows):
            return [json.loads(json.dumps(self.rows[row])) for row in rows]

        def close(self):
            pass

    opened = SimpleNamespace(
        name="toy", fingerprint="f", splits={k: SimpleNamespace(records=len(v)) for k, v in splits.items()}
    )
    monkeypatch.setattr(held_out, "open_set", lambda path: opened)
    monkeypatch.setattr(held_out, "ShardReader", Reader)
    return splits


def test_same_questions_are_one_query_with_all_their_answers(prepared):
    data = load_held_out("anywhere")
    assert data.queries == ["What is ADA?", "Sole?"]
    assert data.passages == ["a disease", "A deaminase.", "an illness"]
    assert data.positives == [[0, 1], [0, 2]]
    assert data.references == ["a disease", "a disease"]


def test_what_differs_by_case_or_punctuation_alone_is_another_answer(prepared):
    prepared["eval"][:] = [qa(0, "benzene", "c1ccccc1"), qa(1, "cyclohexane", "C1CCCCC1"), qa(2, "10^2", "10²")]
    prepared["eval"] += [qa(3, "102", "102"), qa(4, "Benzene", "it smells"), qa(5, "coffee", "cafe\u0301")]
    prepared["eval"].append(qa(6, "bar", "caf\u00e9 "))
    data = load_held_out("anywhere")
    assert data.passages == ["c1ccccc1", "C1CCCCC1", "10²", "102", "it smells", "cafe\u0301"]
    assert data.positives == [[0], [1], [2], [3], [4], [5], [5]]


def test_distractors_are_unlike_any_answer_and_each_other(prepared):
    everything = load_held_out("anywhere", distractors=100)
    assert everything.answers == 3
    extra = everything.passages[3:]
    assert sorted(e.strip("!").lower() for e in extra) == ["cl answer", "cl answer 2", "gl answer", "gl text"]
    some = load_held_out("anywhere", distractors=2)
    assert len(some.passages) == 5
    assert some.passages == load_held_out("anywhere", distractors=2).passages


def test_distractors_come_from_both_training_sides(prepared):
    for number in range(300):
        prepared["gl" if number % 3 else "cl"].append(qa(number + 10, f"q{number}", f"answer {number}"))
    drawn = load_held_out("anywhere", distractors=60).passages[3:]
    of_cl = sum(record["answer"] in drawn for record in prepared["cl"])
    assert 10 <= of_cl <= 30


def test_a_set_without_questions_is_refused(prepared):
    prepared["eval"][:] = prepared["eval"][-1:]
    with pytest.raises(UserError, match="no questions"):
        load_held_out("anywhere")


@pytest.mark.parametrize("named", [True, False])
def test_mteb_needs_no_home_folder(tmp_path: Path, named: bool) -> None:
    code = "from lbr_dist.evaluation.retrieval import import_mteb; print(import_mteb().__name__)"
    environ = {name: value for name, value in os.environ.items() if name not in ("HOME", "MTEB_CACHE")}
    environ |= {"TMPDIR": str(tmp_path)} | ({"HOME": "/proc/none"} if named else {})
    nobody = "import pwd; pwd.getpwuid = {}.__getitem__; "
    done = subprocess.run(
        [sys.executable, "-c", nobody + code], env=environ, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["mteb"], done.stderr
