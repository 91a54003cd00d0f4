"""What a checkpoint writer keeps, and whose fault a failed write is; with several ranks: tests/distributed."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import Alone

from lbr_dist import config
from lbr_dist.errors import UserError
from lbr_dist.training import run_folder
from lbr_dist.training.checkpoint import checkpointer as checkpoint
from lbr_dist.training.checkpoint import writer as checkpoint_writer
from lbr_dist.training.checkpoint.files import write_bytes
from lbr_dist.training.checkpoint.format import FileEntry, OptimizerEntry, Parameter
from lbr_dist.training.checkpoint.listing import list_checkpoints
from lbr_dist.training.checkpoint.writer import CheckpointWriter, Snapshot, StorageError, TensorFile


class Failing(dict):
    """Tensors whose file cannot be written."""

    number = 0

    def __getitem__(self, key: str) -> torch.Tensor:
        raise OSError(self.number, os.strerror(self.number), "weights")


def snapshot(step: int, tensors: dict[str, torch.Tensor] | None = None) -> Snapshot:
    manifest = {
        **{"created": "now", "zero_stage": 0, "versions": {}, "tied": {}, "engine": {}, "state": {}},
        "parameters": [Parameter(name="w", shape=(4,), dtype="F32", trained=True)],
        "optimizer": OptimizerEntry(family="sgd", keys=[], step=None),
    }
    files = [TensorFile("weights", {"w": torch.full((4,), float(step))} if tensors is None else tensors, [(0, 0, 4)])]
    return Snapshot(step, manifest, files)


def save(writer: CheckpointWriter, *steps: int) -> None:
    for step in steps:
        writer.submit(snapshot(step))
        writer.wait()


def names(run: Path) -> list[str]:
    return [path.name for path, _ in list_checkpoints(run)]


def writer(run: Path) -> CheckpointWriter:
    return CheckpointWriter(run, Alone(), keep_last=2, keep_every=None)


def test_what_was_passed_over_takes_no_place_from_what_can_be_resumed(tmp_path: Path) -> None:
    save(writer(tmp_path), 400, 500)
    resumed = writer(tmp_path)
    resumed.resumed = next(m.sequence for path, m in list_checkpoints(tmp_path) if path.name == "step-000400")
    save(resumed, 450)  # from 400, because 500 is damaged
    assert names(tmp_path) == ["step-000450", "step-000500", "step-000400"]
    save(resumed, 500)
    assert names(tmp_path) == ["step-000500", "step-000450"]


def test_what_the_run_went_back_before_takes_no_place_from_what_is_before_it(tmp_path: Path) -> None:
    made = CheckpointWriter(tmp_path, Alone(), keep_last=4, keep_every=None)
    save(made, 200, 400, 600, 800)
    save(made, 400)  # as a start does that goes back to it
    assert names(tmp_path) == ["step-000400", "step-000800", "step-000600", "step-000200"]
    again = CheckpointWriter(tmp_path, Alone(), keep_last=3, keep_every=None)
    again.resumed = list_checkpoints(tmp_path)[0][1].sequence
    save(again, 500)
    assert names(tmp_path) == ["step-000500", "step-000400", "step-000800", "step-000600", "step-000200"]
    save(again, 600)
    assert names(tmp_path) == ["step-000600", "step-000500", "step-000400"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, UserError),
        (errno.EFBIG, UserError),
        (errno.EROFS, UserError),
        (errno.EIO, StorageError),
        (errno.ESTALE, StorageError),
    ],
)
def test_storage_that_may_come_back_is_no_mistake_of_the_user(number: int, kind: type, tmp_path: Path) -> None:
    made = writer(tmp_path)
    save(made, 1)
    tensors = Failing(w=torch.zeros(4))
    tensors.number = number
    made.submit(snapshot(2, tensors))
    with pytest.raises(kind, match=r"checkpoint step-000002 was not written: rank 0: weights: .* GiB free\)"):
        made.wait()
    assert names(tmp_path) == ["step-000001"]


def test_a_checkpoint_is_committed_though_an_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = writer(tmp_path)

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint_writer, "rotate", refuse)
    with caplog.at_level(logging.WARNING, logger="lbr"):
        save(made, 1)
    assert made.committed == tmp_path / "checkpoints" / "step-000001"
    assert "checkpoints before step-000001 could not be removed" in caplog.text


def test_a_checkpoint_that_cannot_be_replaced_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, rename = writer(tmp_path), Path.rename
    save(made, 1)

    def refuse(path: Path, target: Path) -> Path:
        if path.name.startswith(".tmp-"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="earlier checkpoints are intact"):
        save(writer(tmp_path), 1)
    assert names(tmp_path) == ["step-000001"]


class Believing(Alone):
    """Rank 0 of two; what the other one says that it wrote is there or not."""

    world = 2

    def __init__(self, folder: Path, there: int) -> None:
        self.folder, self.there = folder, there

    def gather(self, value: Any) -> list[Any]:
        name, (temporary,) = "rank-00001-of-00002.safetensors", self.folder.glob("checkpoints/.tmp-*")
        if self.there:
            write_bytes(temporary / name, b"x" * self.there)
        return [value, ({name: FileEntry(kind="rank", bytes=8, xxh128="")}, None)]


def test_a_file_that_rank_0_does_not_see_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank's storage went away, and it wrote to the disk below; the good checkpoints were rotated away."""
    monkeypatch.setattr(run_folder, "SEEN_AFTER_S", 0.1)
    save(writer(tmp_path), 1)
    told = r"rank 0 on .* does not see .*rank-00001-of-00002.safetensors, which rank 1 wrote: the run folder must be on"
    for there in (0, 7):
        with pytest.raises(StorageError, match=told):
            save(CheckpointWriter(tmp_path, Believing(tmp_path, there), keep_last=1, keep_every=None), 2)
        assert [path.name for path in (tmp_path / "checkpoints").glob("[!l]*")] == ["step-000001"]
    save(CheckpointWriter(tmp_path, Believing(tmp_path, 8), keep_last=1, keep_every=None), 2)
    assert names(tmp_path) == ["step-000002"]


class Apart(Alone):
    """Rank 0 of two; the other one sees a checkpoint of another run."""

    def gather(self, value: Any) -> list[Any]:
        return [value, ("node-b", ("another", 1))]


def test_ranks_that_see_different_checkpoints_load_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They went on with weights of two runs."""
    save(writer(tmp_path), 1)
    monkeypatch.setattr(checkpoint, "GlooTeam", Apart)
    monkeypatch.setattr(checkpoint, "open_engine", lambda *_: SimpleNamespace(parameters=list))
    newest = tmp_path / "checkpoints" / "step-000001"
    told = rf"^rank 1 on node-b sees another checkpoint at {newest}: the run folder must be on storage that all nodes"
    with pytest.raises(UserError, match=told):
        checkpoint.Checkpointer(tmp_path, None, config.Checkpoint(), extra_files={}).load(newest)
    with pytest.raises(UserError, match=told):
        checkpoint.start_from(None, tmp_path)
