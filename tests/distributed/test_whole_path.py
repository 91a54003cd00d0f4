"""The whole path as its user types it: raw files to an evaluated, exported model, by the `lbr` command alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.timeout(900)

ORGANS = ("heart", "lung", "liver", "kidney", "brain", "skin", "bone", "eye", "ear", "hand", "foot", "knee")
SIGNS = ("pain", "fever", "rash", "swelling", "bleeding", "weakness", "itch", "numbness", "spasm", "failure")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]) -> Path:
    """A folder with a base model, raw question-answer rows and the recipes of both stages."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(tiny_model_dir("llama"), folder / "base")
    rows = [
        {"id": f"{n}", "question": f"what is {o} {s}", "answer": f"{s} of the {o}: sign number {n} of the {o}"}
        for n, (o, s) in enumerate((o, s) for o in ORGANS for s in SIGNS)
    ]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "model": {"path": "base"},
        "bottleneck": {"tokens": 1},
        "data": {"sets": [{"path": "data"}], "bin_tokens": 256, "max_x_tokens": 100, "max_y_tokens": 100},
        "optim": {"lr": 3e-3},
        "duration": {"steps": 4},
    }
    stage1 = {**common, "stage": "generative", "output": "runs/one", "batch": {"global_batch": 4}}
    stage2 = {**common, "stage": "contrastive", "output": "runs/two", "batch": {"global_batch": 16}}
    stage2["model"] = {"path": "base", "start_from": "runs/one"}
    (folder / "one.yaml").write_text(yaml.safe_dump(stage1))
    (folder / "two.yaml").write_text(yaml.safe_dump(stage2))
    return folder


def lbr(folder: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lbr_dist", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def prepare(folder: Path, out: str, code: int = 0) -> str:
    sizes = ("--similarity", "1", "--cl", "40", "--eval", "30")
    return lbr(folder, "prepare", "qa.jsonl", "--out", out, "--tokenizer", "base", *sizes, code=code)


def test_from_raw_files_to_an_exported_model(place: Path) -> None:
    assert "eval 30" in prepare(place, "data")
    assert "nothing to do" in prepare(place, "data")
    lbr(place, "train", "one.yaml", "--nproc", "2")
    lbr(place, "train", "two.yaml")
    for run in ("one", "two"):
        assert "as planned" in lbr(place, "audit", f"runs/{run}")
        assert "verified" in lbr(place, "checkpoint", "verify", f"runs/{run}")
    table = lbr(place, "eval", "runs/one", "runs/two", "bm25", "--data", "data", "--generate", "4", "--out", "eval")
    assert "Recall@10" in table
    scores = json.loads((place / "eval" / "eval.json").read_text())["models"]
    assert [model["name"] for model in scores] == ["one", "two", "BM25"]
    assert scores[2]["retrieval"]["recall_at_10"] > 0.9
    assert "bleu4" in json.dumps(scores[1]["generation"])
    lbr(place, "export", "runs/two", "model")
    assert (place / "model" / "modules.json").is_file()
    assert "120 embeddings of" in lbr(place, "encode", "model", "qa.jsonl", "vectors.parquet")
    assert "heart" in lbr(place, "search", "runs/two", "data", "what is heart pain", "-k", "3")
    assert "| two |" in lbr(place, "report", "runs/one", "runs/two", "eval")
    assert (place / "report" / "report.png").stat().st_size > 10_000
    shards = lbr(place, "checkpoint", "consolidate", "runs/two", "weights")
    assert "safetensors" in shards


def test_damaged_and_foreign_data_end_before_training(place: Path) -> None:
    prepare(place, "hurt")
    shard = next((place / "hurt" / "gl").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    changed = lbr(place, "train", "one.yaml", "data.sets.0.path=hurt", "output=runs/hurt", code=2)
    assert shard.name in changed
    shard.write_bytes(bytes(data[: len(data) // 2]))
    assert shard.name in lbr(place, "train", "one.yaml", "data.sets.0.path=hurt", "output=runs/hurt", code=2)
    manifest = json.loads((place / "data" / "manifest.json").read_text())
    shutil.copytree(place / "data", place / "foreign")
    manifest["tokenizer"]["fingerprint"] = "0" * 32
    (place / "foreign" / "manifest.json").write_text(json.dumps(manifest))
    foreign = lbr(place, "train", "one.yaml", "data.sets.0.path=foreign", "output=runs/foreign", code=2)
    assert "error: " in foreign
    assert not (place / "runs" / "foreign" / "checkpoints").exists()
    assert "other bottleneck" in lbr(place, "train", "two.yaml", "bottleneck.tokens=2", "output=runs/x", code=2)


def test_mined_negatives_are_trained_on(place: Path) -> None:
    prepare(place, "plain")
    mined = lbr(place, "mine", "hf:base?pooling=mean", "plain", "--out", "mined", "-n", "2", "--share", "2")
    assert "80 negatives for 40 queries" in mined
    assert "nothing to do" in lbr(
        place, "mine", "hf:base?pooling=mean", "plain", "--out", "mined", "-n", "2", "--share", "2"
    )
    options = ("model.start_from=null", "data.sets.0.path=mined", "contrastive.hard_negatives=2", "duration.steps=2")
    lbr(place, "train", "two.yaml", "output=runs/mined", *options)
    rows = [json.loads(line) for line in (place / "runs/mined/metrics.jsonl").open()]
    negatives = [row["effective_negatives"] for row in rows if "effective_negatives" in row]
    assert len(negatives) == 2
    assert all(40 < count <= 15 + 32 for count in negatives)  # of 16 pairs; another's negative may be one's own answer
    assert "its cl side is empty" in lbr(place, "mine", "bm25", only_gl(place), "--out", "none", code=2)


def only_gl(folder: Path) -> str:
    lbr(folder, "prepare", "qa.jsonl", "--out", "gl", "--tokenizer", "base", "--cl", "0", "--eval", "0")
    return "gl"
