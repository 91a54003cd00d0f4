from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from prepared import Bytes

from lbr_dist.data.record import Record
from lbr_dist.data.shard_writer import write_set
from lbr_dist.data.shards import open_set
from lbr_dist.errors import UserError
from lbr_dist.inference import search
from lbr_dist.inference.bm25 import BM25
from lbr_dist.inference.encoder import unit
from lbr_dist.mining.candidates import passages_of, survey
from lbr_dist.mining.choose import Chosen, Rule, choose
from lbr_dist.mining.given import GivenNegatives
from lbr_dist.mining.nearest import Exact, Inverted, Lexical, kind_for

NONE = (np.zeros(0, np.int64), np.zeros(0, np.int64))


def prepared(folder: Path, cl: list[Record]) -> Path:
    write_set(folder, {"cl": cl}, Bytes(), name="n")
    return folder


def rule(
    count: int = 2, skip: int = 0, depth: int = 100, share: float | None = 0.95, margin: float | None = None
) -> Rule:
    return Rule(count, skip, depth, share, margin)


def one(scores: list[float], positive: float, used: Rule, excluded: tuple = NONE) -> Chosen:
    """Choose for one query among passages 0, 1, ... in this order."""
    rows = np.arange(len(scores))[None]
    return choose(rows, np.array([scores], np.float32), np.array([positive], np.float32), excluded, len(scores), used)


SCORES = [0.9, 0.79, 0.75, 0.7, 0.5, 0.2]


@pytest.mark.parametrize(
    ("used", "expected", "too_near"),
    [
        (rule(count=3, share=0.95), [2, 3, 4], 2),  # limit 0.76
        (rule(count=3, share=0.9), [3, 4, 5], 3),  # 0.72
        (rule(count=3, share=None, margin=0.02), [2, 3, 4], 2),  # 0.78
        (rule(count=3, share=0.95, margin=0.1), [4, 5], 4),  # both: 0.7 is not below 0.7
        (rule(count=2, skip=3), [3, 4], 0),
        (rule(count=5, depth=4), [2, 3], 2),
        (rule(count=3, share=2.0), [0, 1, 2], 0),
    ],
)
def test_window_and_thresholds(used: Rule, expected: list[int], too_near: int) -> None:
    chosen = one(SCORES, 0.8, used)
    assert chosen.passage_QN[0].tolist() == expected + [-1] * (used.count - len(expected))
    assert chosen.score_QN[0, : len(expected)].tolist() == [np.float32(SCORES[row]) for row in expected]
    assert chosen.near_Q.tolist() == [too_near]
    assert chosen.rejected_QR[0, : min(3, too_near)].tolist() == list(range(min(3, too_near)))


def test_known_answers_take_no_rank() -> None:
    excluded = (np.array([2]), np.array([5]))
    chosen = one([0.7, 0.6, 0.5, 0.4, 0.3, 0.2], 0.8, rule(count=3, skip=1, depth=3), excluded)
    assert chosen.passage_QN[0].tolist() == [1, 3, -1]
    assert (chosen.known_Q.tolist(), chosen.present_Q.tolist()) == ([1], [1])


def test_share_of_a_negative_score_lies_below_it() -> None:
    """0.95 x -0.4 = -0.38 would let passages above the positive through."""
    chosen = one([-0.39, -0.41, -0.43], -0.4, rule(share=0.95))
    assert chosen.passage_QN[0].tolist() == [2, -1]


def test_places_that_a_search_left_empty_are_never_chosen() -> None:
    rows, scores = np.array([[1, -1], [-1, -1]]), np.array([[0.5, -np.inf], [-np.inf, -np.inf]], np.float32)
    chosen = choose(rows, scores, np.array([1.0, 1.0]), (np.array([1]), NONE[1]), 2, rule())
    assert (chosen.passage_QN == -1).all()
    assert chosen.known_Q.tolist() == [1, 0]


def test_pairs_of_several_owners() -> None:
    pairs = passages_of(np.array([2, 0, 2, 2]), np.array([7, 5, 6, 7]), 4)
    positions, passages = pairs.take(np.array([2, 1, 0, 2]))
    assert positions.tolist() == [0, 0, 2, 3, 3]
    assert passages.tolist() == [6, 7, 5, 6, 7]


