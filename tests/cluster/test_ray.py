"""Jobs on a real Ray cluster of three nodes, each in a network and process table of its own.

A killed worker, a lost node and its return: the run goes on by itself, with the samples and losses of a run that
nothing happened to. It is held at chosen steps (`ray_gate`), so nothing depends on how fast this machine is.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import PROJECT, SlurmCluster, wait_for

from lbr_dist.launch.ray_cluster import make_token
from lbr_dist.launch.ray_resize import WAIT_S
from lbr_dist.logs import read_rows
from lbr_dist.recipes import parse_recipe, save_recipe
from lbr_dist.training.audit import audit

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

STEPS = 24
SUBNET = "10.213.88"
HEAD = f"{SUBNET}.1"
PORTS = {
    "metrics-export-port": 8080,
    "dashboard-agent-grpc-port": 8081,
    "dashboard-agent-listen-port": 8082,
    "runtime-env-agent-port": 8083,
}
"""Chosen by Ray, they must be reported within 15 s of a node's start, else it ends; the third in any case."""
QUICK = {
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_metrics_report_interval_ms": "3000",
    "RAY_worker_niceness": "0",
}
"""A lost node is noticed within seconds, and workers get their share of a busy machine."""


class RayCluster:
    """Ray on the nodes of a mini_slurm cluster."""

    def __init__(self, nodes: SlurmCluster, folder: Path) -> None:
        self.nodes, self.folder = nodes, folder
        (folder / "gate").mkdir()
        self.hold(STEPS)
        self.env = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{PROJECT}:{Path(__file__).parent}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(make_token(folder / "token")),
            "RAY_ADDRESS": f"{HEAD}:6379",
            "LBR_TEST_GATE": str(folder / "gate"),
            **QUICK,
        }

    def start(self, node: str) -> None:
        head = ["--head", "--port=6379", f"--node-ip-address={HEAD}"]
        self.on(
            node,
            *("python", "-m", "lbr_dist", "ray", "start"),
            *(head if node == "n1" else [f"--address={HEAD}:6379"]),
            *(f"--{name}={port}" for name, port in PORTS.items()),
            "--num-cpus=1",
            "--num-gpus=0",
            "--object-store-memory=80000000",
            timeout=180,
            RAY_ADDRESS="",
        )

    def on(self, node: str, *command: str, timeout: float = 60, **env: str) -> str:
        given = [f"{key}={value}" for key, value in {**self.env, **env}.items() if value]
        return self.nodes.on(node, "env", "-u", "RAY_ADDRESS", *given, *command, timeout=timeout)

    def begin(self, log: Path, *command: str) -> subprocess.Popen[bytes]:
        """Run a command on the head node in the background."""
        given = [f"{key}={value}" for key, value in self.env.items()]
        script = str(Path(__file__).with_name("mini_slurm.sh"))
        with log.open("wb") as output:
            return subprocess.Popen(
                ["bash", script, "exec", "n1", "env", *given, *command],
                env=self.nodes.env,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=PROJECT,
            )

    def drive(self, *arguments: str, driver: str = "stage1") -> tuple[int, str]:
        """A driver on the head node, as a plain script; exit code and output."""
        log = self.folder / "driver.log"
        process = self.begin(log, "python", f"{PROJECT}/ray_jobs/{driver}.py", *arguments)
        try:
            return process.wait(300), log.read_text(errors="replace")
        finally:
            process.kill()

    def hold(self, step: int) -> None:
        """Let the run finish this step and no later one."""
        temporary = self.folder / "gate" / "until.tmp"
        temporary.write_text(str(step))
        temporary.replace(self.folder / "gate" / "until")

    def kill_worker(self, node: str) -> None:
        self.on(node, "pkill", "-9", "-f", "ray::RayTrainWorker")

    def lose(self, node: str) -> None:
        self.nodes.mini("node-down", node)

    def recover(self, node: str) -> None:
        self.nodes.mini("node-up", node)
        self.start(node)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    if why := SlurmCluster.missing():
        pytest.skip(why)
    nodes = SlurmCluster(tmp_path_factory.mktemp("mray"), "mray", SUBNET, 18817, nodes=3)
    try:
        nodes.start()
        cluster = RayCluster(nodes, tmp_path_factory.mktemp("ray"))
        cluster.start("n1")
        with ThreadPoolExecutor() as pool:
            list(pool.map(cluster.start, ("n2", "n3")))
        yield cluster
    finally:
        nodes.stop()
    assert "mray" not in nodes.run("ip", "-br", "link")


