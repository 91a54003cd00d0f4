"""Who stops a run on Ray, and which run: the stop file, the driver's signals, a resize."""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.environment import Environment
from lbr_dist.errors import EXIT_RUN_AGAIN
from lbr_dist.launch import ray_resize, ray_train, ray_worker
from lbr_dist.launch.ray_cluster import Bundle
from lbr_dist.launch.ray_resize import Restarts
from lbr_dist.launch.ray_train import Request, Stop, Training
from lbr_dist.recipes import parse_recipe
from lbr_dist.training.run import Outcome
from lbr_dist.training.run_lock import RunLock
from lbr_dist.training.signals import StopRequest, request_stop, stop_requested

RAW: dict[str, Any] = {
    "stage": "generative",
    "model": {"path": "org/model"},
    "data": {"sets": [{"path": "data/a"}]},
    "batch": {"global_batch": 1},
    "duration": {"steps": 1},
}


class TestHangUp:
    """A terminal that is lost costs no step, and nohup is believed."""

    @pytest.mark.usefixtures("a_terminal")
    def test_it_is_a_request(self) -> None:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.asked() == "SIGHUP"

    def test_under_nohup_it_is_none(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with StopRequest() as stop:
                signal.raise_signal(signal.SIGHUP)
                assert stop.asked() == ""
        finally:
            signal.signal(signal.SIGHUP, before)


class TestRepeated:
    """What all processes of a job are sent, their launcher passes on to the ranks as well."""

    @pytest.fixture
    def ended(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Exit codes with which the process would have ended."""
        codes: list[int] = []
        monkeypatch.setattr(os, "_exit", codes.append)
        return codes

    def passes(self, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        now = time.monotonic() + seconds
        monkeypatch.setattr(time, "monotonic", lambda: now)

    def test_a_rank_takes_it_for_the_same_request(self, ended: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        with StopRequest() as stop:
            for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
                signal.raise_signal(number)
            assert (stop.asked(), ended) == ("SIGUSR1", [])
            self.passes(2.1, monkeypatch)
            signal.raise_signal(signal.SIGTERM)
            assert ended == [143]

    def test_a_signal_after_the_stop_file_ends_at_once(self, tmp_path: Path, ended: list[int]) -> None:
        with StopRequest(tmp_path) as stop:
            request_stop(tmp_path, "maintenance")
            assert stop.asked()
            signal.raise_signal(signal.SIGTERM)
            assert ended == [143]

    def test_so_does_a_driver(self, ended: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        stop = Stop()
        stop._receive(signal.SIGINT, None)
        stop._receive(signal.SIGTERM, None)
        assert (stop.asked, ended) == ("SIGINT", [])
        self.passes(2.1, monkeypatch)
        stop._receive(signal.SIGINT, None)
        assert ended == [130]


class TestStopFile:
    def test_a_line_in_it_is_a_request(self, tmp_path: Path) -> None:
        with StopRequest(tmp_path) as stop:
            assert stop.asked() == ""
            request_stop(tmp_path, "maintenance\n")
            assert stop.asked() == "maintenance"
            stop.obeyed()
            assert stop.asked() == "maintenance"
        assert stop_requested(tmp_path) == ""

    def test_a_start_that_waits_for_the_folder_hears_signals_alone(self, tmp_path: Path) -> None:
        with StopRequest(tmp_path) as stop:
            request_stop(tmp_path, "maintenance")
            assert stop.signalled() == ""
            signal.raise_signal(signal.SIGTERM)
            assert stop.signalled() == "SIGTERM"

    def test_a_second_start_leaves_it_to_the_first(self, tmp_path: Path) -> None:
        """A start forgets it only once it holds the run's lock (tests/distributed/test_train.py)."""
        request_stop(tmp_path, "maintenance")
        with StopRequest(tmp_path):
            pass
        assert stop_requested(tmp_path) == "maintenance"

    def test_of_what_stands_in_it_only_that_of_an_earlier_start_is_forgotten(self, tmp_path: Path) -> None:
        """From its own beginning to the lock a start may take minutes."""
        with StopRequest(tmp_path) as stop:
            stop.begin()
            assert (tmp_path / "stop").read_bytes() == b""  # there from now on
        request_stop(tmp_path, "maintenance")
        with StopRequest(tmp_path) as stop:
            stop.begin()
            assert stop.asked() == ""
        with StopRequest(tmp_path) as stop:
            request_stop(tmp_path, "another maintenance")
            stop.begin()
            assert stop.asked() == "another maintenance"

    def test_other_ranks_do_not_read_it(self, tmp_path: Path) -> None:
        with StopRequest() as stop:
            request_stop(tmp_path, "now")
            assert stop.asked() == ""


class TestAskedBefore:
    """A Slurm job may be asked to stop before its ranks are there."""

    @pytest.mark.parametrize(
        ("restart", "job", "asked"), [("2", "7", "SIGUSR1"), ("3", "7", ""), ("2", "8", ""), ("2", "", "")]
    )
    def test_it_is_heard_by_this_start_of_this_job_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: str, job: str, asked: str
    ) -> None:
        (tmp_path / "asked").mkdir()
        (tmp_path / "asked" / "7-2").touch()
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        monkeypatch.setenv("SLURM_JOB_ID", job)
        with StopRequest(tmp_path) as stop:
            assert stop.asked() == asked
        with StopRequest() as stop:
            assert stop.asked() == ""


class TestStopIsForOnesOwnRun:
    """A second submission waits for the lock: what it is asked is not the first one's, which is at work there."""

    @pytest.fixture
    def attempt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """Folder of an attempt whose workers go on until the test ends."""
        ended = threading.Event()

        def fit() -> argparse.Namespace:
            ended.wait(30)
            return argparse.Namespace(return_value={"exit_code": 0})

        monkeypatch.setattr(ray_train, "_folder", lambda run_dir: tmp_path / "attempt")
        monkeypatch.setattr(ray_train, "_trainer", lambda *given: argparse.Namespace(fit=fit))
        monkeypatch.setattr(ray_train, "POLL_S", 0.01)
        (tmp_path / "attempt").mkdir()
        (tmp_path / "lock").write_text("process 1 on a\n")
        threading.Timer(1, ended.set).start()
        yield tmp_path / "attempt"
        ended.set()

    def run(self, run_dir: Path) -> Any:
        stop = Stop()
        stop.asked = "SIGTERM"
        training = Training(parse_recipe({**RAW, "output": str(run_dir)}, "test"), (), None)
        return ray_train._attempt(training, Request(1, 1, Bundle(1, 0)), stop, "auto")

    def test_before_it_holds_the_lock_it_just_ends(self, attempt: Path) -> None:
        (attempt / "started").write_text("")
        assert self.run(attempt.parent) == EXIT_RUN_AGAIN
        assert stop_requested(attempt.parent) == ""

    def test_with_the_lock_its_workers_are_asked(self, attempt: Path) -> None:
        (attempt / "started").write_text("process 1 on a")
        assert self.run(attempt.parent) == 0
        assert stop_requested(attempt.parent) == "SIGTERM"

    def test_after_another_took_the_lock_nobody_is(self, attempt: Path) -> None:
        (attempt / "started").write_text("process 2 on a")
        assert self.run(attempt.parent) == 0
        assert stop_requested(attempt.parent) == ""

    def test_a_worker_says_that_it_holds_the_lock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        said = []

        def train(recipe: Any, **given: Any) -> Outcome:
            said.append(ray_worker.claimed(tmp_path))
            with RunLock(tmp_path) as lock:
                lock.take()
                given["on_claim"]()
                said.append(ray_worker.claimed(tmp_path))
            return Outcome(tmp_path, 1, 1)

        monkeypatch.setattr("lbr_dist.training.run.train", train)
        monkeypatch.setattr(ray_worker, "this_rank", lambda source: Environment(0, 1, 0, 1, None, source))
        (tmp_path / "resume").write_text("auto")
        config = {
            "recipe": {**RAW, "output": str(tmp_path)},
            "allow_change": (),
            "then": None,
            "attempt": str(tmp_path),
            "source": "",
            "here": "/",
        }
        monkeypatch.chdir(tmp_path)
        assert ray_worker.work(config)["exit_code"] == 0
        assert Path.cwd() == Path("/"), "where the driver is"
        assert said[0] == ""
        assert said[1].startswith(f"process {os.getpid()} on ")
        assert ray_worker.is_ours(tmp_path, tmp_path)


class Workers:
    """A worker group as Ray Train's controller has it, its ends told by the test."""

    def __init__(self) -> None:
        self.finished, self.errors = False, dict[int, Exception]()

    def poll_status(self, timeout: float) -> argparse.Namespace:
        return argparse.Namespace(finished=self.finished, errors=self.errors)


class TestResize:
    def at_work(self, folder: Path) -> None:
        (folder / "started").write_text("process 1 on a")
        (folder / "lock").write_text("process 1 on a\n")

    def decide(self, callback: Restarts) -> float:
        began = time.monotonic()
        callback.before_controller_execute_resize_decision(argparse.Namespace(num_workers=3))
        return time.monotonic() - began

    def test_running_workers_save_first(self, tmp_path: Path) -> None:
        heard = []

        def rank_zero() -> None:
            while not stop_requested(tmp_path):
                time.sleep(0.01)
            heard.append(stop_requested(tmp_path))
            request_stop(tmp_path, "")

        thread = threading.Thread(target=rank_zero)
        thread.start()
        self.at_work(tmp_path)
        callback = Restarts(str(tmp_path), str(tmp_path), "auto")
        callback.after_worker_group_training_start(Workers())
        self.decide(callback)
        thread.join(10)
        assert heard == ["a resize to 3 workers"]

    def test_nobody_is_waited_for_at_the_start_or_after_a_failure(self, tmp_path: Path) -> None:
        callback = Restarts(str(tmp_path), str(tmp_path), "auto")
        assert self.decide(callback) < 5
        callback.after_worker_group_training_start(Workers())
        callback.before_controller_execute_failure_decision(None)
        assert self.decide(callback) < 5
        assert stop_requested(tmp_path) == ""

    def test_workers_that_wait_for_another_submissions_run_do_not_stop_it(self, tmp_path: Path) -> None:
        callback = Restarts(str(tmp_path), str(tmp_path), "auto")
        for _ in range(2):  # the second time: workers that held the lock, and others that do not yet
            callback.before_worker_group_start(None)
            (tmp_path / "lock").write_text("process 1 on a\n")
            callback.after_worker_group_training_start(Workers())
            assert self.decide(callback) < 5
            assert stop_requested(tmp_path) == ""
            (tmp_path / "started").write_text("process 1 on a")

    def test_workers_that_do_not_answer_are_not_waited_for_without_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_resize, "WAIT_S", 0.3)
        self.at_work(tmp_path)
        callback = Restarts(str(tmp_path), str(tmp_path), "auto")
        callback.after_worker_group_training_start(Workers())
        assert 0.3 <= self.decide(callback) < 60

    @pytest.mark.parametrize("change", [{"finished": True}, {"errors": {1: RuntimeError("its node is gone")}}])
    def test_a_run_that_ends_meanwhile_is_not_waited_for(self, tmp_path: Path, change: dict[str, Any]) -> None:
        callback, workers = Restarts(str(tmp_path), str(tmp_path), "auto"), Workers()
        self.at_work(tmp_path)
        callback.after_worker_group_training_start(workers)
        threading.Timer(0.5, vars(workers).update, [change]).start()
        assert 0.5 <= self.decide(callback) < 60

    @pytest.mark.parametrize(
        ("resume", "told"),
        [("auto", ["auto"] * 3), ("never", ["never", "auto", "auto"]), ("/step-5", ["/step-5", "/step-5", "auto"])],
    )
    def test_later_workers_go_on_from_the_attempts_own_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str, told: list[str]
    ) -> None:
        newest = [None]
        monkeypatch.setattr(ray_resize, "progress", lambda run_dir: newest[0])
        callback, heard = Restarts(str(tmp_path), str(tmp_path), resume), []
        for checkpoint in (None, None, ("step", 1)):
            newest[0] = checkpoint  # type: ignore[call-overload]
            callback.before_worker_group_start(None)
            heard.append((tmp_path / "resume").read_text())
        assert heard == told