def test_everything_known_to_answer_a_question_is_excluded(tmp_path: Path) -> None:
    records = [
        Record("a", "What?", "one", positives=("Two.", "unheard of")),
        Record("b", "other", "two"),
        Record("c", " WHAT ", "three", negatives=("FOUR", "absent", "two")),
        Record("d", "last", "Four."),
        Record("e", "again", "ONE"),
    ]
    found = survey(open_set(prepared(tmp_path / "set", records)), lambda _: None)
    assert found.passage_rows_P.tolist() == [0, 1, 2, 3]  # one, two, three, four: the first record with each
    assert found.own_Q.tolist() == [0, 1, 2, 3, 0]
    known, present = ({divmod(key, 4) for key in keys.tolist()} for keys in found.excluded(np.arange(5)))
    assert known == {(0, 0), (0, 1), (0, 2), (1, 1), (2, 0), (2, 1), (2, 2), (3, 3), (4, 0)}
    assert present == {(2, 3)}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "its cl side is empty"),
        ([Record("a", text="plain")], "has plain texts"),
        ([Record("a", "q", "same"), Record("b", "r", "SAME.")], "all records of its cl side have one answer"),
    ],
)
def test_sets_without_anything_to_mine(tmp_path: Path, records: list[Record], message: str) -> None:
    with pytest.raises(UserError, match=message):
        survey(open_set(prepared(tmp_path / "set", records)), lambda _: None)


def clustered(count: int, width: int = 16, centres: int = 40, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    middle = np.random.default_rng(99).normal(size=(centres, width))
    return unit((middle[rng.integers(0, centres, count)] + 0.4 * rng.normal(size=(count, width))).astype(np.float32))


def test_exact_search_in_tiles_equals_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "TILE_BYTES", 4 * 16 * 37)
    queries, passages = clustered(25, seed=1), clustered(300)
    passages[200] = passages[3]  # equal scores: the first passage first
    rows, scores, own = Exact(queries, passages).search(np.arange(5, 25), np.arange(20), 50)
    whole = queries[5:] @ passages.T
    assert rows.tolist() == np.argsort(-whole, axis=1, kind="stable")[:, :50].tolist()
    assert scores == pytest.approx(np.take_along_axis(whole, rows, 1), abs=1e-6)
    assert own == pytest.approx(whole[np.arange(20), np.arange(20)], abs=1e-6)


def test_inverted_lists_find_what_exact_search_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "TILE_BYTES", 4 * 16 * 999)  # several blocks on disk
    queries, passages = clustered(200, seed=1), clustered(8000)
    exact = Exact(queries, passages).search(np.arange(200), np.arange(200), 20)
    inverted = Inverted(queries, passages, tmp_path / "ivf")
    found = inverted.search(np.arange(200), np.arange(200), 20)
    recall = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(exact[0].tolist(), found[0].tolist(), strict=True)])
    assert inverted._index.nprobe < inverted._index.nlist / 4
    assert recall > 0.95
    assert found[2].tolist() == exact[2].tolist()
    again = Inverted(queries, passages, tmp_path / "ivf").search(np.arange(200), np.arange(200), 20)
    other = Inverted(queries, passages, tmp_path / "anew").search(np.arange(200), np.arange(200), 20)
    assert found[0].tolist() == again[0].tolist() == other[0].tolist()
    few = Inverted(queries, passages[:30], tmp_path / "few").search(np.arange(2), np.arange(2), 20)
    assert few[0].tolist() == Exact(queries, passages[:30]).search(np.arange(2), np.arange(2), 20)[0].tolist()


def test_the_search_is_chosen_by_size() -> None:
    assert [kind_for("auto", 200_000, size) for size in (200_000, 200_001)] == ["exact", "ivf"]
    assert [kind_for(choice, 10, 10) for choice in ("exact", "ivf")] == ["exact", "ivf"]


def test_lexical_search_finds_only_what_shares_a_word() -> None:
    search = Lexical(BM25(["red house", "blue house", "green car"]), ["red house", "car boat"].__getitem__)
    rows, scores, positive = search.search(np.array([0, 1]), np.array([0, 0]), 3)
    assert rows.tolist() == [[0, 1, -1], [2, -1, -1]]
    assert positive.tolist() == [scores[0, 0], 0]


