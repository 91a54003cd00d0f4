"""The job scripts on a real Slurm cluster of four nodes: whatever happens, it goes on exactly, or says why not.

Every job trains with ZeRO-3, one rank on each of two nodes. The job that meets its time limit needs minutes, most of
them asleep, and runs on n3 and n4 from the start; the other tests have n1 and n2.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import LONG, PROJECT, SCRIPT, SlurmCluster, wait_for
from slurm_place import STEPS, make_place

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]

PREEMPTION = """
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL PriorityTier=10 MaxTime=INFINITE State=UP
"""
SUBNET = "10.213.90"
TWO = ("--nodes=2", "--nodelist=n1,n2", "--time=10", "--signal=B:USR1@30")
SHARED = ("--exclusive=user", "--cpus-per-task=1", "--mem=500")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, place: Path) -> Iterator[SlurmCluster]:
    """All nodes see `full` in the place: 1 MiB, room for a checkpoint and no more."""
    if why := SlurmCluster.missing():
        pytest.skip(why)
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"), "lbrslurm", SUBNET, 18917, nodes=4, extra=PREEMPTION)
    full = place / "full"
    full.mkdir()
    cluster.run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(full))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        cluster.run("umount", str(full))
    assert "lbrslurm" not in cluster.run("ip", "-br", "link")
    assert str(cluster.folder) not in cluster.run("ps", "-eo", "args")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]) -> Path:
    """A folder with a base model, a prepared set, the recipes of both stages, and a Python that can be slowed down."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_model_dir("llama"), folder / "base")
    make_place(folder)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).with_name("with_fault.py")}" "$@"\n')
    python.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def submit(cluster: SlurmCluster, place: Path) -> Callable[..., int]:
    """`sbatch OPTIONS slurm/SCRIPT ARGUMENTS` in the place."""

    def function(script: str, *arguments: str, options: tuple[str, ...] = TWO, **env: str) -> int:
        return cluster.submit(place, script, *arguments, options=options, **{**environment(place), **env})

    return function


def environment(place: Path) -> dict[str, str]:
    python = str(place / "python")
    return {"LBR_HOME": str(PROJECT), "LBR_PYTHON": python, "PYTHON_EXEC": python, "LAUNCHER": "srun"}


@pytest.fixture(scope="module")
def limited(submit: Callable[..., int]) -> int:
    """A job that needs more time than it may have: 112 s of waiting alone, with 105 s at most."""
    options = ("--nodes=2", "--nodelist=n3,n4", "--time=2", "--signal=B:USR1@15")
    return submit("stage1.sh", "one.yaml", "output=runs/limited", options=options, PACE="1.6", LBR_MAX_RESTARTS="20")


@pytest.fixture(scope="module")
def calm(cluster: SlurmCluster, place: Path, submit: Callable[..., int], limited: int) -> Path:
    """The run that nothing happens to; the port that its job looks at first is taken."""
    job = submit("stage1.sh", "one.yaml", options=(*TWO, "--hold"))
    with taken(cluster, "n1", first_port(job)):
        cluster.run("scontrol", "release", str(job))
        cluster.finish(job)
    assert f"meeting at n1:{first_port(job) + 1}" in cluster.log(job)
    return place / "runs" / "one"


def first_port(job: int) -> int:
    return 20_000 + 7 * job * 16


class taken:  # noqa: N801
    """A port of a node that somebody listens on."""

    def __init__(self, cluster: SlurmCluster, node: str, port: int) -> None:
        code = f"import socket, sys; s = socket.create_server(('', {port})); print('up', flush=True); sys.stdin.read()"
        command = ["bash", str(SCRIPT), "exec", node, sys.executable, "-c", code]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=cluster.env, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "up\n"

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=20)  # closes its stdin, at which it ends


def rows(run: Path) -> list[dict[str, Any]]:
    from lbr_dist.logs import read_rows

    file = run / "metrics.jsonl"
    return read_rows(file) if file.is_file() else []


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "slurm.jsonl").read_text().splitlines()]


def assert_same_run(place: Path, run: str, calm: Path) -> None:
    """The loss curve is that of the undisturbed run, digit for digit, and every sample was used as planned."""
    assert [row["loss"] for row in rows(place / "runs" / run)] == [row["loss"] for row in rows(calm)]
    assert "as planned" in audit(place, f"runs/{run}")


