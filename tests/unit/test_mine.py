from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from prepared import Bytes, contents

from lbr_dist.data.execute import Here, executing
from lbr_dist.data.record import Record, normalise
from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.data.shard_writer import write_set
from lbr_dist.data.shards import open_set, verify
from lbr_dist.errors import UserError
from lbr_dist.inference.encoder import unit
from lbr_dist.mining import mine as module
from lbr_dist.mining.mine import MineReport, mine

WORDS = [f"word{i}" for i in range(60)]


class Words:
    """A text is the sum of its words' random vectors."""

    name, cut = "words", 0

    def __init__(self, *_: Any) -> None:
        self.calls: list[int] = []

    def encode(self, texts: Sequence[str], side: str = "passage", progress: bool = False) -> np.ndarray:
        self.calls.append(len(texts))
        return unit(np.stack([sum(_vector(word) for word in text.lower().split()) for text in texts]))


@functools.cache
def _vector(word: str, width: int = 24) -> np.ndarray:
    seed = int.from_bytes(hashlib.md5(word.strip("?.").encode()).digest()[:4], "little")
    return np.random.default_rng(seed).normal(size=width).astype(np.float32)


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Words:
    """`--model words`, without a model."""
    encoder = Words()
    monkeypatch.setattr("lbr_dist.inference.loading.load_encoder", lambda *_: encoder)
    monkeypatch.setattr("lbr_dist.inference.loading.model_fingerprint", lambda spec: spec)
    return encoder


def domain(count: int = 120, seed: int = 0, words: int = 6) -> list[Record]:
    rng = random.Random(seed)
    records = []
    for i in range(count):
        answer = rng.choices(WORDS, k=words)
        question = f"What is {' '.join(answer[:3])} {i}?"
        more = {"negatives": (f"given {i}",)} if i % 10 == 0 else {}
        records.append(Record(f"r{i}", question, " ".join(answer), domain="d", source="s", **more))
    return records


@pytest.fixture
def data(tmp_path: Path) -> Path:
    everything = domain(160)
    sides = {
        "gl": [*everything[:20], Record("t", text="plain text")],
        "cl": everything[20:140],
        "eval": everything[140:],
    }
    write_set(tmp_path / "data", sides, Bytes(), name="d", shard_records=50)
    return tmp_path / "data"


def records(folder: Path, side: str = "cl") -> list[dict[str, Any]]:
    opened = open_set(folder)
    return ShardReader(opened, side).read(range(opened.splits[side].records))


def run(data: Path, out: Path, model: str = "words", **settings: Any) -> MineReport:
    return mine(model, data, out, **{"count": 3, "block": 32, **settings})


def test_a_mined_set_is_the_set_with_negatives(data: Path, tmp_path: Path, words: Words) -> None:
    report = run(data, tmp_path / "out")
    opened = open_set(tmp_path / "out")
    assert verify(opened) > 0
    for side in ("gl", "eval"):
        assert {n: b for n, b in contents(tmp_path / "out").items() if n.startswith(side)} == {
            n: b for n, b in contents(data).items() if n.startswith(side)
        }
    before, after = records(data), records(tmp_path / "out")
    answers = {normalise(row["answer"]) for row in before}
    negatives = 0
    for old, new in zip(before, after, strict=True):
        assert {k: v for k, v in new.items() if k != "negatives"} == {k: v for k, v in old.items() if k != "negatives"}
        given = old.get("negatives", [])
        mined = new.get("negatives", [])[len(given) :]
        assert new.get("negatives", [])[: len(given)] == given
        assert len(mined) <= 3
        assert len(set(mined)) == len(mined)
        assert {normalise(text) for text in mined} <= answers - {normalise(old["answer"])}
        negatives += len(mined)
    index = opened.index("cl")
    assert index.ids.tolist() == [row["id"] for row in before]
    assert [counts.tolist() for counts in map(index.negative_tokens.__getitem__, range(len(after)))] == [
        [len(text.encode()) for text in row.get("negatives", [])] for row in after
    ]
    counts = report.data["mined"]["counts"]
    assert counts["queries"] == 120
    assert counts["negatives"] == negatives > 200
    assert report.data["set"] == opened.fingerprint