@pytest.fixture(scope="module")
def recipe(ray: RayCluster, tiny_model_dir: Callable[..., Path]) -> Callable[..., Path]:
    """Factory: `recipe(name, **sections)` writes the recipe of a run `runs/name`."""
    from lbr_dist.data.record import Record
    from lbr_dist.data.shard_writer import write_set
    from lbr_dist.model.tokenizer import Tokenization

    model, data = tiny_model_dir("llama"), ray.folder / "data"
    data.mkdir()
    records = [Record(id=f"g:{i}", question=f"fever and rash {i}", answer="measles " * (1 + i % 7)) for i in range(120)]
    splits = {"gl": records[:100], "cl": records[100:110], "eval": records[110:]}
    write_set(data, splits, Tokenization.load(str(model)), name="tiny", shard_records=40)

    def write(name: str, **sections: Any) -> Path:
        raw: dict[str, Any] = {
            "stage": "generative",
            "output": str(ray.folder / "runs" / name),
            "model": {"path": str(model)},
            "data": {
                "sets": [{"path": str(data)}],
                "bin_tokens": 160,
                "max_x_tokens": 60,
                "max_y_tokens": 90,
                "workers": 0,
            },
            "bottleneck": {"tokens": 2},
            "batch": {"global_batch": 4},
            "optim": {"lr": 3e-3},
            "duration": {"steps": STEPS},
            "checkpoint": {"every_steps": 2},
            "deepspeed": "zero3",
            **sections,
        }
        file = ray.folder / f"{name}.yaml"
        save_recipe(parse_recipe(raw, name), file)
        return file

    return write


