"""What a checkpoint writer keeps, and whose fault a failed write is; with several ranks: tests/distributed."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
import torch

from lbr_dist.errors import UserError
from lbr_dist.training.checkpoint_format import OptimizerEntry, Parameter, find_resumable, list_checkpoints
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


def test_going_back_makes_a_checkpoint_the_newest(tmp_path: Path) -> None:
    save(writer(tmp_path), 400, 500)
    older = tmp_path / "checkpoints" / "step-000400"
    writer(tmp_path).go_back_to(older)  # and is killed before it saves
    found, reasons = find_resumable(tmp_path)
    assert found == older
    assert "step-000500: a later step, but committed before step-000400" in reasons[0]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000400\n"
    again = writer(tmp_path)
    again.go_back_to(older)  # the newest already
    save(again, 450)
    assert names(tmp_path) == ["step-000450", "step-000400"]
    elsewhere = tmp_path / "checkpoints" / "step-000450"
    before = (elsewhere / "manifest.json").read_bytes()
    save(other := writer(tmp_path / "other"), 1)
    other.go_back_to(elsewhere)
    assert (elsewhere / "manifest.json").read_bytes() == before


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
