"""Each speed benchmark runs at a toy size, in this process, and writes a result that says so."""

import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from benchmarks import common, dense, lengths, loader, mfu, padding
from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.scales import SCALES
from lbr_dist.config import Bottleneck

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch, tmp_path):
    def call(name, *options, result=None):
        threads = torch.get_num_threads()
        monkeypatch.setattr(sys, "argv", [name, "--toy", "--out", str(tmp_path), *options])
        try:
            importlib.import_module(f"benchmarks.{name}").main()
        finally:
            torch.set_num_threads(threads)
        text = (tmp_path / f"{result or name}.md").read_text()
        assert "Toy sizes: these figures mean nothing" in text
        found = json.loads((tmp_path / f"{result or name}.json").read_text())
        assert found["date"]
        assert found["hardware"]
        return found["rows"], text

    return call


def test_bottleneck(run):
    rows, _ = run("bottleneck", "--device", "cpu")
    assert [row["tokens"] for row in rows] == ["medicine", 32]
    assert all(math.isfinite(row[name]) and row[name] > 0 for row in rows for name in ("ib", "rec", "dense_ib"))


def test_loss_head(run):
    rows, _ = run("loss_head", "--device", "cpu")
    assert all(row[name] > 0 for row in rows for name in ("whole", "torch"))


@pytest.mark.timeout(600)
def test_contrastive(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["contrastive", "--toy", "--device", "cpu"])
    importlib.import_module("benchmarks.contrastive").main()
    text = capsys.readouterr().out
    losses = {line.split("|")[4].strip() for line in text.splitlines() if line.startswith(("| ours", "| st "))}
    assert len(losses) == 1  # all sides compute the same
    assert "time of the cached step over the plain one" in text


@pytest.mark.timeout(600)
def test_infonce(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["infonce", "--toy", "--device", "cpu"])
    importlib.import_module("benchmarks.infonce").main()
    assert "gradient error" in capsys.readouterr().out


@pytest.mark.timeout(600)
def test_ring(run):
    (row,), _ = run("ring")
    assert float(row["error"]) < 1e-5
    assert min(row["seconds"]["ring"] + row["seconds"]["gathered"]) > 0


@pytest.mark.timeout(600)
def test_memory(run):
    (row,), _ = run("memory")
    assert row["measured_gib"] > 0.3
    assert row["plan_gib"] > 0.3


def test_scaling_is_what_is_committed(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["scaling", "--out", str(tmp_path)])
    importlib.import_module("benchmarks.scaling").main()
    found, kept = (json.loads((folder / "scaling.json").read_text()) for folder in (tmp_path, common.RESULTS))
    assert found["rows"] == kept["rows"]  # a change of the model of memory or time: commit what the command now prints