def rows(run: Path) -> list[dict[str, Any]]:
    return read_rows(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []


def starts(run: Path) -> list[dict[str, Any]]:
    """Where each start began and how many ranks it had, from rank 0's audit log."""
    lines = (run / "audit" / "rank-0.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "start" in row]


@pytest.fixture(scope="module")
def calm(ray: RayCluster, recipe: Callable[..., Path]) -> list[dict[str, Any]]:
    """Metrics of a run that nothing happens to."""
    code, output = ray.drive(str(recipe("calm")), "--num-workers", "1")
    assert code == 0, output
    return rows(ray.folder / "runs" / "calm")


def test_a_killed_worker_a_lost_node_and_its_return(
    ray: RayCluster, recipe: Callable[..., Path], calm: list[dict[str, Any]]
) -> None:
    """Scenario 4, and once more, but that rank 0 is killed while it is asked to save before the run grows."""
    run, log = ray.folder / "runs" / "held", ray.folder / "job.log"
    ray.hold(5)
    job = ray.begin(
        log,
        *("ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", "."),
        *("--runtime-env-json", json.dumps({"worker_process_setup_hook": "ray_gate.install"}), "--"),
        *("python", "ray_jobs/stage1.py", str(recipe("held")), "--num-workers", "2:3"),
    )

    def until(step: int, starts_: int, timeout: float = 240) -> None:
        def reached() -> bool:
            assert job.poll() is None, log.read_text(errors="replace")
            return len(rows(run)) >= step and len(starts(run)) == starts_

        wait_for(reached, timeout, lambda: log.read_text(errors="replace")[-6000:])

    try:
        until(5, 1)
        meeting = re.search(r"3 ranks \(ray, job \w+\), meeting at ([\d.]+):", (run / "log.txt").read_text())
        rank_zero = re.search(r"\(ip=([\d.]+), pid=\d+\) world_rank=0", log.read_text(errors="replace"))
        assert meeting
        assert rank_zero
        assert meeting[1] == rank_zero[1]
        assert_metrics(ray, run)
        ray.kill_worker("n2")
        ray.hold(9)
        until(9, 2)
        ray.lose("n3")
        ray.hold(13)
        until(13, 3)
        ray.recover("n3")
        wait_for(lambda: len(starts(run)) == 4, 240, lambda: log.read_text(errors="replace")[-6000:])
        ray.hold(17)
        until(17, 4)
        ray.lose("n3")
        ray.hold(19)
        until(19, 5)
        (ray.folder / "gate" / "deaf").touch()
        ray.recover("n3")
        wait_for(lambda: (run / "stop").read_text() == "a resize to 3 workers", 120, lambda: log.read_text()[-6000:])
        address = re.findall(rf"meeting at {SUBNET}\.(\d)", (run / "log.txt").read_text())[-1]
        ray.kill_worker(f"n{address}")  # rank 0, which was asked
        (ray.folder / "gate" / "deaf").unlink()
        wait_for(lambda: len(starts(run)) == 6, min(240, WAIT_S - 1), lambda: log.read_text(errors="replace")[-6000:])
        ray.hold(STEPS)
        assert job.wait(240) == 0, log.read_text(errors="replace")[-6000:]
    finally:
        job.kill()
        ray.hold(STEPS)

    found = starts(run)
    assert [row["world"] for row in found] == [3, 3, 2, 3, 2, 3]
    assert [row["start"] for row in [*found[:3], *found[4:]]] == [0, 4, 8, 16, 18]  # the newest committed checkpoint
    assert found[3]["start"] in (14, 15), "the return of a node costs no step: the run saved before it grew"
    result = audit(run)
    assert result.problems == []
    assert result.steps == STEPS
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    for row, expected in zip(rows(run), calm, strict=True):
        assert math.isclose(row["loss"], expected["loss"], rel_tol=1e-4), (row, expected)


def assert_metrics(ray: RayCluster, run: Path) -> None:
    """The run's numbers are where Ray's dashboard and Prometheus get them; rank 0's node exports them."""
    address = re.findall(rf"meeting at ({SUBNET}\.\d)", (run / "log.txt").read_text())[-1]
    look = f"import urllib.request; print(urllib.request.urlopen('http://{address}:{PORTS['metrics-export-port']}/metrics').read().decode())"
    wait_for(
        lambda: re.search(rf'ray_lbr_loss{{[^}}]*run="{run}"', ray.on("n1", "python", "-c", look)),
        90,
        lambda: "no ray_lbr_loss",
    )


def test_what_cannot_work_is_said_at_once(ray: RayCluster, recipe: Callable[..., Path]) -> None:
    """Scenario 5, on Ray: exit code 2. What a worker finds, here a loss that is not a number, is not tried again."""
    code, output = ray.drive(str(recipe("wide")), "--num-workers", "9", "--cpus-per-worker", "2")
    assert code == 2, output
    assert f"--num-workers 9 of 2 CPUs each: the cluster at {HEAD}:6379 has room for 0" in output
    assert f"{HEAD}: 1 CPU, 0 GPUs" in output

    wild = {"lr": 1e30, "warmup": 0}
    code, output = ray.drive(str(recipe("wild", optim=wild)), "--num-workers", "1")
    assert code == 2, output
    assert "lower optim.lr, or set on_nan=skip" in output
    assert "restart 1 of" not in output


def test_the_whole_path_as_one_job(ray: RayCluster, recipe: Callable[..., Path]) -> None:
    one = recipe("one", duration={"steps": 4}, bottleneck={"tokens": 1})
    two = recipe(
        "two",
        stage="contrastive",
        batch={"global_batch": 8, "micro_tokens": 160},
        duration={"steps": 2},
        bottleneck={"tokens": 1},
    )
    for again in (False, True):
        code, output = ray.drive(str(one), str(two), "--num-workers", "1", "--generate", "2", driver="pipeline")
        assert code == 0, output
        assert output.count("has all its steps already") == 2 * again
    run = ray.folder / "runs" / "two"
    assert f"weights from {ray.folder / 'runs' / 'one'}" in (run / "log.txt").read_text()
    assert json.loads((run / "eval" / "eval.json").read_text())["models"][0]["retrieval"]
    assert (run / "model" / "modules.json").is_file()
    assert audit(run).problems == []


def test_data_as_jobs(ray: RayCluster, tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    """Prepared, mined and encoded on the nodes, each a submitted job; the bytes are those of one machine."""
    rng, source, model = random.Random(0), ray.folder / "rows.jsonl", str(tiny_model_dir("llama"))
    answers = [" ".join(rng.choices(["fever", "rash", "aspirin", "heart", "measles"], k=8)) for _ in range(150)]
    rows = [{"id": f"r{i}", "question": f"What of {i}?", "answer": f"{answer} {i}"} for i, answer in enumerate(answers)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def data(place: Path, run: Callable[..., None]) -> dict[str, bytes]:
        place.mkdir(exist_ok=True)
        encoder = f"hf:{model}?pooling=mean"
        small = ("--name", "rows", "--shard-records", "40")
        run("prepare", str(source), "--out", str(place / "set"), "--tokenizer", model, *small)
        run("mine", encoder, str(place / "set"), "--out", str(place / "mined"), "--device", "cpu", "--share", "2")
        run("encode", encoder, str(source), str(place / "vectors.parquet"), "--device", "cpu")
        return {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()}

    def here(command: str, *arguments: str) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many threads as a worker has: sums are the same to the bit
        subprocess.run([sys.executable, "-m", "lbr_dist", command, *arguments], check=True, timeout=300, env=env)

    def there(command: str, *arguments: str) -> None:
        log = ray.folder / f"{command}.log"
        submit = ("ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", ".", "--")
        workers = "3" if command == "prepare" else "2"
        job = ray.begin(log, *submit, "python", f"ray_jobs/{command}.py", *arguments, "--num-workers", workers)
        try:
            assert job.wait(300) == 0, log.read_text(errors="replace")
        finally:
            job.kill()

    expected = data(tmp_path / "here", here)
    found = data(ray.folder / "there", there)
    assert len(expected) > 10
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def test_jobs_at_once_and_a_stop_with_a_file(
    ray: RayCluster, recipe: Callable[..., Path], calm: list[dict[str, Any]]
) -> None:
    """Scenario 6, on Ray: two jobs, one of which an operator stops."""
    jobs = {}
    for name, steps in (("left", STEPS), ("stopped", 100_000)):
        log, file = ray.folder / f"{name}.log", recipe(name, duration={"steps": steps})
        command = ("python", f"{PROJECT}/ray_jobs/stage1.py", str(file), "--num-workers", "1")
        jobs[name] = (ray.folder / "runs" / name, log, ray.begin(log, *command))
    try:
        run, log, job = jobs["stopped"]
        wait_for(lambda: len(rows(run)) >= 2, 240, lambda: log.read_text(errors="replace"))
        (run / "stop").write_text("maintenance")
        assert job.wait(120) == 75, log.read_text(errors="replace")
        assert "stopped by maintenance after step" in (run / "log.txt").read_text()
        run, log, job = jobs["left"]
        assert job.wait(300) == 0, log.read_text(errors="replace")
    finally:
        for _, _, job in jobs.values():
            job.kill()
    assert audit(run).problems == []
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in calm]


def test_the_cluster_is_locked(ray: RayCluster) -> None:
    """Every port is on the node's address, the dashboard, which takes jobs, on loopback; the token is asked for."""
    for number in (1, 2, 3):
        sockets = ray.nodes.listening(f"n{number}")
        assert len(sockets) > 5
        assert {name.rpartition(":")[0] for name in sockets} == {f"{SUBNET}.{number}", "127.0.0.1"}, sockets
    sockets = ray.nodes.listening("n1")
    assert {f"{HEAD}:6379", "127.0.0.1:8265"} <= sockets.keys()
    assert f"{HEAD}:8265" not in sockets
    assert ray.on("n1", "ray", "job", "list", "--address", "http://127.0.0.1:8265")
    with pytest.raises(AssertionError, match=r"(?i)auth|token"):
        ray.on("n1", "ray", "job", "list", "--address", "http://127.0.0.1:8265", RAY_AUTH_MODE="disabled")
    wrong = make_token(ray.folder / "wrong")
    code, output = drive_with(ray, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert code == 2, output
    assert "no cluster answers there, or not to this token" in output


def drive_with(ray: RayCluster, **env: str) -> tuple[int, str]:
    before = ray.env
    ray.env = {**before, **env}
    try:
        return ray.drive("stage1", "output=/nowhere", "--num-workers", "1")
    finally:
        ray.env = before
