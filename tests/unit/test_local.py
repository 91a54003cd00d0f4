"""`lbr train --nproc`: what is refused, what its ranks inherit, and a stop before they have begun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.config import Recipe
from lbr_dist.errors import EXIT_RUN_AGAIN, UserError
from lbr_dist.launch import local
from lbr_dist.recipes import save_recipe
from lbr_dist.training.signals import REPEATED_S

JOB_STEP = {"STEP_ID": "0", "JOB_ID": "7", "PROCID": "1", "LOCALID": "0", "NTASKS": "2", "STEP_NUM_TASKS": "2"}


def test_ranks_of_another_launcher_do_not_start_runs_of_their_own(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`srun lbr train R --nproc 8`: the first would train alone, the others wait for its folder."""
    monkeypatch.setattr(local._Ranks, "start", lambda *_: pytest.fail("ranks were started"))
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in JOB_STEP.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(UserError, match=r"--nproc 8: this process is rank 1 of 2 already \(srun, job 7\): leave"):
        local.launch(recipe, 8)


def test_ranks_do_not_look_for_the_store_of_an_outer_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, ranks = list[dict[str, Any]](), local._Ranks(tmp_path, tmp_path / "run")
    monkeypatch.setattr(subprocess, "Popen", lambda command, **given: seen.append(given["env"]))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    ranks.start([], 2)
    assert [environ["RANK"] for environ in seen] == ["0", "1"]
    assert not any("TORCHELASTIC_USE_AGENT_STORE" in environ for environ in seen)


def test_a_second_request_ends_ranks_that_hear_nothing(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits for a hung rank, within a call, runs no handler of Python's."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(); time.sleep(600)"
    ranks = list[subprocess.Popen[bytes]]()

    def ask() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(REPEATED_S + 0.5)

    def start(self: local._Ranks, *_: Any) -> None:
        ranks.append(subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE))
        self._processes = ranks
        assert ranks[0].stdout is not None
        ranks[0].stdout.readline()
        threading.Thread(target=ask).start()

    monkeypatch.setattr(local._Ranks, "start", start)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
        local.launch(recipe, 1)
    assert ranks[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("hung", [0, 1])
@pytest.mark.parametrize("reports", [False, True])
def test_a_rank_that_says_nothing_is_blamed_and_not_the_one_that_waited_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hung: int, reports: bool
) -> None:
    """Where the failed one reports nothing either, it is the culprit, and others wait for it."""
    monkeypatch.setattr(local, "GRACE_S", 0.1)
    ranks, run = local._Ranks(tmp_path, tmp_path / "run"), tmp_path / "run" / "stacks"
    (tmp_path / "rank-1.txt").write_text("Python stacks:\n" if reports and hung == 0 else "")
    if reports and hung == 1:
        run.mkdir(parents=True)
        (run / "rank-0.txt").write_text("Python stacks:\n")
    code = {hung: "import time; time.sleep(600)", 1 - hung: "import sys; sys.exit(1)"}
    ranks._processes = [subprocess.Popen([sys.executable, "-c", code[rank]]) for rank in range(2)]
    assert ranks.wait() == 1
    waited = f"rank {hung} hung (no report); rank {1 - hung} waited in vain"
    failed = f"rank {1 - hung} failed (exit code 1)"
    assert (waited if reports else failed) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("a_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_stop_while_ranks_still_import_is_no_failure(recipe: Recipe, tmp_path: Path, number: signal.Signals) -> None:
    save_recipe(recipe, tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "lbr_dist", "train", str(tmp_path / "recipe.yaml"), "--nproc", "2"]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    deadline = time.monotonic() + 60
    while len(children.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    launcher.send_signal(number)
    assert launcher.communicate(timeout=60)[1] == "stopped on request before the run had begun\n"
    assert launcher.returncode == EXIT_RUN_AGAIN
