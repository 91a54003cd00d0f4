"""Ray's nodes in a Slurm job: what is started again, and what is not."""

from __future__ import annotations

import os
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lbr_dist.errors import UserError
from lbr_dist.launch import slurm_ray


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A port that answers as Ray's head does, and the environment of the second node's step."""
    before = signal.getsignal(signal.SIGTERM)
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory(prefix="lbr-") as scratch:
        monkeypatch.setenv("LBR_RAY_FOLDER", f"{scratch}/ray-7-0")
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        step = {"JOB_ID": "7", "STEP_ID": "1", "PROCID": "1", "LOCALID": "0", "NTASKS": "2", "CPUS_ON_NODE": "4"}
        for name, value in step.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"):
            monkeypatch.delenv(name, raising=False)
        yield server
    signal.signal(signal.SIGTERM, before)


def node() -> list[str]:
    """What a node is started with; its step's files are beside its scratch folder."""
    return ["node", str(Path(os.environ["LBR_RAY_FOLDER"]).with_name("nodes-7")), "1", "2", "3", "4"]


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
    assert slurm_ray.main(node()) == 0
    assert clock.lives == []


@pytest.mark.usefixtures("head")
def test_a_node_that_never_starts_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([30.0] * 20, monkeypatch)
    assert slurm_ray.main(node()) == 1
    assert 180 < clock.now <= 240


def test_so_is_one_whose_head_is_gone(monkeypatch: pytest.MonkeyPatch, head: socket.socket) -> None:
    clock = Clock([7200.0, 7200.0], monkeypatch)
    start = clock.start

    def start_until_the_head_goes(options: Sequence[str]) -> int:
        head.close()
        return start(options)

    monkeypatch.setattr(slurm_ray, "start", start_until_the_head_goes)
    assert slurm_ray.main(node()) == 1
    assert clock.now == 7200


@pytest.mark.usefixtures("head")
def test_a_head_that_never_answers_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(slurm_ray, "WAIT_S", 0.1)
    assert slurm_ray.main(node()) == 1
    assert capsys.readouterr().err == "error: Ray's head at 127.0.0.1:1 did not answer within 0 s: see its log\n"


@pytest.mark.usefixtures("head")
def test_ray_is_behind_a_door_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(os.environ["LBR_RAY_FOLDER"])

    def start(options: Sequence[str]) -> int:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "r" / "session_latest").mkdir(parents=True)
        os.kill(os.getpid(), signal.SIGTERM)  # the step is ended, and Ray's nodes with it
        return 1

    monkeypatch.setattr(slurm_ray, "start", start)
    assert slurm_ray.main(node()) == 0
    assert not folder.exists()


@pytest.mark.parametrize("command", [["node", "/none/nodes-7", "1", "2", "3", "4"], ["wait", "/none/nodes-7", "2"]])
def test_a_folder_that_is_too_long_for_sockets_is_refused_at_once(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("LBR_RAY_FOLDER", f"/scratch/{'x' * 30}/ray-12345678-0")
    assert slurm_ray.main(command) == 2
    message = f"error: LBR_SCRATCH /scratch/{'x' * 30}: its path has 39 bytes, and Ray's sockets leave room for "
    assert capsys.readouterr().err.startswith(message)
    longest = f"/{'x' * (slurm_ray.SOCKET_BYTES - 2 - len(slurm_ray.SOCKET))}"
    slurm_ray.check_folder(Path(longest))
    with pytest.raises(UserError):
        slurm_ray.check_folder(Path(f"{longest}x"))


@pytest.mark.usefixtures("head")
def test_a_folder_of_somebody_else_is_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.environ["LBR_RAY_FOLDER"])
    folder.symlink_to(folder.parent)
    assert slurm_ray.main(node()) == 2
    assert f"{folder} is not yours on " in capsys.readouterr().err


@pytest.mark.usefixtures("head")
def test_one_node_that_cannot_start_ends_the_wait_for_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step goes on, since the others have started; srun may bring its output later."""
    folder = Path(os.environ["LBR_RAY_FOLDER"])
    folder.write_text("a file")
    assert slurm_ray.main(node()) == 2
    said = capsys.readouterr().err
    step = folder.with_name("nodes-7")
    monkeypatch.setenv("LBR_NODE_ADDRESS", "127.0.0.1")
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: [{"NodeManagerAddress": "127.0.0.1", "Alive": True}])
    assert slurm_ray.main(["wait", str(step), "2"]) == 2
    assert said.startswith(f"error: LBR_SCRATCH: {folder} ")
    ended = said.replace("error: ", "error: a node of Ray ended with code 2: ").replace("\n", f" (see {step}.log)\n")
    assert capsys.readouterr().err == ended


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (1, 1), (0, 1)])
@pytest.mark.parametrize(
    ("answers", "said", "last"),
    [(True, "error: /x is not yours", "/x is not yours"), (False, "RuntimeError: no room", "srun: task 0: exit 2")],
)
def test_nodes_that_have_ended_are_not_waited_for(
    code: int, expected: int, answers: bool, said: str, last: str, head: socket.socket,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if not answers:
        head.close()

    def no_head(**_: object) -> None:
        raise ConnectionError

    monkeypatch.setenv("LBR_NODE_ADDRESS", "127.0.0.1")  # no new start of this program
    monkeypatch.setattr("ray.init", no_head)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    (tmp_path / "nodes-7.log").write_text(f"starting\n{said}\nsrun: task 0: exit 2\n")
    (tmp_path / "nodes-7.code").write_text(f"{code}\n")
    began = time.monotonic()
    assert slurm_ray.main(["wait", str(tmp_path / "nodes-7"), "2"]) == expected
    assert time.monotonic() - began < 30
    assert capsys.readouterr().err == (
        f"error: a node of Ray ended with code {code}: {last} (see {tmp_path}/nodes-7.log)\n"
    )