@pytest.fixture
def five(tmp_path: Path) -> Path:
    return prepared(tmp_path / "five", [Record(f"r{i}", f"q {i}", f"a {i}") for i in range(5)])


def given(five: Path, file: Path) -> GivenNegatives:
    opened = open_set(five)
    return GivenNegatives(file, opened.index("cl").ids, survey(opened, lambda _: None))


def test_negatives_given_by_id(tmp_path: Path, five: Path) -> None:
    lines = [
        {"id": "r3", "negatives": [{"id": "r1", "score": 0.5}, "r3", "r1", "r0", "r4"]},  # itself, and one twice
        {"id": "r0", "negatives": ["r2"]},
    ]
    file = tmp_path / "mined.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    chosen = given(five, file).chosen(np.arange(5), 2)
    assert chosen.passage_QN.tolist() == [[2, -1], [-1, -1], [-1, -1], [1, 0], [-1, -1]]
    assert chosen.score_QN[3].tolist() == [0.5, pytest.approx(np.nan, nan_ok=True)]
    assert chosen.known_Q.tolist() == [0, 0, 0, 1, 0]
    assert given(five, file).chosen(np.arange(3, 5), 3).passage_QN.tolist() == [[1, 0, 4], [-1, -1, -1]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "r9", "negatives": []}', "line 2: the set has no cl record with id 'r9'"),
        ('{"id": "r1", "negatives": ["r2", "x"]}', "line 2: the set has no cl record with id 'x'"),
        ('{"id": "r1"}', "line 2: expected"),
        ('{"id": "r1", "negatives": "r2"}', "line 2: expected"),
        ('{"id": "r1", "negatives": [{"id": "r2", "score": "high"}]}', "mined.jsonl: line 2: expected .*number"),
        ('{"id": "r1", "negatives": [{"id": "r2", "score": Infinity}]}', "line 2: expected"),
        ('{"id": "\\ud83d", "negatives": []}', "line 2: the set has no cl record with id"),
        ("[1]", "line 2: the line is not a JSON object"),
        ("{", "line 2: the line is not valid JSON"),
    ],
)
def test_a_given_file_that_does_not_fit(tmp_path: Path, five: Path, line: str, message: str) -> None:
    file = tmp_path / "mined.jsonl"
    file.write_text('{"id": "r0", "negatives": ["r1"]}\n' + line)
    with pytest.raises(UserError, match=message):
        given(five, file)


def test_a_given_file_is_read_as_sources_are(tmp_path: Path, five: Path) -> None:
    file = tmp_path / "MINED.JSONL.GZ"
    file.write_bytes(gzip.compress(b'\xef\xbb\xbf{"id": "r0", "negatives": ["r1"]}\n'))
    assert given(five, file).chosen(np.arange(5), 1).passage_QN[:, 0].tolist() == [1, -1, -1, -1, -1]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"MINED.JSONL.GZ: damaged"):
        given(five, file)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UserError, match=r"empty.jsonl: holds no line"):
        given(five, empty)
    wrong = tmp_path / "model.bin"
    wrong.touch()
    with pytest.raises(UserError, match=r"model.bin: unknown format"):
        given(five, wrong)


def test_given_negatives_take_few_bytes(tmp_path: Path) -> None:
    opened = open_set(prepared(tmp_path / "set", [Record(f"r{i}", f"q {i}", f"a {i}") for i in range(1000)]))
    lines = [
        {"id": f"r{i}", "negatives": [{"id": f"r{i ^ j}", "score": j / 7} for j in range(1, 50)]} for i in range(900)
    ]
    file, candidates = tmp_path / "mined.jsonl", survey(opened, lambda _: None)
    file.write_text("\n".join(map(json.dumps, lines)).replace("r1023", "r0"))
    ids = opened.index("cl").ids
    GivenNegatives(file, ids, candidates)  # the first time also imports
    tracemalloc.start()
    GivenNegatives(file, ids, candidates)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 65 * 900 * 49


def test_bm25_keeps_no_word_twice() -> None:
    """Passages are read once, and memory holds a number for each of their words."""
    BM25(["a"])  # the first one also imports
    tracemalloc.start()
    index = BM25(" ".join(f"word{i % 13}" for i in range(1000 + number)) for number in range(300))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert index.search(["word3"], 2)[0].shape == (1, 2)
    assert peak < 8 * 300 * 1150