def audit(place: Path, run: str) -> str:
    command = [sys.executable, "-m", "lbr_dist", "audit", run]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=LONG, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_to_its_end_although_its_port_is_taken(place: Path, calm: Path) -> None:
    assert len(rows(calm)) == STEPS
    assert [row["event"] for row in history(calm)] == ["start", "end"]
    assert not history(calm)[-1]["requeue"]
    assert "as planned" in audit(place, "runs/one")


def test_the_pipeline_goes_on_from_there(cluster: SlurmCluster, place: Path, calm: Path) -> None:
    """Stage 1 is found complete; stage 2 (torchrun) starts from it; its evaluation and export follow."""
    script = str(PROJECT / "slurm" / "pipeline.sh")
    env = environment(place) | {"LAUNCHER": "torchrun"}
    printed = cluster.run("bash", script, *TWO, "one.yaml", "two.yaml", "model", cwd=place, **env)
    jobs = [int(line.split("job ")[1].split()[0]) for line in printed.splitlines()]
    assert len(jobs) == 3
    for job in jobs:
        cluster.finish(job)
    assert "2 ranks (torchrun)" in cluster.log(jobs[1])
    assert "weights from runs/one" in cluster.log(jobs[1])
    assert "Recall@10" in cluster.log(jobs[2])
    assert (place / "runs" / "two" / "eval" / "eval.json").is_file()
    assert (place / "model" / "modules.json").is_file()
    assert "as planned" in audit(place, "runs/two")


def test_a_preempted_job_whose_node_crashes_later(
    cluster: SlurmCluster, place: Path, submit: Callable[..., int], calm: Path
) -> None:
    run = place / "runs" / "crashed"
    job = submit("stage1.sh", "one.yaml", "output=runs/crashed", PACE="0.1")
    wait_for(lambda: len(rows(run)) >= 25, LONG, lambda: cluster.log(job))
    urgent = ("--partition=urgent", "--nodes=2", "--nodelist=n1,n2", "--exclusive", "--output=/dev/null")
    cluster.run("sbatch", *urgent, "--wrap=true", cwd=place)
    wait_for(lambda: cluster.facts(job)["Restarts"] == "1", LONG, lambda: cluster.log(job))
    wait_for(lambda: len(rows(run)) >= 45, LONG, lambda: cluster.log(job))
    cluster.mini("node-down", "n2")
    wait_for(lambda: cluster.facts(job)["JobState"] == "PENDING", LONG, lambda: cluster.log(job))
    cluster.mini("node-up", "n2")
    facts = cluster.finish(job)
    assert facts["Restarts"] == "2", cluster.log(job)
    assert [row["event"] for row in history(run)] == ["start", "start", "start", "end"]
    steps = [row["step"] for row in history(run)]
    assert steps[0] < 20 <= steps[1] < 40 <= steps[2] < steps[3] == STEPS
    assert_same_run(place, "crashed", calm)


def test_two_jobs_at_once_on_the_same_nodes(
    cluster: SlurmCluster, place: Path, submit: Callable[..., int], calm: Path
) -> None:
    """By both launchers; the one, whose every Python is in a container, is asked to stop in mid-run and goes on.

    The container is a mount namespace behind a command line of Apptainer's form.
    """
    box = place / "box"
    box.write_text('#!/bin/sh\necho "$*" >>"$0.log"\nshift 2\nexec unshare --mount "$@"\n')
    box.chmod(0o755)
    jobs = {
        launcher: submit(
            *("stage1.sh", "one.yaml", f"output=runs/{launcher}"),
            options=(*TWO, *SHARED),
            **{"PACE": "0.1", "LAUNCHER": launcher, "LBR_CONTAINER": container},
        )
        for launcher, container in (("srun", ""), ("torchrun", f"{box} exec image.sif"))
    }
    wait_for(lambda: len(rows(place / "runs" / "torchrun")) >= 5, LONG, lambda: cluster.log(jobs["torchrun"]))
    assert {cluster.facts(job)["JobState"] for job in jobs.values()} == {"RUNNING"}
    cluster.run("scancel", "--batch", "--signal=USR1", str(jobs["torchrun"]))
    for launcher, job in jobs.items():
        cluster.finish(job)
        assert_same_run(place, launcher, calm)
    first, second = history(place / "runs" / "torchrun")[1], history(place / "runs" / "torchrun")[2]
    assert (first["code"], first["requeue"]) == (75, True)
    assert second["step"] == first["step"] > 0
    entered = Path(f"{box}.log").read_text().splitlines()
    assert all(line.startswith(f"exec image.sif {place / 'python'} ") for line in entered)
    assert sum("lbr_dist.launch.torchrun" in line for line in entered) == 4  # two starts on two nodes