def test_scores_follow_the_rule_and_are_reported(data: Path, tmp_path: Path, words: Words) -> None:
    report = run(data, tmp_path / "out", share=0.8, skip=1, depth=10)
    lines = [json.loads(line) for line in (tmp_path / "out/mined.jsonl").open()]
    rows = {row["id"]: row for row in records(tmp_path / "out")}
    for line in lines:
        question = words.encode([rows[line["id"]]["question"]])[0]
        scores = [float(question @ words.encode([rows[n["id"]]["answer"]])[0]) for n in line["negatives"]]
        positive = float(question @ words.encode([rows[line["id"]]["answer"]])[0])
        assert line["positive"] == pytest.approx(positive, abs=1e-5)
        assert [n["score"] for n in line["negatives"]] == pytest.approx(scores, abs=1e-5)
        assert scores == sorted(scores, reverse=True)
        assert all(score < positive - 0.2 * abs(positive) for score in scores)
    short = sum(len(line["negatives"]) < 3 for line in lines)
    counts = report.data["mined"]["counts"]
    assert counts["without_enough"] == short
    assert counts["without_any"] == sum(not line["negatives"] for line in lines)
    assert counts["too_near"] > 0
    text = (tmp_path / "out/report.md").read_text()
    example = report.data["mined"]["examples"][3]
    assert len(report.data["mined"]["examples"]) == 20
    assert f"### {example['question']}" in text
    assert f"| negative 1 | {example['negatives'][0]['score']:.3f} | {example['negatives'][0]['text']}" in text
    assert any(e["too_near"] for e in report.data["mined"]["examples"])


def test_a_window_that_holds_nothing_far_enough_is_told(data: Path, tmp_path: Path, words: Words) -> None:
    """As with a weak model: what it ranks first is above the answer, and no question gets a negative."""
    near = run(data, tmp_path / "near", depth=3, share=0.01)
    assert near.data["mined"]["counts"]["without_any"] > 60
    assert near.lines[-1] == "most have none: of 3 passages nearly all are too near; look further with --depth"
    assert not [line for line in run(data, tmp_path / "far").lines if "--depth" in line]


def test_more_depth_is_no_advice_where_it_cannot_help(data: Path, tmp_path: Path, words: Words) -> None:
    whole = run(data, tmp_path / "whole", depth=120, margin=3.0)
    assert whole.lines[-1].startswith(
        "most have none: of all 120 passages nearly all are too near, and no --depth helps"
    )
    asked = [Record(f"r{i}", f"term{i}", f"term{(i + 1) % 20} sense{i}") for i in range(20)]
    write_set(tmp_path / "apart", {"cl": asked}, Bytes(), name="d")
    apart = run(tmp_path / "apart", tmp_path / "out", model="bm25", depth=10)
    assert apart.data["mined"]["counts"]["zero_positives"] == 20
    assert apart.lines[-1].startswith("most have none: answers share no words with their questions")


def test_twice_the_same_and_a_second_run_does_nothing(data: Path, tmp_path: Path, words: Words) -> None:
    first = run(data, tmp_path / "a/out")
    calls = len(words.calls)
    again = run(data, tmp_path / "a/out")
    assert again.unchanged
    assert again.data == first.data
    assert len(words.calls) == calls
    run(data, tmp_path / "b/out")
    assert contents(tmp_path / "a/out") == contents(tmp_path / "b/out")
    with pytest.raises(UserError, match=r"made from other input \(another settings\).*--overwrite"):
        run(data, tmp_path / "a/out", depth=50)
    with pytest.raises(UserError, match=r"another model"):
        run(data, tmp_path / "a/out", model="other")
    assert not run(data, tmp_path / "a/out", depth=50, overwrite=True).unchanged


def test_overwrite_finds_a_changed_byte(data: Path, tmp_path: Path, words: Words) -> None:
    run(data, tmp_path / "out")
    before, shard = contents(tmp_path / "out"), tmp_path / "out/cl/000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    assert run(data, tmp_path / "out").unchanged  # by the sizes
    assert not run(data, tmp_path / "out", overwrite=True).unchanged
    assert contents(tmp_path / "out") == before
    (tmp_path / "out/runs").mkdir()
    assert run(data, tmp_path / "out", overwrite=True).unchanged
    with pytest.raises(UserError, match="no part of it: runs: --overwrite would remove that too"):
        run(data, tmp_path / "out", depth=50, overwrite=True)


def test_exact_ivf_and_words(data: Path, tmp_path: Path, words: Words) -> None:
    exact, ivf = run(data, tmp_path / "a/out"), run(data, tmp_path / "b/out", index="ivf")
    assert (exact.data["mined"]["search"], ivf.data["mined"]["search"]) == ("exact", "ivf")
    assert contents(tmp_path / "a/out/cl") == contents(tmp_path / "b/out/cl")  # so few lists that all are searched
    lexical = run(data, tmp_path / "c", model="bm25")
    assert lexical.data["mined"]["search"] == "bm25"
    for row in records(tmp_path / "c"):
        asked = set(row["question"].lower().split())
        for text in [t for t in row.get("negatives", []) if not t.startswith("given")]:
            assert asked & set(text.split())


