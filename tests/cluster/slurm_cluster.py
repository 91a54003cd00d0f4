"""A real Slurm cluster on this machine, and what the tests do to it: submit, wait, crash a node.

The cluster is `mini_slurm.sh`'s: every node has its own network, process table and mounts, so a crashed node takes its
ranks along and a folder can be hidden from one node alone. One cluster serves all tests of a module.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mini_slurm.sh")
PROJECT = Path(__file__).parents[2]
LONG = 500.0
"""Seconds: for what takes 10 to 100 on two free cores."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")
OTHERS = ("SLURM", "SBATCH", "LBR_", "RAY_")
"""Variables of the process that tests, which no node is to have."""


class SlurmCluster:
    """A cluster whose state is in `folder`; `extra`: further lines of its slurm.conf."""

    def __init__(self, folder: Path, name: str, subnet: str, port: int, nodes: int, extra: str = "") -> None:
        self.folder = folder
        settings = {"DIR": str(folder), "MODE": "netns", "NAME": name, "SUBNET": subnet, "PORT": str(port)}
        settings |= {"NODES": str(nodes), "CPUS": "4", "MEM": "8000"}
        if extra:
            folder.mkdir(exist_ok=True)
            (folder / "extra.conf").write_text(extra)
            settings["EXTRA"] = str(folder / "extra.conf")
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith(OTHERS)},
            **{f"MINI_SLURM_{key}": value for key, value in settings.items()},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "SLURM_EXIT_ERROR": "1",
        }

    @staticmethod
    def missing() -> str:
        """Why there can be no cluster here; "": there can."""
        if os.geteuid() != 0:
            return "needs root: every node of the Slurm cluster has its own network namespace"
        unshare = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "true"]
        if subprocess.run(unshare, capture_output=True, check=False).returncode:
            return "network namespaces cannot be made here (unshare fails)"
        return ""

    def start(self) -> None:
        """Bring it up; where Slurm is not installed and cannot be, the tests are skipped, and say so."""
        start = ["bash", str(SCRIPT), "start"]
        done = subprocess.run(start, env=self.env, capture_output=True, text=True, timeout=LONG, check=False)
        if "apt-get failed" in done.stderr:
            pytest.skip(f"Slurm is not installed and cannot be: {done.stderr.strip().splitlines()[0]}")
        assert done.returncode == 0, done.stdout + done.stderr

    def stop(self) -> None:
        self.mini("stop", timeout=100)

    def mini(self, *arguments: str, timeout: float = 60) -> str:
        """A command of mini_slurm.sh."""
        return self.run("bash", str(SCRIPT), *arguments, timeout=timeout)

    def run(self, *command: str, timeout: float = 60, cwd: Path | None = None, **env: str) -> str:
        """Run a command on this machine against the cluster; its output."""
        done = subprocess.run(
            command, cwd=cwd, env={**self.env, **env}, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, cwd: Path, script: str, *arguments: str, options: Sequence[str] = (), **env: str) -> int:
        """`sbatch OPTIONS slurm/SCRIPT ARGUMENTS`."""
        command = ["sbatch", "--parsable", *options, str(PROJECT / "slurm" / script), *arguments]
        return int(self.run(*command, cwd=cwd, **env))

    def facts(self, job: int) -> dict[str, str]:
        """What `scontrol show job` knows."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", str(job))))

    def wait(self, job: int, timeout: float = LONG) -> dict[str, str]:
        """Wait for the end of a job, requeues included."""
        facts: dict[str, str] = {}

        def ended() -> bool:
            facts.update(self.facts(job))
            return facts["JobState"] in ENDED

        wait_for(ended, timeout, lambda: f"job {job} is {facts.get('JobState')}\n{self.log(job)}")
        return facts

    def finish(self, job: int, timeout: float = LONG) -> dict[str, str]:
        """Wait for the end of a job that must succeed."""
        facts = self.wait(job, timeout)
        assert facts["JobState"] == "COMPLETED", self.log(job)
        return facts

    def refuse(self, job: int, message: str) -> None:
        """Wait for the end of a job that must fail with this message, and not be requeued."""
        facts = self.wait(job)
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), self.log(job)
        assert message in self.log(job)

    def log(self, job: int) -> str:
        """A job's output so far."""
        file = Path(self.facts(job)["StdOut"])
        return file.read_text(errors="replace") if file.is_file() else f"{file}: not there"

    def on(self, node: str, *command: str, timeout: float = 60) -> str:
        """Run a command inside a node."""
        return self.mini("exec", node, *command, timeout=timeout)

    def listening(self, node: str) -> dict[str, str]:
        """ADDRESS:PORT of every TCP socket of a node, Slurm's own left out, and the process that listens on it."""
        found = {}
        for line in self.on(node, "ss", "-ltnpH").splitlines():
            _, _, _, local, _, *process = line.split()
            if not re.search(r'"(slurm\w+|srun)"', line):
                found[local.replace("[::ffff:", "").replace("]", "")] = "".join(process)
        return found


def wait_for(condition: Callable[[], object], timeout: float, state: Callable[[], str] = lambda: "") -> None:
    """Poll until a condition holds; fail with `state()` after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"nothing happened within {timeout:.0f} s: {state()}"
        time.sleep(0.2)
