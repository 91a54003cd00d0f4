"""`lbr slurm check`: the nodes of an allocation try out what a run will need, before a run needs it.

Every node runs the same command, by srun. The first one listens on the port that a run would use; the others connect,
which proves name, route and port, and then do what they are told, one line of JSON at a time: read and write the shared
folders, tell the time, count GPUs, all-reduce with one other node. Nothing of this goes through the shared file system
or a process group of all nodes, so one bad node cannot silence the others: who does not answer is named.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from lbr_dist.environment import Environment, detect
from lbr_dist.errors import UserError
from lbr_dist.launch.slurm import Attempt, free_ports
from lbr_dist.launch.slurm_nodes import Node, expand, findings, rounds, table

CONNECT_S = 60.0
"""Time that the slowest node has to start Python and to connect."""
ANSWER_S = 90.0
"""Time for one answer; importing torch from a busy file system takes most of it."""
SEEN_S = 15.0
"""Time until a file that another node wrote must be visible (NFS caches attributes)."""
PAIR_S = 30
MIB_CPU, MIB_GPU, REPEATS = 16, 256, 5


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
    names = expand(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"])
    wanted = environ.get("MASTER_PORT")
    if here.rank > 0:
        _Client(names[here.rank], (environ.get("MASTER_ADDR", names[0]), _port(environ, wanted))).serve()
        return True
    if wanted:
        free_ports(1, Attempt.from_environment(environ), wanted)
    server = _Server(names, here, _port(environ, wanted))
    return server.run([folder.absolute() for folder in shared], quick)


def _port(environ: Mapping[str, str], wanted: str | None) -> int:
    """The same on every node, without asking."""
    return int(wanted) if wanted else 20_000 + int(environ["SLURM_JOB_ID"]) % 12_000


class _Wire:
    """Lines of JSON over a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._lines = connection, connection.makefile("rw", encoding="utf-8")

    def send(self, **message: Any) -> None:
        self._lines.write(json.dumps(message) + "\n")
        self._lines.flush()

    def receive(self, timeout_s: float) -> dict[str, Any]:
        self._connection.settimeout(timeout_s)
        line = self._lines.readline()
        if not line:
            raise ConnectionError("the connection was closed")
        answer: dict[str, Any] = json.loads(line)
        return answer


class _Client:
    """A node that does what it is told."""

    def __init__(self, name: str, server: tuple[str, int]) -> None:
        self._name, self._server = name, server

    def serve(self) -> None:
        """Connect and answer until told to end."""
        wire = _Wire(self._connect())
        wire.send(node=self._name)
        while True:
            message = wire.receive(10 * ANSWER_S)
            task = message.pop("task")
            if task == "end":
                return
            try:
                wire.send(**getattr(self, f"_do_{task}")(**message))
            except Exception as error:  # whatever it is, it is this node's answer
                wire.send(error=f"{task}: {' '.join(str(error).split()) or type(error).__name__}"[:300])

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + CONNECT_S
        while True:
            try:
                return socket.create_connection(self._server, timeout=5)
            except OSError as error:
                if time.monotonic() > deadline:
                    host, port = self._server
                    raise UserError(f"{self._name}: cannot reach {host} at port {port}: {error}") from None
                time.sleep(0.1)

    def _do_clock(self) -> dict[str, Any]:
        return {"time": time.time()}

    def _do_shared(self, folder: str, name: str, secret: str) -> dict[str, Any]:
        deadline = time.monotonic() + SEEN_S
        file = Path(folder) / name
        while not file.is_file():
            if time.monotonic() > deadline:
                state = "is not the same folder as on the first node" if Path(folder).is_dir() else "does not exist"
                return {"error": f"{folder} {state}"}
            time.sleep(0.2)
        if file.read_text() != secret:
            return {"error": f"{folder}: a file of the first node reads differently here"}
        try:
            (Path(folder) / f"{name}-{self._name}").write_text(secret)
        except OSError as error:
            return {"error": f"{folder} cannot be written: {error.strerror}"}
        return {}

    def _do_gpus(self) -> dict[str, Any]:
        import torch

        return {"gpus": torch.cuda.device_count()}

    def _do_port(self) -> dict[str, Any]:
        with socket.socket() as server:
            server.bind(("", 0))
            return {"port": server.getsockname()[1]}

    def _do_pair(self, host: str, port: int, rank: int) -> dict[str, Any]:
        return {"gb_s": _all_reduce(host, port, rank)}


def _all_reduce(host: str, port: int, rank: int) -> float:
    """The fastest of a few all-reduces between two nodes, in GB/s: what else runs on the nodes only makes it slower."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://{host}:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=PAIR_S),
    )
    try:
        buffer = torch.ones((MIB_GPU if cuda else MIB_CPU) * 2**18, device="cuda:0" if cuda else "cpu")
        dist.all_reduce(buffer)  # connects
        buffer.fill_(1.0)
        taken = float("inf")
        for _ in range(REPEATS):
            began = time.perf_counter()
            dist.all_reduce(buffer)
            if cuda:
                torch.cuda.synchronize()
            taken = min(taken, time.perf_counter() - began)
        if buffer[0].item() != 2.0**REPEATS:
            raise RuntimeError(f"a sum of ones gave {buffer[0].item():g} instead of {2.0**REPEATS:g}")
        return buffer.numel() * 4 / taken / 1e9
    finally:
        dist.destroy_process_group()


class _Server:
    """The first node: tells all nodes, itself included, what to do, and judges the answers."""

    def __init__(self, names: list[str], here: Environment, port: int) -> None:
        self._names, self._port = names, port
        self._nodes = [Node(name) for name in names]
        self._wires: dict[int, _Wire] = {}
        self._speeds: dict[tuple[int, int], float | str] = {}

    def run(self, shared: Sequence[Path], quick: bool) -> bool:
        self._accept()
        self._clocks()
        for folder in shared:
            self._shared(folder)
        if not quick:
            for index, answer in self._ask({index: {"task": "gpus"} for index in self._wires}).items():
                self._nodes[index].gpus = answer.get("gpus", 0)
            self._bandwidth()
        for index in list(self._wires):
            self._wires[index].send(task="end")
        return self._report(shared, quick)

    def _accept(self) -> None:
        try:
            listener = socket.create_server(("", self._port), backlog=len(self._names))
        except OSError as error:
            raise UserError(
                f"{self._names[0]}: cannot listen on port {self._port} ({error.strerror}): set MASTER_PORT to another"
            ) from None
        own = _Client(self._names[0], ("127.0.0.1", self._port))
        threading.Thread(target=own.serve, daemon=True).start()
        deadline = time.monotonic() + CONNECT_S
        with listener:
            while len(self._wires) < len(self._names) and (left := deadline - time.monotonic()) > 0:
                listener.settimeout(left)
                try:
                    wire = _Wire(listener.accept()[0])
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
            self._wires[index].send(**task)
        for index in tasks:
            try:
                answers[index] = self._wires[index].receive(ANSWER_S)
            except (OSError, ValueError) as error:
                answers[index] = {"error": f"{tasks[index]['task']}: no answer ({error})"}
                del self._wires[index]
            if "error" in answers[index] and tasks[index]["task"] != "pair":
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
            able = [pair for pair in pairs if set(pair) <= self._wires.keys()]
            for a, b in able:
                port = self._ask({a: {"task": "port"}})[a].get("port")
                for rank, index in enumerate((a, b)):
                    tasks[index] = {"task": "pair", "host": self._names[a], "port": port, "rank": rank}
            answers = self._ask(tasks)
            for a, b in able:
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
