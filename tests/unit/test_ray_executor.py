"""What crosses between Ray's processes, without Ray: blocks and work are pickled, and results come in any order."""

from __future__ import annotations

import contextlib
import errno
import json
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prepared import Bytes, contents

from lbr_dist.cli import on_ray
from lbr_dist.cli.data import mine
from lbr_dist.data.execute import current, executing
from lbr_dist.data.preparation import first_pass
from lbr_dist.data.preparation.prepare import prepare
from lbr_dist.errors import UserError
from lbr_dist.launch import ray_data

WORDS = [f"word{i}" for i in range(400)]


class Elsewhere:
    """Does what `RayData` has done by its processes, in another order than that of the blocks."""

    def stream(
        self, sources: Iterable[Any], read: Callable[[Any], Iterable[Any]], work: Any, *, model: bool = False
    ) -> Iterator[Any]:
        tables = []
        for source in sources:
            reader = pickle.loads(pickle.dumps(ray_data._Reader(source, read, str(Path.cwd()))))
            tables += list(reader())
        random.Random(1).shuffle(tables)
        worker = ray_data._Worker(pickle.dumps(work), str(Path.cwd()))
        for table in tables:
            assert table.num_rows == 1
            result = pickle.loads(pickle.loads(pickle.dumps(worker))(table)[ray_data.COLUMN][0].as_py())
            if isinstance(result, UserError):
                raise result
            yield result


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    for i in range(150):
        answer = " ".join(rng.choices(WORDS, k=12))
        row = {"id": f"r{i}", "question": f"What is {answer[:20]} {i}?", "answer": answer}
        rows.append({**row, "negatives": [f"no {i}", rows[i - 1]["answer"]]} if i % 3 == 1 else row)
    rows[7] = {"id": "broken"}
    texts = [" ".join(rng.choices(WORDS, k=30)) for _ in range(60)]
    texts += [f"{row['answer']}, {' '.join(rng.choices(WORDS, k=20))}" for row in rows[8:90]]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus.txt").write_text("\n".join(texts))
    return [str(tmp_path / "qa.jsonl"), str(tmp_path / "corpus.txt")]


def run(sources: list[str], out: Path, **settings: Any) -> dict[str, Any]:
    options = {"sizes": {"gl": "0.4", "cl": "0.4", "eval": "0.2"}, "shard_records": 20, "name": "same"}
    return prepare(sources, out, tokenizer=Bytes(), **{**options, **settings}).data  # type: ignore[arg-type]


def test_prepare_gives_the_same_bytes(sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(sources, tmp_path / "here", max_bad_share=0.1)
    monkeypatch.setattr(first_pass, "BLOCK_ROWS", 13)
    with executing(Elsewhere()):
        report = run(sources, tmp_path / "there", max_bad_share=0.1)
    assert report["dropped"]["negative_that_is_evaluation"] > 0
    assert report["dropped"]["text_contains_evaluation"] > 0
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_errors_of_readers_and_workers_arrive_as_they_were(sources: list[str], tmp_path: Path) -> None:
    Path(sources[1]).rename(tmp_path / "corpus.txt.gz")
    with executing(Elsewhere()), pytest.raises(UserError, match=r"corpus.txt.gz: damaged or not a text file"):
        run([sources[0], str(tmp_path / "corpus.txt.gz")], tmp_path / "out")

    def fail(_: Any) -> None:
        raise UserError("no model")

    worker = ray_data._Worker(b"", str(Path.cwd()))
    ray_data._works[worker._key] = fail
    result = pickle.loads(worker(ray_data._table("block"))[ray_data.COLUMN][0].as_py())
    assert isinstance(result, UserError)
    assert str(result) == "no model"


def test_a_driver_may_be_in_a_folder_of_its_own_node(tmp_path: Path) -> None:
    """As in its home: absolute paths need no working directory."""
    here = str(tmp_path / "only-on-the-head")
    (block,) = ray_data._Reader("source", lambda source: [source], here)()
    assert pickle.loads(block[ray_data.COLUMN][0].as_py()) == "source"
    result = ray_data._Worker(pickle.dumps(len), here)(ray_data._table("block"))
    assert pickle.loads(result[ray_data.COLUMN][0].as_py()) == 5


def test_commands_use_the_current_executor(sources: list[str], tmp_path: Path) -> None:
    elsewhere = Elsewhere()
    with executing(elsewhere):
        assert current() is elsewhere
        run(sources, tmp_path / "there", max_bad_share=0.1)
    assert current() is not elsewhere
    run(sources, tmp_path / "here", max_bad_share=0.1)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


class Writes:
    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, block: str) -> str:
        raise OSError(self.number, "Error writing bytes to file")


def test_a_full_disk_comes_back_as_it_is_and_is_not_tried_again() -> None:
    block = ray_data._table("block")

    def work(number: int) -> Any:
        return ray_data._Worker(pickle.dumps(Writes(number)), str(Path.cwd()))(block)

    error = pickle.loads(work(errno.ENOSPC)[ray_data.COLUMN][0].as_py())
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC
    with pytest.raises(OSError, match="Error writing"):
        work(errno.EIO)


@pytest.mark.parametrize("arguments", [[], ["run", "--no-such-option", "1"], ["run", "set", "--negatives", "many"]])
def test_wrong_arguments_are_a_mistake_and_no_traceback(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """typer's errors are its own since it has a copy of click. They come before a cluster is started."""
    monkeypatch.setattr("lbr_dist.launch.ray_cluster.cluster", lambda **_: pytest.fail("a cluster is started"))
    assert on_ray.main(mine, arguments) == 2
    assert "Error" in capsys.readouterr().err


def test_what_was_stopped_is_not_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """typer makes an exit code of Ctrl-C, which ended with 0."""
    without_ray(monkeypatch)

    def stopped(out: str = "") -> None:
        raise KeyboardInterrupt

    assert on_ray.main(stopped, []) == 130


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbr_dist.launch.ray_cluster.cluster", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr("lbr_dist.launch.ray_data.RayData", lambda **_: Elsewhere())
