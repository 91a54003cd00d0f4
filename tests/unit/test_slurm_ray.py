"""Ray's nodes in a Slurm job: what is started again, and what is not."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lbr_dist.launch import slurm_ray


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A port that answers as Ray's head does, and the environment of the second node's step."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        step = {"JOB_ID": "7", "STEP_ID": "1", "PROCID": "1", "LOCALID": "0", "NTASKS": "2", "CPUS_ON_NODE": "4"}
        for name, value in step.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"):
            monkeypatch.delenv(name, raising=False)
        with tempfile.TemporaryDirectory(dir="/tmp") as scratch:
            monkeypatch.setenv("LBR_RAY_FOLDER", f"{scratch}/ray-7-0")
            yield server
            made = Path(scratch) / "ray-7-0"
            assert not made.exists() or made.stat().st_mode & 0o777 == 0o700


class Clock:
    """Time that passes only while Ray runs, and Ray's nodes that live for so many seconds each."""

    def __init__(self, lives: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.lives = 0.0, list(lives)
        monkeypatch.setattr(slurm_ray, "start", self.start)
        monkeypatch.setattr(slurm_ray.time, "monotonic", lambda: self.now)

    def start(self, options: Sequence[str]) -> int:
        self.now += self.lives.pop(0)
        return 1 if self.lives else 0


@pytest.mark.usefixtures("head")
def test_a_node_that_dies_after_hours_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([7200.0, 20.0, 20.0, 86400.0, 5.0], monkeypatch)
    assert slurm_ray.main(["node", "1", "2", "3", "4"]) == 0
    assert clock.lives == []


@pytest.mark.usefixtures("head")
def test_a_node_that_never_starts_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([30.0] * 20, monkeypatch)
    assert slurm_ray.main(["node", "1", "2", "3", "4"]) == 1
    assert 180 < clock.now <= 240


def test_so_is_one_whose_head_is_gone(monkeypatch: pytest.MonkeyPatch, head: socket.socket) -> None:
    clock = Clock([7200.0, 7200.0], monkeypatch)
    start = clock.start

    def start_until_the_head_goes(options: Sequence[str]) -> int:
        head.close()
        return start(options)

    monkeypatch.setattr(slurm_ray, "start", start_until_the_head_goes)
    assert slurm_ray.main(["node", "1", "2", "3", "4"]) == 1
    assert clock.now == 7200


@pytest.mark.usefixtures("head")
def test_a_head_that_never_answers_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(slurm_ray, "WAIT_S", 0.1)
    assert slurm_ray.main(["node", "1", "2", "3", "4"]) == 1
    assert capsys.readouterr().err == "error: Ray's head at 127.0.0.1:1 did not answer within 0 s: see its log\n"


@pytest.mark.usefixtures("head")
@pytest.mark.parametrize("command", [["node", "1", "2", "3", "4"], ["wait", "2"]])
def test_a_folder_that_is_no_place_for_sockets_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """And found before Ray tries it for three minutes."""
    monkeypatch.setenv("LBR_RAY_FOLDER", f"/scratch/{'long/' * 9}ray-7-0")
    assert slurm_ray.main(command) == 2
    assert "characters too long for Ray's sockets: name a folder with a shorter one" in capsys.readouterr().err
