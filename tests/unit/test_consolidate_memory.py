"""Consolidating a checkpoint of hundreds of megabytes takes the memory of its largest tensor, not of the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from runs import write_manifest

from lbr_dist.training.checkpoint.format import FileEntry, Parameter
from lbr_dist.training.checkpoint.tensor_file import DTYPES, TensorSpec, write_tensors
from lbr_dist.training.checkpoint.weights import consolidate, iterate_weights

ELEMENTS = 2_000_000
MIB = 2**20

PEAK = """
import resource, sys
from lbr_dist.training.checkpoint.weights import consolidate
consolidate(sys.argv[1], sys.argv[2], sys.argv[3], 0.05)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def make_checkpoint(folder: Path, tensors: int) -> int:
    """A checkpoint of two ranks in the real format, with a tied weight; returns its bytes."""
    folder.mkdir(parents=True)
    parameters = [Parameter(name=f"layer.{i}", shape=(ELEMENTS,), dtype="F32", trained=True) for i in range(tensors)]
    files = {}
    for rank in range(2):
        half = ELEMENTS // 2
        specs = [TensorSpec(p.name, "F32", (half,)) for p in parameters]
        data = (torch.full((half,), float(i + rank), dtype=DTYPES["F32"]) for i in range(tensors))
        name = f"weights-{rank:05d}-of-00002.safetensors"
        written = write_tensors(folder / name, specs, data)
        slices = [(i, rank * half, (rank + 1) * half) for i in range(tensors)]
        files[name] = FileEntry(kind="weights", bytes=written.bytes, xxh128=written.xxh128, slices=slices)
    write_manifest(folder, parameters, files, world=2, tied={"head": "layer.0"})
    return sum(entry.bytes for entry in files.values())


def peak(checkpoint: Path, out: Path, dtype: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(checkpoint), str(out), dtype],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return int(done.stdout)


def test_memory_is_that_of_a_tensor(tmp_path: Path) -> None:
    small, large = tmp_path / "step-000001", tmp_path / "step-000002"
    make_checkpoint(small, 1)
    size = make_checkpoint(large, 50)
    assert size > 380 * MIB
    base = peak(small, tmp_path / "small", "float32")
    for dtype in ("float32", "bfloat16"):
        more = peak(large, tmp_path / dtype, dtype) - base
        assert more < 48 * MIB, f"{dtype}: {more / MIB:.0f} MiB more than for a fiftieth of the model"
    index = json.loads((tmp_path / "float32" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 9
    assert "head" not in index["weight_map"]
    assert index["metadata"]["total_size"] == 50 * ELEMENTS * 4


def test_the_whole_checkpoint_is_there(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "step-000001", 3)
    assert len(consolidate(tmp_path / "step-000001", tmp_path / "out")) == 1
    for number, (_, weight) in enumerate(iterate_weights(tmp_path / "step-000001")):
        assert weight.unique().tolist() == [float(number), float(number + 1)]
