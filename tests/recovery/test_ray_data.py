"""The data commands on a Ray cluster of this machine give the bytes that they give without one."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.data.execute import executing
from lbr_dist.data.preparation import first_pass
from lbr_dist.data.preparation import prepare as prepare_module
from lbr_dist.data.preparation.prepare import prepare
from lbr_dist.errors import UserError
from lbr_dist.inference.encode import encode_file
from lbr_dist.launch import ray_cluster
from lbr_dist.mining.mine import mine

pytestmark = pytest.mark.timeout(600)

WORDS = [f"word{i}" for i in range(400)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One cluster for all tests, on loopback. Without a token: Ray reads the mode once in a process, when it is
    imported, and in this one other tests have imported it before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_cluster.cluster(dashboard=False):
            yield


@pytest.fixture
def executor(cluster: None) -> Any:
    from lbr_dist.launch.ray_data import RayData

    return RayData()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]) -> Path:
    """Sources, a model and a prepared set."""
    folder = tmp_path_factory.mktemp("ray-data")
    rng = random.Random(0)
    rows = []
    for i in range(240):
        answer = " ".join(rng.choices(WORDS, k=12))
        row = {"id": f"r{i}", "question": f"What is {answer[:20]} {i}?", "answer": answer}
        rows.append({**row, "negatives": [f"no {i}", rows[i - 1]["answer"]]} if i % 3 == 1 else row)
    rows[7] = {"id": "broken"}
    texts = [" ".join(rng.choices(WORDS, k=30)) for _ in range(150)] + [
        f"{row['answer']}, {' '.join(rng.choices(WORDS, k=20))}" for row in rows[8:90]
    ]
    for name, part in (("a", rows[:100]), ("b", rows[100:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "corpus.txt").write_text("\n".join(texts))
    (folder / "model").symlink_to(tiny_model_dir("llama"))
    make_set(folder, folder / "set", max_bad_share=0.1)
    return folder


def make_set(place: Path, out: Path, **settings: Any) -> dict[str, Any]:
    sources = [str(place / name) for name in ("a.jsonl", "b.jsonl", "corpus.txt")]
    options = {"sizes": {"gl": "0.4", "cl": "0.4", "eval": "0.2"}, "shard_records": 40, "name": "same"}
    return prepare(sources, out, tokenizer=str(place / "model"), **{**options, **settings}).data


def checksums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_encode(place: Path, tmp_path: Path, executor: Any) -> None:
    model = f"hf:{place}/model?pooling=mean"
    source = tmp_path / "texts.jsonl"
    source.write_text("".join((place / "a.jsonl").read_text().splitlines(keepends=True)[8:]))
    options: dict[str, Any] = {"block": 16, "device": "cpu"}
    here = encode_file(model, source, tmp_path / "here.parquet", **options)
    with executing(executor):
        there = encode_file(model, source, tmp_path / "there.parquet", **options)
    assert (here.texts, here.width) == (there.texts, there.width) == (92, 32)
    assert (tmp_path / "here.parquet").read_bytes() == (tmp_path / "there.parquet").read_bytes()
    with executing(executor), pytest.raises(UserError, match=r"a.jsonl: line 8: .*a field is missing"):
        encode_file(model, place / "a.jsonl", tmp_path / "bad.parquet", **options)


def test_mine(place: Path, tmp_path: Path, executor: Any) -> None:
    model = f"hf:{place}/model?pooling=mean"
    options: dict[str, Any] = {"count": 2, "share": 2.0, "block": 16, "device": "cpu"}
    mine(model, place / "set", tmp_path / "here/out", **options)
    with executing(executor):
        report = mine(model, place / "set", tmp_path / "there/out", **options)
    assert report.data["mined"]["counts"]["negatives"] > 100
    assert checksums(tmp_path / "there/out") == checksums(tmp_path / "here/out")


def test_prepare(place: Path, tmp_path: Path, executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards, manifest and report are those of the single-machine command; so are its errors."""
    make_set(place, tmp_path / "here", max_bad_share=0.1)
    with executing(executor):
        report = make_set(place, tmp_path / "there", max_bad_share=0.1)
    assert report["rows"]["bad"]["by_reason"]["missing_field"]["first"].startswith(f"{place}/a.jsonl line 8:")
    assert report["dropped"]["negative_that_is_evaluation"] > 0
    assert report["dropped"]["text_contains_evaluation"] > 0
    assert checksums(tmp_path / "there") == checksums(tmp_path / "here")
    with executing(executor), pytest.raises(UserError, match="1 of 472 rows are bad"):
        make_set(place, tmp_path / "bad", max_bad_share=0)


