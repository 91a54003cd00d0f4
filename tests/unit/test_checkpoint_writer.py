"""What a checkpoint writer keeps, and whose fault a failed write is; with several ranks: tests/distributed."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
import torch

from lbr_dist.errors import UserError
from lbr_dist.training.checkpoint_format import OptimizerEntry, Parameter, list_checkpoints
from lbr_dist.training.checkpoint_writer import Alone, CheckpointWriter, Snapshot, StorageError, TensorFile


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

    def refuse() -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(made, "_rotate", refuse)
    with caplog.at_level(logging.WARNING, logger="lbr"):
        save(made, 1)
    assert made.committed == tmp_path / "checkpoints" / "step-000001"
    assert "checkpoints before step-000001 could not be removed" in caplog.text
