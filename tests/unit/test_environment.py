from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from lbr_dist.environment import (
    Environment,
    SlurmStart,
    detect,
    hosts,
    job_port,
    lost_contact,
    out_of_memory,
    slurm_start,
)
from lbr_dist.errors import UserError
from lbr_dist.launch.ports import PORTS
from lbr_dist.training.engine import start_distributed

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = {
    "SLURM_JOB_ID": "40017",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "64",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def test_nothing_set_is_a_single_process() -> None:
    assert detect({}) == Environment(0, 1, 0, 1, None, "single process")


def test_torchrun() -> None:
    assert detect(TORCHRUN) == Environment(3, 8, 1, 2, ("node7", 29500), "torchrun")


def test_torchrun_wins_over_the_slurm_step_it_runs_in() -> None:
    assert detect({**SRUN, **TORCHRUN}).source == "torchrun"


def test_srun() -> None:
    assert detect(SRUN) == Environment(5, 8, 1, 4, ("gpu03", 24_017), "srun, job 40017")


def test_the_ranks_of_a_step_meet_below_the_ephemeral_ports() -> None:
    assert {job_port(job) for job in range(50_000)} == set(PORTS)


def test_srun_takes_a_given_meeting_point() -> None:
    assert detect({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}).master == ("10.0.0.1", 1234)


@pytest.mark.parametrize("step", [None, "", str(2**32 - 5), str(2**32 - 2)])
def test_a_batch_script_is_no_step(step: str | None) -> None:
    environ = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}
    assert detect(environ | ({} if step is None else {"SLURM_STEP_ID": step})).source == "single process"


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_variables_are_named(missing: str) -> None:
    environ = {key: value for key, value in TORCHRUN.items() if key != missing}
    with pytest.raises(UserError, match=f"not {missing}"):
        detect(environ)


def test_nonsense_is_named() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE='many' is not a number"):
        detect({**TORCHRUN, "WORLD_SIZE": "many"})
    with pytest.raises(UserError, match="SLURM_STEP_ID='batch' is not a number"):
        detect({**SRUN, "SLURM_STEP_ID": "batch"})
    with pytest.raises(UserError, match=r"rank 8 is outside of 0\.\.7"):
        detect({**TORCHRUN, "RANK": "8"})


@pytest.mark.parametrize("environ", [TORCHRUN, SRUN])
@pytest.mark.parametrize(("port", "words"), [("abc", "is not a number"), ("99999", "is no port"), ("0", "is no port")])
def test_a_port_that_is_none_is_named(environ: dict[str, str], port: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"^environment: MASTER_PORT='?{port}'? {words}"):
        detect({**environ, "MASTER_PORT": port})


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("n1", ["n1"]),
        ("a,b", ["a", "b"]),
        ("gpu[03-05,9]-ib,login", ["gpu03-ib", "gpu04-ib", "gpu05-ib", "gpu9-ib", "login"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_node_lists(nodes: str, names: list[str]) -> None:
    assert hosts(nodes) == names
    assert detect({**SRUN, "SLURM_STEP_NODELIST": nodes}).master == (names[0], 24_017)


@pytest.mark.parametrize("nodes", ["n[1-2", "n[5-3]"])
def test_a_strange_node_list_is_refused(nodes: str) -> None:
    with pytest.raises(UserError, match="node list"):
        hosts(nodes)


@pytest.mark.parametrize(
    ("environ", "start"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, SlurmStart(7, 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": ""}, SlurmStart(7, 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, SlurmStart(7, 2)),
        ({"SLURM_JOB_ID": "x"}, None),
    ],
)
def test_which_start_of_a_job(environ: dict[str, str], start: SlurmStart | None) -> None:
    assert slurm_start(environ) == start


def started(monkeypatch: pytest.MonkeyPatch, environment: Environment, devices: int) -> tuple[torch.device, str]:
    """The device and LOCAL_RANK that a rank gets on a machine with GPUs."""
    for name, value in {"is_available": True, "device_count": devices, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(os, "environ", {})
    return start_distributed(environment, 60), os.environ["LOCAL_RANK"]


def test_deepspeed_gets_the_number_of_the_rank_s_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun, srun = Environment(6, 8, 2, 4, ("n", 1), "torchrun"), Environment(6, 8, 2, 4, ("n", 1), "srun, job 7")
    assert started(monkeypatch, torchrun, 4) == (torch.device("cuda", 2), "2")
    assert started(monkeypatch, srun, 1) == (torch.device("cuda", 0), "0")  # --gpus-per-task=1


@pytest.mark.parametrize(("devices", "source"), [(2, "srun, job 7"), (2, "torchrun"), (1, "lbr --nproc 4")])
def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, devices: int, source: str) -> None:
    with pytest.raises(UserError, match=rf"^{source}: 4 ranks on this machine, but {devices} GPU.*start one rank"):
        started(monkeypatch, Environment(2, 4, 2, 4, ("n", 1), source), devices)


def test_ranks_may_meet_at_an_ipv6_address(monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict[str, Any]()
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **more: given.update(more))
    monkeypatch.setattr(os, "environ", {})
    start_distributed(Environment(0, 2, 0, 2, ("fd00::7", 29500), "env://"), 60)
    meeting = urlsplit(given["init_method"])
    assert (meeting.hostname, meeting.port) == ("fd00::7", 29500)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:17"), True),
        (RuntimeError("[enforce fail at /b/third_party/gloo/gloo/context.cc:27] size > 0. "), True),
        (RuntimeError("not committed: [/b/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting"), True),
        (torch.distributed.DistNetworkError("The server socket has failed to listen"), True),
        (RuntimeError("[/data/gloom/run, /data/gloo/run]: Input/output error"), False),
    ],
)
def test_which_errors_are_of_a_rank_that_is_gone(error: RuntimeError, lost: bool) -> None:
    """A run folder may be called as a library is."""
    assert lost_contact(error) is lost


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (torch.distributed.DistBackendError("NCCL error. Last error:\nCuda failure 2 'out of memory'"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: not enough memory: you tried"), True),
        (MemoryError(), True),
        (RuntimeError("/out of memory/run: Input/output error"), False),
    ],
)
def test_which_errors_are_of_memory(error: RuntimeError | MemoryError, short: bool) -> None:
    assert out_of_memory(error) is short
