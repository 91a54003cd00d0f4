"""Which rank this process is, whoever started it: torchrun, Ray, `lbr train --nproc`, srun, or nobody.

All of them describe the same six numbers in environment variables of their own. They are read here, once and without
torch, so that a wrong launch is refused before anything slow is imported. So is what tells that another rank is gone,
or that there is no more memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lbr_dist.errors import UserError

_ENV = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_BATCH_STEP = 4_294_967_290
"""Slurm's ids from here on are the batch script and other steps that srun did not start."""
_GLOO = re.compile(r"\[[^\]]*\bgloo/[^\]]*\.(cc|h):\d+\]")
"""The line of gloo's source with which its errors begin, wherever it is quoted."""
_NO_MEMORY = re.compile(
    r"CUDA( error:)? out of memory|Cuda failure 2 'out of memory'|"
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|unable to mmap .*Cannot allocate memory"
)
"""How torch and NCCL say it in errors of a general kind."""


@dataclass(frozen=True)
class Environment:
    """This process among the ranks of the run."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    master: tuple[str, int] | None
    """Host and port where the ranks meet; None: there is only this one."""
    source: str
    """Who said so."""

    @property
    def meeting(self) -> str:
        """`master` as host:port, an IPv6 address in brackets; "": there is none."""
        if self.master is None:
            return ""
        host, port = self.master
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def describe(self) -> str:
        """One line for the log."""
        meeting = f", meeting at {self.meeting}" if self.master else ""
        return f"{self.world} rank{'s' if self.world > 1 else ''} ({self.source}){meeting}"


def detect(environ: Mapping[str, str] | None = None) -> Environment:
    """Read the environment.

    Raises:
        UserError: the variables are incomplete or contradict each other.
    """
    environ = os.environ if environ is None else environ
    if "RANK" in environ or "WORLD_SIZE" in environ:
        found = _from_env(environ)
    elif environ.get("SLURM_STEP_ID") and _number(environ, "SLURM_STEP_ID") < _BATCH_STEP:
        found = _from_slurm(environ)
    else:
        return Environment(0, 1, 0, 1, None, "single process")
    if not 0 <= found.rank < found.world:
        raise UserError(f"{found.source}: rank {found.rank} is outside of 0..{found.world - 1}: check the launcher")
    return found


def lost_contact(error: RuntimeError) -> bool:
    """Whether an error of a collective call means that another rank is gone, or never came."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or _GLOO.search(str(error)) is not None


def out_of_memory(error: Exception) -> bool:
    """Whether an error is of memory that does not suffice: a GPU's, or the host's."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY.search(str(error)) is not None


def _from_env(environ: Mapping[str, str]) -> Environment:
    missing = [name for name in _ENV if name not in environ]
    if missing:
        given = ", ".join(name for name in _ENV if name in environ)
        raise UserError(
            f"environment: {given} set, but not {', '.join(missing)}: start with torchrun, srun or `--nproc`, "
            f"or unset {given}"
        )
    world = _number(environ, "WORLD_SIZE")
    rank = _number(environ, "RANK")
    source = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else environ.get("LBR_LAUNCHER", "env://")
    return Environment(
        rank,
        world,
        _number(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else rank,
        _number(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else world,
        (environ["MASTER_ADDR"], _port(environ)),
        source,
    )


def _from_slurm(environ: Mapping[str, str]) -> Environment:
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"):
        if name not in environ:
            raise UserError(f"srun: {name} is not set: start the ranks with srun from inside the job")
    world = _number(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS")
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost"
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(world)
    try:
        address = environ.get("MASTER_ADDR") or hosts(nodes)[0]
    except UserError as error:
        raise UserError(f"srun: {error}: set MASTER_ADDR") from None
    port = _port(environ) if "MASTER_PORT" in environ else job_port(_number(environ, "SLURM_JOB_ID"))
    return Environment(
        _number(environ, "SLURM_PROCID"),
        world,
        _number(environ, "SLURM_LOCALID"),
        int(re.match(r"\d+", tasks).group()) if re.match(r"\d+", tasks) else world,  # type: ignore[union-attr]
        (address, port) if world > 1 else None,
        f"srun, job {environ['SLURM_JOB_ID']}",
    )


@dataclass(frozen=True, order=True)
class SlurmStart:
    """A start of a Slurm job; as a string `JOB-RESTART`, which names its files in a run folder."""

    job: int
    restart: int
    """How often the job was requeued before."""

    def __str__(self) -> str:
        return f"{self.job}-{self.restart}"


def slurm_start(environ: Mapping[str, str]) -> SlurmStart | None:
    """The start of a Slurm job that this process belongs to, whether srun started it or not; None: outside of jobs."""
    job, restart = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_RESTART_COUNT") or "0"
    return SlurmStart(int(job), int(restart)) if job.isdecimal() and restart.isdecimal() else None


def job_port(job: int) -> int:
    """Where the ranks of a Slurm job's step meet, unless MASTER_PORT says otherwise; below Linux's ephemeral ports."""
    return 20_000 + job % 12_000


def hosts(nodes: str) -> list[str]:
    """Host names of a Slurm node list: `gpu[03-05,9]-ib,login` gives four.

    Raises:
        UserError: not a node list.
    """
    names: list[str] = []
    rest = nodes
    while rest:
        match = re.match(r"((?:[^\[\],]|\[[\d,-]+\])+)(?:,|$)", rest)
        if not match:
            raise UserError(f"cannot read the node list {nodes!r}")
        names += _hosts_of(match.group(1))
        rest = rest[match.end() :]
    if not names:
        raise UserError(f"no host in the node list {nodes!r}")
    return names


def _hosts_of(text: str) -> list[str]:
    match = re.match(r"([^\[]*)\[([\d,-]+)\](.*)$", text)
    if not match:
        return [text]
    before, ranges, after = match.groups()
    names = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            names += [f"{before}{number:0{len(first)}}{tail}" for tail in _hosts_of(after)]
    return names


def _port(environ: Mapping[str, str]) -> int:
    port = _number(environ, "MASTER_PORT")
    if not 0 < port < 65_536:
        raise UserError(f"environment: MASTER_PORT={port} is no port: set one of 1 to 65535, or check the launcher")
    return port


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except (KeyError, ValueError):
        raise UserError(f"environment: {name}={environ.get(name)!r} is not a number: check the launcher") from None
