"""What is loaded by its hub name: a data set to prepare, an mteb task, a model to train; and again offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub import serve

CARD = """---
configs:
- config_name: default
  data_files: [{split: test, path: qrels.jsonl}]
- config_name: corpus
  data_files: [{split: corpus, path: corpus.jsonl}]
- config_name: queries
  data_files: [{split: queries, path: queries.jsonl}]
---
"""
FACTS = [
    ("what pumps blood", "the heart pumps blood through the body"),
    ("what relieves pain", "aspirin relieves pain and fever"),
    ("what is a rash with fever", "measles comes with fever and a rash"),
    ("at what temperature does water boil", "water boils at 100 degrees Celsius"),
]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("hub")
    pairs, task = folder / "pairs", folder / "task"
    for repository in (pairs, task):
        repository.mkdir()
    write(pairs / "train.jsonl", [{"question": q, "answer": a} for q, a in FACTS])
    (task / "README.md").write_text(CARD)
    write(task / "queries.jsonl", [{"_id": f"q{i}", "text": q} for i, (q, _) in enumerate(FACTS)])
    write(task / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": a} for i, (_, a) in enumerate(FACTS)])
    write(task / "qrels.jsonl", [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(len(FACTS))])
    return {"datasets/clinic/pairs": pairs, "datasets/mteb/nfcorpus": task, "models/clinic/tiny": tiny_model_dir()}


def write(file: Path, rows: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lbr(home: Path, address: str | None, *arguments: str | Path) -> str:
    """Run the tool in a process of its own, online where an address is given; returns what it printed."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0" if address else "1"}
    if address:
        environment["HF_ENDPOINT"] = address
    done = subprocess.run(
        [sys.executable, "-m", "lbr_dist", *map(str, arguments)], env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return done.stdout.decode()


def test_by_name_from_the_hub_and_then_from_its_cache(repositories, tmp_path):
    home = tmp_path / "home"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "stage": "generative",
                "output": str(tmp_path / "run"),
                "model": {"path": "clinic/tiny"},
                "data": {"sets": [{"path": str(tmp_path / "online")}], "max_x_tokens": 64, "max_y_tokens": 64},
                "bottleneck": {"tokens": 1},
                "batch": {"global_batch": 1},
                "duration": {"steps": 1},
            }
        )
    )
    with serve(repositories) as address:
        for where, net in (("online", address), ("offline", None)):
            data = tmp_path / where
            prepared = lbr(
                home, net, "prepare", "hub:clinic/pairs@train", "--out", data, "--tokenizer", "clinic/tiny",
                "--gl", "2", "--cl", "0", "--eval", "2",
            )  # fmt: skip
            assert "gl 2, cl 0, eval 2 records, from 4 rows" in prepared
            lbr(home, net, "eval", "bm25", "--data", data, "--out", data / "eval", "--task", "NFCorpus")
            scores = json.loads((data / "eval/eval.json").read_text())["models"][0]["tasks"]["NFCorpus"]
            assert scores["recall_at_1"] == 1.0
        lbr(home, address, "train", recipe)
    asked: list[str] = []
    with serve({}, asked) as address:  # what is in the cache is used without a question, as a node may have no network
        again = tmp_path / "again"
        lbr(home, address, "train", recipe, f"output={again}")
        lbr(home, address, "export", again, tmp_path / "exported")
        lbr(home, address, "eval", "hf:clinic/tiny?pooling=mean", again, "--data", data, "--out", tmp_path / "eval")
    assert asked == []
    online, offline = ((tmp_path / where / "manifest.json").read_text() for where in ("online", "offline"))
    assert json.loads(online)["splits"] == json.loads(offline)["splits"]
