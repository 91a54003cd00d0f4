from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lbr_dist.errors import UserError
from lbr_dist.training import run_lock
from lbr_dist.training.run_lock import RunLock

HOLDER = """
import sys, time
from pathlib import Path
from lbr_dist.training.run_lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    lock.take()
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its input ends."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_run_is_refused_and_names_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.5)
    with holder(tmp_path / "run") as process, RunLock(tmp_path / "run") as lock:
        with pytest.raises(UserError, match=rf"run: process {process.pid} on \S+ is at work there: let it end"):
            lock.take()
        os.kill(process.pid, signal.SIGKILL)
        lock.take()  # a killed holder is none
    assert (tmp_path / "run" / "lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize(("job", "kind"), [("7", RuntimeError), ("8", UserError)])
def test_an_earlier_start_of_the_same_job_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, kind: type[Exception]
) -> None:
    """Its node lost slurmd, and Slurm the rank, which lives on; the job that was started again ended for good."""
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.5)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with holder(tmp_path):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        for restart, error in (("1", kind), ("0", UserError)):  # the last: two runs in one allocation
            monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
            with RunLock(tmp_path) as lock, pytest.raises(error, match=r"process \d+ of Slurm job 7, restart 0 on "):
                lock.take()


def test_a_start_waits_for_the_end_of_the_attempt_before(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    with RunLock(tmp_path) as second:
        with first:
            first.take()
            waiting = threading.Thread(target=second.take)
            waiting.start()
            time.sleep(0.5)
            assert waiting.is_alive()
        waiting.join(10)
        assert not waiting.is_alive()


def test_a_start_that_waits_may_be_asked_to_stop(tmp_path: Path) -> None:
    asked = [""]
    with holder(tmp_path), RunLock(tmp_path, lambda: asked[0]) as lock:
        threading.Timer(0.5, asked.__setitem__, (0, "SIGTERM")).start()
        began = time.monotonic()
        assert not lock.take()
        assert 0.4 < time.monotonic() - began < 10
    with RunLock(tmp_path, lambda: asked[0]) as lock:
        assert lock.take(), "nothing to wait for: the loop obeys, after a step"


def test_a_machine_that_is_gone_and_one_that_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both seem to be elsewhere; one of them touches its file."""
    monkeypatch.setattr(run_lock, "PATIENCE_S", 1.5)
    monkeypatch.setattr(run_lock, "TOUCH_S", 0.5)
    with RunLock(tmp_path / "living") as other, RunLock(tmp_path / "living") as lock:
        other.take()
        (tmp_path / "living" / "lock").write_text("process 7 on elsewhere\n")
        with pytest.raises(UserError, match="process 7 on elsewhere is at work there"):
            lock.take()
    monkeypatch.setattr(run_lock, "TOUCH_S", 1000.0)
    monkeypatch.setattr(run_lock, "GONE_S", 2.0)
    with RunLock(tmp_path / "gone") as other, RunLock(tmp_path / "gone") as lock:
        other.take()
        (tmp_path / "gone" / "lock").write_text("process 7 on elsewhere\n")
        lock.take()
        assert (tmp_path / "gone" / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunLock(tmp_path) as lock:
        lock.take()
    assert "no lock to be had" in caplog.text


def test_a_machine_that_gets_another_name_keeps_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLock(tmp_path) as lock:
        lock.take()
        monkeypatch.setattr("socket.gethostname", lambda: "renamed")
        assert lock.check()


def test_a_holder_learns_that_it_was_taken_over_or_its_folder_removed(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run") as lock:
        assert lock.check()  # it holds none
        lock.take()
        assert lock.check()
        (tmp_path / "run" / "lock").write_text("process 7 on elsewhere\n")
        with pytest.raises(UserError, match=r"process 7 on elsewhere took the folder over while this run \(process "):
            lock.check()
        (tmp_path / "run").rename(tmp_path / "moved")
        assert not lock.check()