def test_bm25_is_no_model_of_the_hub(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbr_dist.inference.identity._commit", lambda name: pytest.fail(f"asked for {name}"))
    assert run(data, tmp_path / "out", model="bm25").data["mined"]["model"] == "bm25"
    assert run(data, tmp_path / "out", model="bm25").unchanged


def test_a_mined_file_gives_the_same_set(data: Path, tmp_path: Path, words: Words) -> None:
    run(data, tmp_path / "a")
    run(data, tmp_path / "b", model=str(tmp_path / "a/mined.jsonl"))
    assert contents(tmp_path / "a/cl") == contents(tmp_path / "b/cl")


def test_negatives_that_were_there_are_no_known_answers(data: Path, tmp_path: Path, words: Words) -> None:
    first = run(data, tmp_path / "a").data["mined"]["counts"]
    again = run(tmp_path / "a", tmp_path / "b")
    counts = again.data["mined"]["counts"]
    assert (first["known_answers"], first["present_negatives"]) == (counts["known_answers"], 0)
    assert counts["present_negatives"] == first["negatives"]
    assert f"negatives that were there: {first['negatives']}" in again.lines[2]
    given = run(tmp_path / "a", tmp_path / "c", model=str(tmp_path / "a/mined.jsonl")).data["mined"]["counts"]
    assert (given["known_answers"], given["present_negatives"]) == (0, first["negatives"])


def test_a_given_file_is_not_searched(data: Path, tmp_path: Path, words: Words) -> None:
    """What has no effect is neither taken nor reported."""
    run(data, tmp_path / "a", depth=20)
    given = str(tmp_path / "a/mined.jsonl")
    for name, value in {"share": 0.1, "margin": 0.5, "skip": 50, "depth": 20, "index": "ivf"}.items():
        with pytest.raises(UserError, match=f"--{name} {value}: has no effect on negatives that a file gives"):
            run(data, tmp_path / "b", model=given, **{name: value})
    mined = run(data, tmp_path / "b", model=given).data["mined"]
    assert mined["count"] == 3
    assert not {"share", "margin", "skip", "depth"} & set(mined)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "--negatives 0"),
        ({"skip": 8, "depth": 10}, "--skip 8, --depth 10: the window must hold at least --negatives 3 ranks"),
        ({"share": 0.0}, "--share 0.0"),
        ({"margin": -0.1}, "--margin -0.1"),
        ({"index": "hnsw"}, "--index hnsw"),
    ],
)
def test_wrong_settings(data: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(data, tmp_path / "out", **settings)
    assert not list(tmp_path.glob("*out*"))


def test_what_cannot_be_mined(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is the set itself"):
        run(data, data, overwrite=True)
    write_set(tmp_path / "other", {"cl": domain(5)}, Bytes(), name="d")
    for inside in (data / "mined", data / "cl/mined", tmp_path / "other/mined"):  # lost when that is prepared anew
        with pytest.raises(UserError, match=r"mined: lies in the prepared set .*: name another folder"):
            run(data, inside)
    with pytest.raises(UserError, match="not a prepared set"):
        run(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match=r"model nowhere: not a run, an export .* model: there is no such folder"):
        run(data, tmp_path / "out", model="nowhere")
    write_set(tmp_path / "empty", {"gl": domain(5)}, Bytes(), name="d")
    with pytest.raises(UserError, match="its cl side is empty"):
        run(tmp_path / "empty", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_an_output_in_the_models_folder_is_refused(data: Path, tmp_path: Path, words: Words) -> None:
    """It would make the model another one: never up to date, never resumed."""
    (tmp_path / "model/deep").mkdir(parents=True)
    (tmp_path / "model/config.json").touch()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for out in ("model/out", "model/deep/out", "link/out"):
        with pytest.raises(UserError, match=r"out: lies in the folder of model hf:.*choose a place outside it"):
            run(data, tmp_path / out, model=f"hf:{tmp_path}/model?pooling=mean")
    assert sorted(path.name for path in (tmp_path / "model").rglob("*")) == ["config.json", "deep"]
    assert not run(data, tmp_path / "model-out", model=f"hf:{tmp_path}/model?pooling=mean").unchanged


def test_a_mistyped_model_or_device_costs_no_committed_block(data: Path, tmp_path: Path, words: Words) -> None:
    block = tmp_path / ".out.preparing" / "resume" / "query" / "00000001.parquet"
    block.parent.mkdir(parents=True)
    block.touch()
    with pytest.raises(UserError, match="--device gpu: cannot be used"):
        mine("words", data, tmp_path / "out", device="gpu")
    with pytest.raises(UserError, match="no such folder"):
        mine(str(tmp_path / "typo"), data, tmp_path / "out")
    assert block.exists()


@pytest.mark.parametrize("side", ["gl", "eval"])
def test_a_damaged_shard_of_another_side_is_not_copied(data: Path, tmp_path: Path, words: Words, side: str) -> None:
    shard = data / side / "000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    with pytest.raises(
        UserError, match=f"{side}/000000.tar: its checksum changed: copy the set again, or prepare it with --overwrite"
    ):
        run(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    words.calls.clear()
    shard.write_bytes(whole)
    run(data, tmp_path / "out")
    assert words.calls == []  # what was mined is kept


def test_a_model_of_damaged_vectors_is_named(data: Path, tmp_path: Path, words: Words) -> None:
    whole = Words.encode

    def encode(texts: Sequence[str], side: str = "passage", progress: bool = False) -> np.ndarray:
        vectors = whole(words, texts, side)
        vectors[1, 0] = np.nan
        return vectors

    words.encode = encode  # type: ignore[method-assign]
    with pytest.raises(UserError, match="model words: its embedding of r21 is not finite"):
        run(data, tmp_path / "out")


@pytest.mark.parametrize(("side", "kind"), [("query", "questions"), ("passage", "answers")])
def test_a_model_of_zeros_is_named(data: Path, tmp_path: Path, words: Words, side: str, kind: str) -> None:
    """Word vectors may give zeros for some texts, and are mined with."""
    whole, kept = Words.encode, 1

    def encode(texts: Sequence[str], which: str = "passage", progress: bool = False) -> np.ndarray:
        vectors = whole(words, texts, which)
        if which == side:
            vectors[kept:] = 0
        return vectors

    words.encode = encode  # type: ignore[method-assign]
    assert run(data, tmp_path / "some").data["mined"]["counts"]["zero_positives"] > 100
    kept = 0
    with pytest.raises(
        UserError, match=f"model words: its embeddings of all 120 {kind} are zero: the model is damaged"
    ):
        run(data, tmp_path / "out")


def test_memory_does_not_grow_with_the_texts(tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERIES", 16)
    peaks, sizes = [], []
    for length in (6, 6, 1500):  # the first run also imports
        folder = tmp_path / f"set-{length}-{len(peaks)}"
        write_set(folder, {"cl": domain(200, words=length)}, Bytes(), name="d")
        sizes.append(sum(path.stat().st_size for path in folder.rglob("*.tar")))
        tracemalloc.start()
        run(folder, tmp_path / f"out-{len(peaks)}", block=8, depth=20)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert sizes[2] > 2_000_000
    monkeypatch.undo()
    assert peaks[2] < peaks[1] + 1_500_000


def test_memory_does_not_grow_with_the_known_answers_of_a_question(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    asked = [Record(f"r{i}", f"What is {i % 2 * i}?", " ".join(rng.choices(WORDS, k=6))) for i in range(1600)]
    write_set(tmp_path / "set", {"cl": asked}, Bytes(), name="d")
    made, peaks = [], []
    for number, scores in enumerate((1 << 16, 1 << 16, 1 << 30)):  # the first run also imports
        monkeypatch.setattr(module, "SCORES", scores)
        tracemalloc.start()
        run(tmp_path / "set", tmp_path / f"out-{number}", depth=20)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        made.append(records(tmp_path / f"out-{number}"))
    assert made[1] == made[2]
    assert peaks[1] < peaks[2] / 3


SLOW = """
import sys, time
sys.path.insert(0, sys.argv[3])
from test_mine import Words, run
from pathlib import Path
from lbr_dist.inference import loading

class Slow(Words):
    def encode(self, *args, **kwargs):
        time.sleep(0.2)
        return super().encode(*args, **kwargs)

loading.load_encoder = Slow
loading.model_fingerprint = lambda spec: spec
run(Path(sys.argv[1]), Path(sys.argv[2]), block=8)
"""


def test_killed_and_resumed(data: Path, tmp_path: Path, words: Words) -> None:
    """SIGKILL in the middle of each phase of embedding, then the rest: the same bytes as without."""
    run(data, tmp_path / "whole/out", block=8)
    embedded = sum(words.calls)
    words.calls.clear()
    out, work = tmp_path / "killed/out", tmp_path / "killed/.out.preparing/resume"
    for side, wanted in (("query", 3), ("passage", 2)):
        command = [sys.executable, "-c", SLOW, str(data), str(out), str(Path(__file__).parent)]
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 120
        while len(list((work / side).glob("0*.parquet"))) < wanted:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
    run(data, out, block=8)
    assert 0 < sum(words.calls) <= embedded - 120 - 16  # all questions and two blocks of answers were there
    assert contents(out) == contents(tmp_path / "whole/out")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_failed_search_goes_on_where_it_stopped(
    data: Path, tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(data, tmp_path / "whole/out")
    monkeypatch.setattr(module, "QUERIES", 25)
    real, calls = module.choose, []

    def failing(*arguments: Any) -> Any:
        calls.append(len(arguments[0]))
        if len(calls) == 3:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(module, "choose", failing)
    with pytest.raises(MemoryError):
        run(data, tmp_path / "out")
    assert [path.name for path in (tmp_path / ".out.preparing").iterdir()] == ["resume"]
    words.calls.clear()
    run(data, tmp_path / "out")
    assert calls == [25, 25, 25, 25, 25, 20]
    assert words.calls == []
    assert contents(tmp_path / "out/cl") == contents(tmp_path / "whole/out/cl")


@pytest.mark.parametrize("damage", ["empty", "short", "zeros"])
@pytest.mark.parametrize("name", ["query.npy", "passage.npy", "chosen/0000000025.npz", "ivf/ivf.index", "ivf/lists"])
def test_what_was_committed_and_damaged_is_made_again(
    data: Path, tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    """As a loss of power leaves it, or a bad disk."""
    monkeypatch.setattr(module, "QUERIES", 25)
    run(data, tmp_path / "whole/out", index="ivf")

    def failing(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_mined", failing)
        with pytest.raises(MemoryError):
            run(data, tmp_path / "out", index="ivf")
    file = tmp_path / ".out.preparing/resume" / name
    whole = file.read_bytes()
    half = len(whole) // 2
    file.write_bytes({"empty": b"", "short": whole[:half], "zeros": whole[:half] + bytes(len(whole) - half)}[damage])
    if file.parent.name != "chosen":
        shutil.rmtree(tmp_path / ".out.preparing/resume/chosen")  # else nothing is searched
    run(data, tmp_path / "out", index="ivf")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole/out")


class Interrupted(Here):
    """Fails after two blocks."""

    def stream(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        for number, done in enumerate(super().stream(*arguments, **options)):
            yield done
            if number == 1:
                raise MemoryError


@pytest.mark.parametrize("damage", ["empty", "short", "zeros", "bit", "of another version"])
def test_a_damaged_block_of_vectors_is_made_again(data: Path, tmp_path: Path, words: Words, damage: str) -> None:
    run(data, tmp_path / "whole/out")
    with executing(Interrupted()), pytest.raises(MemoryError):
        run(data, tmp_path / "out")
    part = tmp_path / ".out.preparing/resume/query/00000001.parquet"
    whole = part.read_bytes()
    half = len(whole) // 2
    if damage == "of another version":
        pq.write_table(pq.read_table(part).replace_schema_metadata({"cut": "0"}), part)
    else:
        zeros, bit = bytes(len(whole) - half), bytes([whole[half] ^ 64]) + whole[half + 1 :]
        part.write_bytes(
            {"empty": b"", "short": whole[:half], "zeros": whole[:half] + zeros, "bit": whole[:half] + bit}[damage]
        )
    words.calls.clear()
    run(data, tmp_path / "out")
    assert words.calls[:3] == [32, 32, 24]  # all questions but those of the second block
    assert contents(tmp_path / "out") == contents(tmp_path / "whole/out")


def test_what_is_committed_is_on_disk_before_it_has_its_name(
    data: Path, tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And vectors before the parts that they were joined of are removed."""
    synced, renamed, real = set[int](), list[str](), Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self.name != "job.tmp":
            assert self.stat().st_ino in synced, self
            renamed.append(target.name)
        return real(self, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "replace", replace)
    run(data, tmp_path / "out", index="ivf")
    assert {"query.npy", "passage.npy", "checksums.json", "0000000000.npz"} < set(renamed)