def test_ray_in_the_allocation(cluster: SlurmCluster, place: Path, submit: Callable[..., int], calm: Path) -> None:
    """Asked to stop in mid-run, it is requeued and goes on."""
    run = place / "runs" / "ray"
    job = submit("stage1.sh", "one.yaml", "output=runs/ray", LAUNCHER="ray", LBR_PYTHON=sys.executable)
    wait_for(lambda: len(rows(run)) >= 5, LONG, lambda: cluster.log(job))
    for number in (1, 2):
        sockets = cluster.listening(f"n{number}")
        assert len(sockets) > 5
        assert {name.rpartition(":")[0] for name in sockets} == {f"{SUBNET}.{number}", "127.0.0.1"}, sockets
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    facts = cluster.finish(job)
    assert facts["Restarts"] == "1"
    assert [row.get("code") for row in history(run)] == [None, 75, None, 0]
    assert "2 ranks (ray" in cluster.log(job)
    assert_same_run(place, "ray", calm)


def test_ray_on_one_node_is_on_loopback(cluster: SlurmCluster, place: Path, submit: Callable[..., int]) -> None:
    run = place / "runs" / "alone"
    options = ("--nodes=1", "--nodelist=n1", "--time=10")
    job = submit(
        "stage1.sh", "one.yaml", "output=runs/alone", options=options, LAUNCHER="ray", LBR_PYTHON=sys.executable
    )
    wait_for(lambda: len(rows(run)) >= 5, LONG, lambda: cluster.log(job))
    sockets = cluster.listening("n1")
    cluster.run("scancel", str(job))
    cluster.wait(job)
    ray = [name for name, process in sockets.items() if "RayTrainWo" not in process]  # ranks meet at their host's name
    assert len(ray) > 5
    assert {name.rpartition(":")[0] for name in ray} == {"127.0.0.1"}, sockets


def test_mistakes_end_the_job(cluster: SlurmCluster, place: Path, submit: Callable[..., int], calm: Path) -> None:
    one = (*TWO, *SHARED)
    typo = submit("stage1.sh", "one.yaml", "optim.lrr=1", options=one)
    stage = submit("stage1.sh", "two.yaml", options=one)
    nowhere = submit("stage1.sh", "three.yaml", options=one)
    wild = submit("stage1.sh", "one.yaml", "output=runs/wild", "optim.lr=1e30", "optim.warmup=0", options=one)
    with taken(cluster, "n1", 29_500):
        port = submit("stage1.sh", "one.yaml", "output=runs/port", options=one, MASTER_PORT="29500")
        cluster.refuse(port, "MASTER_PORT=29500: taken on n1")
    cluster.refuse(typo, "unknown key optim.lrr; did you mean optim.lr?")
    cluster.refuse(stage, "stage is contrastive: submit slurm/stage2.sh")
    cluster.refuse(nowhere, "recipe three.yaml: no such file")
    cluster.refuse(wild, "lower optim.lr, or set on_nan=skip")  # the loss was not a number
    assert [row.get("requeue") for row in history(place / "runs" / "wild")] == [None, False]


def test_data_is_prepared_by_a_job(cluster: SlurmCluster, place: Path, submit: Callable[..., int]) -> None:
    """Twice: the second finds the set made. A mistake is not repeated."""
    source = place / "rows.jsonl"
    rows = [{"id": f"r{i}", "question": f"What of {i}?", "answer": f"measles {i} times"} for i in range(50)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("rows.jsonl", "--out", "prepared", "--tokenizer", "base")
    one = ("--nodes=1", "--nodelist=n1", "--time=10", *SHARED)
    for said in ("50 rows", "up to date"):
        job = submit("prepare.sh", *arguments, options=one)
        cluster.finish(job)
        assert said in cluster.log(job)
    bad = submit("prepare.sh", "nowhere.jsonl", *arguments[1:], options=one)
    cluster.refuse(bad, "nowhere.jsonl")


def test_a_crash_loop_stops(cluster: SlurmCluster, place: Path, submit: Callable[..., int], calm: Path) -> None:
    job = submit("stage1.sh", "one.yaml", "output=runs/loop", CRASH="1", LBR_MAX_RESTARTS="1")
    facts = cluster.wait(job)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "1")
    assert "2 starts without a new checkpoint" in cluster.log(job)
    assert [row.get("requeue") for row in history(place / "runs" / "loop")] == [None, True, None, False]


