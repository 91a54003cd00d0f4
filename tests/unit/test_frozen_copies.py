"""Frozen weights in checkpoints: two copies take turns. With DeepSpeed: tests/distributed/test_checkpoint.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import Alone

from lbr_dist import config
from lbr_dist.training.checkpoint import checkpointer as module
from lbr_dist.training.checkpoint.checkpointer import Checkpointer
from lbr_dist.training.checkpoint.engine_state import WEIGHT, Piece
from lbr_dist.training.checkpoint.format import OptimizerEntry, Parameter, verify
from lbr_dist.training.checkpoint.listing import find_resumable

NAME = "frozen-00000-of-00001.safetensors"


class State:
    """An engine of one trained and one frozen parameter."""

    family = "sgd"

    def parameters(self) -> list[Parameter]:
        return [Parameter(name=n, shape=(4,), dtype="F32", trained=n == "adapter") for n in ("adapter", "base")]

    def pieces(self, *_: Any, **__: Any) -> Iterator[Piece]:
        yield Piece("adapter", 0, 4, 0, 4, {WEIGHT: torch.ones(4)})

    def frozen(self) -> Iterator[Piece]:
        yield Piece("base", 0, 4, 0, 4, {WEIGHT: torch.arange(4.0)})

    def optimizer_entry(self) -> OptimizerEntry:
        return OptimizerEntry(family="sgd", keys=[], step=None)

    def tied(self) -> dict[str, str]:
        return {}

    counters = tied

    def loaded(self, *_: Any) -> None:
        pass

    set_counters = loaded


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "GlooTeam", Alone)
    monkeypatch.setattr(module, "open_engine", lambda *_: State())
    return tmp_path


def start(run: Path, keep_last: int) -> Checkpointer:
    engine = SimpleNamespace(zero_optimization_stage=lambda: 0)
    return Checkpointer(run, engine, config.Checkpoint(keep_last=keep_last), extra_files={})


def frozen(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}" / NAME


def flip(file: Path) -> None:
    """In place, as a disk does it: every checkpoint that has the file as its own is damaged."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    with file.open("r+b") as out:
        out.write(data)


def test_two_copies_take_turns(run: Path) -> None:
    made = start(run, keep_last=9)
    for step in range(1, 6):
        made.save(step, {"step": step}, wait=True)
    assert len({frozen(run, step).stat().st_ino for step in range(1, 6)}) == 2
    assert frozen(run, 5).samefile(frozen(run, 3))
    assert frozen(run, 5).samefile(frozen(run, 1))
    made = start(run, keep_last=9)
    made.load(run / "checkpoints" / "step-000005")
    for step in range(6, 9):
        made.save(step, {"step": step}, wait=True)
    assert frozen(run, 7).samefile(frozen(run, 5))
    assert len({frozen(run, step).stat().st_ino for step in range(5, 9)}) == 2


def test_one_copy_serves_one_checkpoint(run: Path) -> None:
    made, inodes = start(run, keep_last=1), set()
    for step in range(1, 4):
        made.save(step, {"step": step}, wait=True)
        inodes.add(frozen(run, step).stat().st_ino)
    assert len(inodes) == 1


@pytest.mark.parametrize("wait", [True, False])
def test_a_damaged_file_of_frozen_weights_spares_the_checkpoint_before(run: Path, wait: bool) -> None:
    made = start(run, keep_last=2)
    for step in range(1, 5):
        made.save(step, {"step": step}, wait=wait)
    while made.busy:  # in the background: nobody has waited for the last one when its file is damaged
        time.sleep(0.01)
    flip(frozen(run, 4))
    found, reasons = find_resumable(run)
    assert found == run / "checkpoints" / "step-000003"
    assert reasons == [f"{frozen(run, 4)}: damaged (its checksum does not match)"]
    for step in (5, 6):  # the same process goes on: what changed is written anew
        made.save(step, {"step": step}, wait=wait)
        made.wait()
        assert verify(run / "checkpoints" / f"step-{step:06d}") == []
