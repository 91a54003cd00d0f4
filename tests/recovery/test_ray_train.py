"""Stage 1 on a Ray cluster of this machine's own: a killed worker, a signal, and what is left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ranks import run_ranks
from training_runs import make_set, recipe, train_all

from lbr_dist.errors import EXIT_RUN_AGAIN
from lbr_dist.logs import read_rows
from lbr_dist.recipes import parse_recipe, save_recipe
from lbr_dist.training.audit import audit
from lbr_dist.training.checkpoint.listing import list_checkpoints
from lbr_dist.training.checkpoint.weights import iterate_weights

pytestmark = pytest.mark.timeout(900)

PROJECT = Path(__file__).parents[2]
SECRET = "planted-wandb-key-5f1d0c"


class Driver:
    """`python ray_jobs/stage1.py` with two workers, and the processes under it."""

    def __init__(self, folder: Path, raw: dict[str, Any]) -> None:
        self.run, self._log = Path(raw["output"]), folder / f"{len(list(folder.glob('*.log')))}.log"
        self.ray = Path(tempfile.mkdtemp(prefix="lbr-"))  # short: it holds sockets
        file = folder / "recipe.yaml"
        save_recipe(parse_recipe(raw, "test"), file)
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= {"RAY_TMPDIR": str(self.ray), "WANDB_API_KEY": SECRET, "PYTHONPATH": str(PROJECT)}
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(PROJECT / "ray_jobs" / "stage1.py"), str(file), "--num-workers", "2"],
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
            )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *error: object) -> None:
        left = self.processes()
        for process in (*left, self._process):
            process.kill()
        self._process.wait()
        shutil.rmtree(self.ray, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[psutil.Process]:
        return [process for process in self.processes() if "ray::RayTrainWorker" in command(process)]

    def until(self, condition: Callable[[], Any], timeout: float = 300) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert self._process.poll() is None, self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.1)

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.run / "metrics.jsonl") if (self.run / "metrics.jsonl").is_file() else []

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        return self._process.wait(300)

    def output(self) -> str:
        return self._log.read_text(errors="replace")


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]) -> dict[str, Any]:
    folder, model = tmp_path_factory.mktemp("ray"), tiny_model_dir("llama")
    return recipe(
        folder / "run",
        model,
        make_set(folder / "data", model),
        duration={"epochs": 20},
        checkpoint={"every_steps": 3},
        deepspeed="zero3",
        optim={"schedule": "constant", "warmup": 0},  # so that a run cut short has the same steps
        tracking={"wandb_project": "test"},
    )


def test_a_killed_worker_a_signal_and_no_secret_written(tmp_path: Path, raw: dict[str, Any]) -> None:
    """A worker is killed: the run goes on. A signal: it stops with 75. Run again: as if nothing had happened."""
    with Driver(tmp_path, raw) as driver:
        driver.until(lambda: len(driver.rows()) >= 5)
        seen = "\n".join(map(command, driver.processes()))
        assert "ray::RayTrainWorker" in seen
        tokens = [file.read_text() for file in Path(tempfile.gettempdir()).glob("lbr-ray-*/token")]
        assert tokens
        driver.workers()[-1].kill()
        driver.until(lambda: audit_starts(driver.run) == 2)
        before = len(driver.rows())
        driver.until(lambda: len(driver.rows()) > before)
        assert "error: the attempt failed: rank" in driver.output()
        assert "restart 1 of at most 3" in driver.output()
        workers = driver.workers()  # torch's store, where ranks meet, binds every interface
        assert listening([process for process in driver.processes() if process not in workers]) == set()

        driver.signal(signal.SIGUSR1)
        assert driver.wait() == EXIT_RUN_AGAIN, driver.output()
        stopped = re.search(r"stopped by SIGUSR1 after step (\d+)", (driver.run / "log.txt").read_text())
        assert stopped
        assert list_checkpoints(driver.run)[0][0].name == f"step-{int(stopped[1]):06d}"
        secrets = [SECRET, *tokens]
        assert not [secret for secret in secrets if secret in seen]
        assert not [
            file
            for folder in (driver.run, driver.ray, tmp_path)
            for file in folder.rglob("*")
            if file.is_file() and any(secret.encode() in file.read_bytes() for secret in secrets)
        ]

    steps = int(stopped[1]) + 4
    rest = {**raw, "duration": {"steps": steps}}
    with Driver(tmp_path, rest) as driver:
        assert driver.wait() == 0, driver.output()
    calm = {**rest, "output": str(tmp_path / "calm"), "tracking": {}}
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    assert run_ranks(train_all, 2, ranks, [calm], timeout=300)[0][0].get("code") == 0
    found = audit(driver.run)
    assert found.problems == []
    assert (found.steps, found.attempts) == (steps, 3)
    assert [row["loss"] for row in driver.rows()] == [row["loss"] for row in read_rows(tmp_path / "calm/metrics.jsonl")]
    weights = dict(iterate_weights(calm["output"]))
    for name, weight in iterate_weights(driver.run):
        assert torch.equal(weight, weights[name]), name


def test_a_second_submission_that_is_stopped_leaves_the_first_alone(tmp_path: Path, raw: dict[str, Any]) -> None:
    first_run = {**raw, "output": str(tmp_path / "run"), "duration": {"steps": 12}, "tracking": {}}
    with Driver(tmp_path, first_run) as first:
        first.until(lambda: len(first.rows()) >= 3)
        workers = first.workers()
        for worker in workers:
            worker.suspend()
        with Driver(tmp_path, first_run) as second:
            second.until(lambda: "is at work there; waiting" in (second.run / "log.txt").read_text())
            second.signal(signal.SIGTERM)
            assert second.wait() == EXIT_RUN_AGAIN, second.output()
        for worker in workers:
            worker.resume()
        assert first.wait() == 0, first.output()


def test_a_driver_that_is_stopped_before_its_workers_are_there(tmp_path: Path, raw: dict[str, Any]) -> None:
    run = tmp_path / "run"
    with Driver(tmp_path, {**raw, "output": str(run), "tracking": {}}) as driver:
        driver.until(lambda: list(run.glob("ray/*")))
        driver.signal(signal.SIGTERM)
        assert driver.wait() == EXIT_RUN_AGAIN, driver.output()
        assert not driver.rows()


def audit_starts(run: Path) -> int:
    file = run / "audit" / "rank-0.jsonl"
    return file.read_text().count('"start"') if file.is_file() else 0


def listening(processes: list[psutil.Process]) -> set[str]:
    """Addresses other than loopback on which these processes listen."""
    found = set()
    for process in processes:
        try:
            connections = process.net_connections(kind="inet")
        except psutil.Error:
            continue
        found |= {
            connection.laddr.ip
            for connection in connections
            if connection.status == psutil.CONN_LISTEN and not connection.laddr.ip.endswith("127.0.0.1")
        }
    return found - {"::1"}