@pytest.mark.timeout(600)
def test_encode(monkeypatch, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"aspirin relieves pain {n} " * (1 + n % 5)}) + "\n" for n in range(40))
    )
    arguments = ["encode", str(texts), "--toy", "--repeat", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    threads = torch.get_num_threads()
    try:
        importlib.import_module("benchmarks.encode").main()
    finally:
        torch.set_num_threads(threads)
    text = (tmp_path / "encode.md").read_text()
    assert "Toy sizes" in text
    assert "| lbr | " in text
    assert "Lowest cosine between the two: 1.0000" in text or "Lowest cosine between the two: 0.99999" in text


@pytest.mark.timeout(600)
def test_checkpoint(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.checkpoint",
        "--toy",
        "--folder",
        str(tmp_path),
        "--out",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    text = (tmp_path / "checkpoint.md").read_text()
    assert "Toy sizes" in text
    assert "| 0.19 | " in text


@pytest.mark.timeout(600)
def test_resume(tmp_path):
    command = [sys.executable, "-m", "benchmarks.resume", "--toy", "--workers", "0", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    text = (tmp_path / "resume.md").read_text()
    assert "Toy sizes" in text
    assert "| checkpoint: a bit flipped in a file | 1 | 1 exact resume |" in text


def test_padding(run):
    rows, _ = run("padding", "--device", "cpu")
    assert [row["source"] for row in rows] == list(padding.SOURCES)
    assert all(set(row["seconds"]) == {"packed", *padding.PADDED} for row in rows)


def test_mfu(run):
    rows, text = run("mfu", "--device", "cpu")
    assert {row["variant"] for row in rows} >= {"base", "checkpointing", "logits"}
    assert "matrix products" in text  # the profile
    assert mfu.kind_of("sm90_xmma_gemm_bf16") == "matrix products"
    assert mfu.kind_of("something else") == "other"


def test_mfu_keeps_the_rows_beside_one_that_fails(run, monkeypatch, tmp_path):
    def measure(shape, attention, variant, *_):
        if variant == "checkpointing":
            raise torch.OutOfMemoryError("no room")
        return {"step_ms": 1.0}

    monkeypatch.setattr(mfu, "measure", measure)
    with pytest.raises(SystemExit):
        run("mfu", "--device", "cpu")
    rows = json.loads((tmp_path / "mfu.json").read_text())["rows"]
    assert [row.get("tokens_per_s", row.get("step_ms")) for row in rows] == [1.0, "OutOfMemoryError", 1.0]


def test_loader(run):
    rows, text = run("loader")
    sides = {row["side"] for row in rows}
    installed = {side for side in loader.SIDES if side == "lbr" or importlib.util.find_spec(side)}
    assert sides == installed
    for side in set(loader.SIDES) - installed:
        assert f"{loader.NAMES.get(side, side)} is not installed" in text
    assert {(row["side"], row["where"]) for row in rows} >= {("lbr", "local"), ("lbr", "http")}


def test_zero_overhead(run):
    rows, _ = run("zero_overhead")
    assert [(row["case"], row["ranks"]) for row in rows] == [("plain torch", 1), ("ZeRO-3", 2)]
    assert all(row["cpu_s"] > 0 for row in rows)


def test_startup(run):
    rows, _ = run("startup")
    parts = {row["part"]: row for row in rows}
    assert parts["checkpoint: load"]["start_wall"] is None  # a first start loads none, a restart does
    assert parts["checkpoint: load"]["restart_wall"] is not None
    for kind in ("start", "restart"):
        assert 0 <= parts["the rest"][f"{kind}_wall"] < parts["whole"][f"{kind}_wall"]  # nothing counts twice
        assert parts["first step"][f"{kind}_wall"] > 0


def test_dense_side_hides_x_only_behind_a_bottleneck():
    samples = padding.make_samples(("medicine",), 2)
    batch = dense.collate(samples)
    s = samples[0]
    y = len(s.x) + s.z
    assert not batch.mask[0, 0, y, : len(s.x)].any()
    assert batch.mask[0, 0, y, len(s.x) : y + 1].all()
    assert not batch.mask[0, 0, y, y + 1 :].any()


def test_budget_batches_keep_order_and_budget():
    samples = padding.make_samples(("code",), 40)
    batches = padding.by_budget(samples, 2048)
    assert [s for batch in batches for s in batch] == samples
    assert all(len(b) == 1 or len(b) * max(map(padding.tokens, b)) <= 2048 for b in batches)


def test_the_list_of_benchmarks_has_every_script_and_experiment():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    scripts = {file.stem for file in (ROOT / "benchmarks").glob("*.py")} - {"__init__"}
    named = set(re.findall(r"`(?:python -m benchmarks\.)?([\w-]+)[^`]*`", text))
    assert {*scripts, *EXPERIMENTS, *SCALES} <= named
    for file in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / "benchmarks" / file).exists()


def test_lengths_are_of_every_source():
    assert all(x > 0 and y > 1 for x, y in lengths.load("medicine", "code", "chemistry"))
    assert min(lengths.documents("medicine.corpus")) >= 8
    assert Bottleneck().length(1) == 1


def test_ratio_is_the_median_of_rounds():
    assert common.ratio([2, 9, 4], [1, 3, 4]) == (2, 1, 3)


def test_what_gpu_all_runs_imports_with_what_it_says_it_needs():
    """And with what comes with that: everything else that the project depends on is hidden."""
    (said,) = re.findall(r"Needs ([^;]*);", (ROOT / "benchmarks" / "gpu_all.sh").read_text())
    needed = set(re.findall(r"[\w-]+", said)) - {"and"}
    lines = [line for name in needed for line in metadata.requires(name) or () if "extra ==" not in line]
    there = needed | {re.match(r"[\w-]+", line)[0] for line in lines}
    own = set(re.findall(r'^  "([\w-]+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    found = metadata.packages_distributions().items()
    hidden = [module for module, names in found if own.intersection(names) - there]
    assert {"deepspeed", "ray", "mteb", "sentence_transformers"} <= {*hidden}
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({hidden}))\n"
        "sys.path[:0] = ['tests', 'tests/gpu']\n"
        "import test_attention_gpu, test_steps_gpu\n"
        "import benchmarks.mfu, benchmarks.bottleneck, benchmarks.infonce, benchmarks.loss_head\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