SLOW = """
import sys, time
sys.path[:0] = {folders!r}
from pathlib import Path
import test_ray_data
from lbr_dist.data.execute import executing
from lbr_dist.data.preparation import first_pass, second_pass
from lbr_dist.launch.ray_cluster import cluster
from lbr_dist.launch.ray_data import RayData

class Slowly:
    def __init__(self, work):
        self.work = work

    def __call__(self, block):
        time.sleep(0.5)
        return self.work(block)

class SlowRay(RayData):
    def stream(self, sources, read, work, *, model=False):
        yield from super().stream(sources, read, Slowly(work), model=model)

test_ray_data.small_blocks()
with cluster(), executing(SlowRay()):
    test_ray_data.make_set(Path(sys.argv[1]), Path(sys.argv[2]), max_bad_share=0.1)
"""


def small_blocks() -> None:
    """Many blocks of a small set."""
    first_pass.BLOCK_ROWS = 40


def test_a_killed_driver_goes_on(place: Path, tmp_path: Path, executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_pass, "BLOCK_ROWS", 40)
    make_set(place, tmp_path / "here/out", max_bad_share=0.1)
    out, work = tmp_path / "there/out", tmp_path / "there/.out.preparing/resume"
    program = tmp_path / "slow.py"
    here = Path(__file__).parent
    program.write_text(SLOW.format(folders=[str(folder) for folder in (here, here.parent, here.parents[1])]))
    process = subprocess.Popen([sys.executable, str(program), str(place), str(out)])
    try:
        deadline = time.monotonic() + 300
        while len(list(work.glob("blocks/*-????????.npz"))) < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    committed = {path.name: path.stat().st_mtime_ns for path in work.glob("blocks/*-????????.npz")}
    kept: dict[str, int] = {}
    real = prepare_module.publish

    def publish(folder: Path, target: Path) -> None:
        kept.update({path.name: path.stat().st_mtime_ns for path in work.glob("blocks/*.npz")})
        real(folder, target)

    monkeypatch.setattr(prepare_module, "publish", publish)
    with executing(executor):
        make_set(place, out, max_bad_share=0.1)
    assert len(committed) >= 3
    assert {name: kept[name] for name in committed} == committed  # not made again
    assert checksums(out) == checksums(tmp_path / "here/out")


def test_the_driver_takes_the_flags_of_the_command(place: Path, tmp_path: Path, cluster: None) -> None:
    """On the cluster of RAY_ADDRESS."""
    driver = Path(__file__).parents[2] / "ray_jobs/encode.py"
    command = [sys.executable, str(driver), f"hf:{place}/model?pooling=mean", str(place / "corpus.txt")]
    command += [str(tmp_path / "there.parquet"), "--device", "cpu", "--num-workers"]
    done = subprocess.run([*command, "1"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert f"written: {tmp_path}/there.parquet: 232 embeddings of 32 numbers" in done.stdout
    encode_file(command[2], place / "corpus.txt", tmp_path / "here.parquet", device="cpu")
    assert (tmp_path / "here.parquet").read_bytes() == (tmp_path / "there.parquet").read_bytes()
    done = subprocess.run([*command, "9"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "--num-workers 9 of 1 CPU each: the cluster has room for" in done.stderr
