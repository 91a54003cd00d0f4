"""The nodes' side of `lbr slurm check`: connect to the first node, do what it says, and answer."""

from __future__ import annotations

import json
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lbr_dist.errors import UserError

CONNECT_S = 60.0
"""Time that the slowest node has to start Python and to connect."""
ANSWER_S = 90.0
"""Time for one answer; importing torch from a busy file system takes most of it."""
SEEN_S = 15.0
"""Time until a file that another node wrote must be visible (NFS caches attributes)."""
PAIR_S = 30
MIB_CPU, MIB_GPU, REPEATS = 16, 256, 5


class Wire:
    """Lines of JSON over a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._lines = connection, connection.makefile("rw", encoding="utf-8")

    def send(self, **message: Any) -> None:
        """One message; OSError if the other end is gone."""
        self._lines.write(json.dumps(message) + "\n")
        self._lines.flush()

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next message; OSError or ValueError if there is none in time, or no sense in it."""
        self._connection.settimeout(timeout_s)
        line = self._lines.readline()
        if not line:
            raise ConnectionError("the connection was closed")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Answering:
    """A node that does what it is told."""

    def __init__(self, name: str, server: tuple[str, int]) -> None:
        self._name, self._server = name, server

    def serve(self) -> None:
        """Connect and answer until told to end."""
        wire = Wire(self._connect())
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
