"""`lbr slurm check`: the nodes of an allocation try out what a run will need, before a run needs it.

Every node runs the same command, by srun. The first one listens on the port that a run would use; the others connect,
which proves name, route and port, and then do what they are told, one line of JSON at a time: read and write the shared
folders, tell the time, count GPUs, all-reduce with one other node. Nothing of this goes through the shared file system
or a process group of all nodes, so one bad node cannot silence the others: who does not answer is named.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbr_dist.environment import detect, hosts, job_port
from lbr_dist.errors import UserError
from lbr_dist.launch.ports import free_ports
from lbr_dist.launch.slurm import Attempt
from lbr_dist.launch.slurm_answers import ANSWER_S, CONNECT_S, SEEN_S, Client, Wire
from lbr_dist.launch.slurm_nodes import Node, findings, rounds, table

ANSWERS = "lbr_dist.launch.slurm_answers"


def check(shared: Sequence[Path], *, quick: bool = False, environ: Mapping[str, str] | None = None) -> bool:
    """Check the allocation; to be called on every node. The first one prints.

    Args:
        shared: folders that all nodes must see as the same.
        quick: only that every node answers and sees them; torch is not imported.
        environ: default: the environment variables.

    Returns:
        Whether all is well; always true on other nodes than the first.

    Raises:
        UserError: not started by srun with one task on each node, or the first node cannot be reached.
    """
    environ = os.environ if environ is None else environ
    here = detect(environ)
    if "srun" not in here.source or here.local_world != 1:
        raise UserError("start it on every node of an allocation: srun --ntasks-per-node=1 lbr slurm check")
    names = hosts(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"])
    wanted = environ.get("MASTER_PORT")
    if here.rank > 0:
        Client(names[here.rank], (environ.get("MASTER_ADDR", names[0]), _port(environ, wanted))).serve()
        return True
    if wanted:
        free_ports(1, Attempt.from_environment(environ).start, wanted)
    server = _Server(names, _port(environ, wanted))
    return server.run([folder.absolute() for folder in shared], quick)


def _port(environ: Mapping[str, str], wanted: str | None) -> int:
    """The same on every node, without asking."""
    return int(wanted) if wanted else job_port(int(environ["SLURM_JOB_ID"]))


class _Server:
    """The first node: tells all nodes, itself included, what to do, and judges the answers."""

    def __init__(self, names: list[str], port: int) -> None:
        self._names, self._port = names, port
        self._nodes = [Node(name) for name in names]
        self._wires: dict[int, Wire] = {}
        self._own: subprocess.Popen[bytes] | None = None
        self._speeds: dict[tuple[int, int], float | str] = {}

    def run(self, shared: Sequence[Path], quick: bool) -> bool:
        try:
            return self._run(shared, quick)
        finally:
            if self._own is not None:
                self._own.kill()
                self._own.wait()

    def _run(self, shared: Sequence[Path], quick: bool) -> bool:
        self._accept()
        self._clocks()
        for folder in shared:
            self._shared(folder)
        if not quick:
            for index, answer in self._ask({index: {"task": "gpus"} for index in self._wires}).items():
                self._nodes[index].gpus = answer.get("gpus", 0)
            self._bandwidth()
        for wire in self._wires.values():
            with contextlib.suppress(OSError):
                wire.send(task="end")
        return self._report(shared, quick)

    def _accept(self) -> None:
        try:
            listener = socket.create_server(("", self._port), backlog=len(self._names))
        except OSError as error:
            raise UserError(
                f"{self._names[0]}: cannot listen on port {self._port} ({error.strerror}): set MASTER_PORT to another"
            ) from None
        command = [sys.executable, "-m", ANSWERS, self._names[0], "127.0.0.1", str(self._port)]
        self._own = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + CONNECT_S
        with listener:
            while len(self._wires) < len(self._names) and (left := deadline - time.monotonic()) > 0:
                listener.settimeout(left)
                try:
                    wire = Wire(listener.accept()[0])
                    name = wire.receive(5).get("node")
                except (OSError, ValueError):
                    continue
                if name in self._names:
                    self._wires[self._names.index(name)] = wire
        for index, node in enumerate(self._nodes):
            if index not in self._wires:
                node.errors.append(
                    f"did not answer within {CONNECT_S:.0f} s: it cannot start {sys.executable}, or cannot reach "
                    f"{self._names[0]} at port {self._port}"
                )

    def _ask(self, tasks: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Give each node its task, then collect the answers; a node that fails to answer is not asked again."""
        answers = {}
        for index, task in tasks.items():
            with contextlib.suppress(OSError):  # nor will there be an answer
                self._wires[index].send(**task)
        for index, task in tasks.items():
            try:
                answers[index] = self._wires[index].receive(ANSWER_S)
            except (OSError, ValueError) as error:
                answers[index] = {"error": f"{task['task']}: no answer ({error})"}
                del self._wires[index]
            if "error" in answers[index] and (task["task"] != "pair" or index not in self._wires):
                self._nodes[index].errors.append(answers[index]["error"])
        return answers

    def _clocks(self) -> None:
        """As NTP does: the answer with the shortest round trip says most."""
        for index in list(self._wires):
            best = (float("inf"), 0.0)
            for _ in range(5):
                sent = time.time()
                answer = self._ask({index: {"task": "clock"}})[index]
                received = time.time()
                if "time" not in answer:
                    break
                best = min(best, (received - sent, answer["time"] - (sent + received) / 2))
            self._nodes[index].skew_s = best[1]

    def _shared(self, folder: Path) -> None:
        name, secret = f".lbr-check-{secrets.token_hex(4)}", secrets.token_hex(8)
        file = folder / name
        try:
            file.write_text(secret)
        except OSError as error:
            self._nodes[0].errors.append(f"{folder} cannot be written: {error.strerror}")
            return
        task = {"task": "shared", "folder": str(folder), "name": name, "secret": secret}
        answers = self._ask(dict.fromkeys(self._wires, task))
        deadline = time.monotonic() + SEEN_S
        for index, answer in answers.items():
            written = folder / f"{name}-{self._names[index]}"
            while "error" not in answer and not written.is_file():
                if time.monotonic() > deadline:
                    self._nodes[index].errors.append(f"{folder}: a file that it wrote is not seen by the first node")
                    break
                time.sleep(0.1)
            written.unlink(missing_ok=True)
        file.unlink()

    def _bandwidth(self) -> None:
        for pairs in rounds(len(self._names)):
            tasks: dict[int, dict[str, Any]] = {}
            for a, b in pairs:
                if not {a, b} <= self._wires.keys():
                    continue
                port = self._ask({a: {"task": "port"}})[a].get("port")
                if port is None:
                    continue
                for rank, index in enumerate((a, b)):
                    tasks[index] = {"task": "pair", "host": self._names[a], "port": port, "rank": rank}
            answers = self._ask(tasks)
            for a, b in pairs:
                if not {a, b} <= answers.keys() & self._wires.keys():
                    continue  # one of them is named by itself, and says nothing about the other
                both = [answers[index] for index in (a, b)]
                errors = [answer["error"] for answer in both if "error" in answer]
                self._speeds[a, b] = errors[0] if errors else min(answer["gb_s"] for answer in both)

    def _report(self, shared: Sequence[Path], quick: bool) -> bool:
        found = findings(self._nodes, self._speeds)
        if not quick:
            print("\n".join(table(self._nodes, self._speeds)))
        for finding in found:
            print(f"bad: {finding}")
        if not found:
            folders = ", ".join(map(str, shared))
            print(f"{len(self._nodes)} nodes: all answer, see the same {folders}, and agree on the time")
        return not found