def test_a_full_and_a_read_only_file_system(
    cluster: SlurmCluster, place: Path, submit: Callable[..., int], calm: Path
) -> None:
    """The disk fills up in mid-run, on all nodes; then a folder can be read only."""
    for node in ("n1", "n2"):
        cluster.on(node, "mkdir", "-p", str(place / "locked"))
        cluster.on(node, "mount", "--bind", str(place / "locked"), str(place / "locked"))
        cluster.on(node, "mount", "-o", "remount,ro,bind", str(place / "locked"))
    locked = submit("stage1.sh", "one.yaml", "output=locked/run")
    cluster.refuse(locked, "cannot be written on n1: Read-only file system")
    full = submit("stage1.sh", "one.yaml", "output=full/run")
    facts = cluster.wait(full)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0"), cluster.log(full)
    assert "No space left on device" in cluster.log(full)


def test_a_node_that_does_not_see_the_shared_folder(
    cluster: SlurmCluster, place: Path, submit: Callable[..., int], calm: Path
) -> None:
    runs = place / "hidden"
    runs.mkdir()
    cluster.on("n2", "mount", "-t", "tmpfs", "tmpfs", str(runs))
    try:
        job = submit("stage1.sh", "one.yaml", "output=hidden/run")
        cluster.refuse(job, f"bad: n2: {runs / 'run'} does not exist")
        checked = check(cluster, place, "n1,n2", "--shared", str(runs))
        assert checked.returncode == 2
        assert f"bad: n2: {runs} is not the same folder as on the first node" in checked.stdout
    finally:
        cluster.on("n2", "umount", str(runs))


def test_check_measures_every_pair_and_names_the_bad_node(cluster: SlurmCluster, place: Path, calm: Path) -> None:
    """Then n2's link loses its speed."""
    printed = ""

    def good() -> bool:  # pairs share this machine's cores: one may look slow for want of them
        nonlocal printed
        done = check(cluster, place, "n1,n2,n3")
        printed = done.stdout
        return done.returncode == 0

    wait_for(good, LONG, lambda: printed)
    assert "3 nodes: all answer, see the same" in printed
    assert [line.split()[0] for line in printed.splitlines()[1:4]] == ["n1", "n2", "n3"]
    cluster.on(
        "n2", "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "200mbit", "burst", "1mb", "latency", "50ms"
    )
    try:
        slow = check(cluster, place, "n1,n2,n3")
    finally:
        cluster.on("n2", "tc", "qdisc", "del", "dev", "eth0", "root")
    assert slow.returncode == 2
    assert "bad: n2: all-reduce with every other node is bad" in slow.stdout


def check(cluster: SlurmCluster, place: Path, nodes: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    count = str(len(nodes.split(",")))
    options = [
        "--nodes",
        count,
        "--nodelist",
        nodes,
        "--ntasks-per-node=1",
        "--mem=100",
        "--overcommit",
        "--oversubscribe",
    ]
    command = ["srun", *options, sys.executable, "-m", "lbr_dist", "slurm", "check", *arguments]
    env = {**cluster.env, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=LONG, check=False)


def test_the_time_limit(cluster: SlurmCluster, place: Path, limited: int, calm: Path) -> None:
    facts = cluster.finish(limited)
    run = place / "runs" / "limited"
    starts = [row for row in history(run) if row["event"] == "start"]
    assert int(facts["Restarts"]) == len(starts) - 1 >= 1
    assert "stopped by SIGUSR1 after step" in cluster.log(limited)
    assert_same_run(place, "limited", calm)
    if "not stopped in time" not in cluster.log(limited):  # on a machine so busy that a stop takes longer than 15 s
        assert "0 steps done again" in audit(place, "runs/limited")
