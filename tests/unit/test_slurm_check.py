"""`lbr slurm check` with nodes that die under it; tests/cluster runs it as Slurm does."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import typer

from lbr_dist.cli.slurm import check
from lbr_dist.config import Recipe
from lbr_dist.environment import SlurmStart
from lbr_dist.launch import slurm, slurm_check
from lbr_dist.launch.ports import free_port
from lbr_dist.launch.slurm_answers import Client


class Fake(Client):
    """A node with a GPU and a fast network, which ends when it is given a certain task."""

    def __init__(self, name: str, port: int, dies_at: str = "") -> None:
        super().__init__(name, ("127.0.0.1", port))
        self._dies_at = dies_at
        threading.Thread(target=self.live, daemon=True).start()

    def live(self) -> None:
        with contextlib.suppress(SystemExit):
            self.serve()

    def __getattribute__(self, name: str) -> Any:
        if name == f"_do_{object.__getattribute__(self, '_dies_at')}":
            self._connection.shutdown(socket.SHUT_RDWR)
            sys.exit()
        return object.__getattribute__(self, name)

    def _connect(self) -> socket.socket:
        self._connection = super()._connect()
        return self._connection

    def _do_gpus(self) -> dict[str, Any]:
        return {"gpus": 1}

    def _do_pair(self, host: str, port: int, rank: int) -> dict[str, Any]:
        return {"gb_s": 1.0}


class Own(Fake):
    """The first node's own client, as a process that is started."""

    def __init__(self, command: list[str], stdin: int) -> None:
        super().__init__(command[-3], int(command[-1]))

    def kill(self) -> None:
        pass

    wait = kill


@pytest.mark.parametrize("task", ["", "clock", "gpus", "shared", "port", "pair"])
def test_a_node_that_dies_is_named_and_no_other(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "Popen", Own)
    port = free_port()
    step = {"JOB_ID": "7", "STEP_ID": "1", "PROCID": "0", "LOCALID": "0", "NTASKS": "4", "TASKS_PER_NODE": "1(x4)"}
    environ = {f"SLURM_{name}": value for name, value in step.items()}
    environ |= {"SLURM_JOB_NODELIST": "a,b,c,d", "MASTER_PORT": str(port)}
    for name in "bcd":
        Fake(name, port, task if name == "b" else "")
    assert slurm_check.check([tmp_path], environ=environ) is not bool(task)
    bad = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad: ")]
    assert [line for line in bad if "GPUs" not in line] == [
        f"bad: b: {task}: no answer (the connection was closed)" for _ in range(bool(task))
    ]
    assert not [line for line in bad if not line.startswith("bad: b: ")]
    assert list(tmp_path.iterdir()) == []


def test_what_is_bad_is_a_mistake_also_where_srun_reports_another_code(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that cannot start Python ends with 127, which hides the check's 2."""
    run = Path(recipe.output)
    job = slurm.Attempt(SlurmStart(7, 0), "n[1-2]", limit=3)
    slurm.begin(recipe, job)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    for well in (True, False):
        monkeypatch.setattr(slurm_check, "check", lambda *_, well=well, **__: well)
        with contextlib.nullcontext() if well else pytest.raises(typer.Exit):
            check(shared=[tmp_path, run], quick=True)
        assert slurm.end(recipe, job, 127, asked=False).requeue is well
    assert {path.name for path in tmp_path.iterdir()} == {"run"}, "only where jobs begin"


def test_the_first_nodes_own_client_is_a_process(tmp_path: Path) -> None:
    port = str(free_port())
    code = (
        "from pathlib import Path; from lbr_dist.launch.slurm_check import check\n"
        f"assert check([Path({str(tmp_path)!r})], quick=True)"
    )
    step = {"JOB_ID": "7", "STEP_ID": "1", "PROCID": "0", "LOCALID": "0", "NTASKS": "1", "TASKS_PER_NODE": "1"}
    environ = {f"SLURM_{name}": value for name, value in step.items()}
    environ |= {"SLURM_JOB_NODELIST": "a", "MASTER_PORT": port, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 nodes: all answer")
