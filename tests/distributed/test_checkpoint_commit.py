"""Ranks that commit one checkpoint together, without DeepSpeed: all or nothing, whatever happens to one of them."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from lbr_dist.errors import UserError
from lbr_dist.training import run_folder
from lbr_dist.training.checkpoint.chosen import same_on_all
from lbr_dist.training.checkpoint.format import OptimizerEntry, Parameter, verify
from lbr_dist.training.checkpoint.listing import find_resumable
from lbr_dist.training.checkpoint.weights import iterate_weights
from lbr_dist.training.checkpoint.writer import SLOWEST_WRITE, CheckpointWriter, Snapshot, StorageError, TensorFile
from lbr_dist.training.collective import GlooTeam


class FullDisk(dict):
    """Tensors whose file cannot be written."""

    def __getitem__(self, key: str) -> torch.Tensor:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights")


class Deadly(dict):
    """Tensors that kill their rank when they are written."""

    def __getitem__(self, key: str) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def share(step: int, rank: int, kind: type[dict] = dict) -> Snapshot:
    start, end = (0, 7) if rank == 0 else (7, 20)
    return Snapshot(
        step=step,
        manifest={
            "created": "now",
            "zero_stage": 3,
            "versions": {},
            "parameters": [Parameter(name="w", shape=(4, 5), dtype="F32", trained=True)],
            "tied": {},
            "optimizer": OptimizerEntry(family="sgd", keys=[], step=None),
            "engine": {},
            "state": {},
        },
        tensor_files=[TensorFile("weights", kind(w=torch.arange(start, end) + 100.0 * step), [(0, start, end)])],
    )


def write(rank: int, world: int, run: str) -> list[str]:
    """Rank 1 meets a full disk at step 2, and is killed at step 4; what each rank was told, in order."""
    writer = CheckpointWriter(Path(run), GlooTeam(SLOWEST_WRITE), keep_last=9, keep_every=None)
    told = []
    for step, kind in ((1, dict), (2, FullDisk), (3, dict), (4, Deadly)):
        writer.submit(share(step, rank, kind if rank == 1 else dict))
        begin = time.perf_counter()
        try:
            writer.wait()
            told.append(f"{step} committed")
        except (UserError, RuntimeError) as error:
            told.append(f"{type(error).__name__}: {error}")
        (Path(run) / f"told-{rank}").write_text("\n".join(told))
        (Path(run) / f"waited-{rank}").write_text(str(time.perf_counter() - begin))
    return told


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commit")
    (folder / "ranks").mkdir()
    with pytest.raises(RuntimeError, match=r"closed by peer|reset by peer"):  # from the barrier after `write`
        run_ranks(write, 2, folder / "ranks", str(folder))
    return folder


def told(run: Path, rank: int) -> list[str]:
    return (run / f"told-{rank}").read_text().splitlines()


def test_ranks_commit_one_checkpoint(run):
    ((name, tensor),) = iterate_weights(run / "checkpoints" / "step-000001")
    assert name == "w"
    assert torch.equal(tensor, (torch.arange(20) + 100.0).view(4, 5))
    assert told(run, 0)[0] == told(run, 1)[0] == "1 committed"


def test_every_rank_learns_of_one_ranks_full_disk(run):
    assert told(run, 0)[1] == told(run, 1)[1]
    assert "UserError: checkpoint step-000002 was not written: rank 1: " in told(run, 0)[1]
    assert "No space left on device" in told(run, 0)[1]
    assert "GiB free" in told(run, 0)[1]


def test_the_next_save_works_after_a_failed_one(run):
    assert told(run, 0)[2] == told(run, 1)[2] == "3 committed"
    assert verify(run / "checkpoints" / "step-000003") == []


def test_a_killed_rank_leaves_nothing_to_resume_from(run):
    assert "RuntimeError: checkpoint step-000004 was not committed" in told(run, 0)[3]
    assert len(told(run, 1)) == 3
    assert float((run / "waited-0").read_text()) < 20
    found, reasons = find_resumable(run)
    assert found == run / "checkpoints" / "step-000003"
    assert len(reasons) == 1
    assert "step-000004" in reasons[0]
    assert "never committed" in reasons[0]


def part(rank: int, world: int, folder: str) -> list[str]:
    """Rank 1 gets a copy of the run folder, as of its first checkpoint, and then no storage; what each was told."""
    run_folder.SEEN_AFTER_S = 0.5
    team, shared = GlooTeam(SLOWEST_WRITE), Path(folder) / "shared"
    first = CheckpointWriter(shared, team, keep_last=1, keep_every=None)
    told = []

    def tell(what: Callable[[], object]) -> None:
        try:
            what()
            told.append("well")
        except (UserError, StorageError) as error:
            told.append(f"{type(error).__name__}: {error}")

    def save(writer: CheckpointWriter, step: int) -> None:
        writer.submit(share(step, rank))
        writer.wait()

    save(first, 1)
    own = shared
    if rank == 1:
        own = Path(shutil.copytree(shared, Path(folder) / "copy"))
    team.gather(None)
    tell(lambda: run_folder.check_shared(shared, rank))
    tell(lambda: run_folder.check_shared(own, rank))
    tell(lambda: same_on_all(team, own / "checkpoints/step-000001"))  # another place, and the same checkpoint
    save(first, 1)  # once more, by the same ranks
    tell(lambda: same_on_all(team, shared / "checkpoints/step-000001"))
    tell(lambda: same_on_all(team, own / "checkpoints/step-000001"))
    tell(lambda: same_on_all(team, own / ("checkpoints/step-000001" if rank == 0 else "nothing")))
    if rank == 1:
        first.folder = Path(folder) / "bare" / "checkpoints"
    tell(lambda: save(first, 2))
    return told


def test_a_rank_with_a_run_folder_of_its_own_is_named(tmp_path):
    """Each wrote its half to a disk of its own, the run went on, and no checkpoint was whole; or one of them loaded
    the weights of another run."""
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    for told in run_ranks(part, 2, ranks, str(tmp_path)):
        assert told[:1] + told[2:4] == ["well"] * 3
        assert f"UserError: output {tmp_path}/copy: rank 1 on " in told[1]
        assert "does not see the run that rank 0 started there" in told[1]
        for which, line in zip(("another", "no whole"), told[4:6], strict=True):
            assert line.startswith(
                f"UserError: rank 1 on {socket.gethostname()} sees {which} checkpoint at {tmp_path}/"
            )
            assert line.endswith(": the run folder must be on storage that all nodes share")
        assert "StorageError: checkpoint step-000002 was not written: rank 1 on " in told[6]
        assert "which rank 0 made: the run folder must be on storage that all nodes share, and mounted" in told[6]
    assert not (tmp_path / "bare").exists()
    assert sorted(path.name for path in (tmp_path / "shared").glob("*")) == ["checkpoints"]
    assert verify(tmp_path / "shared/checkpoints/step-000001") == []
