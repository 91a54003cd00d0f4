"""The Ray cluster under a job: joined or started, locked, and checked for room before anything waits for it.

Ray schedules a request that no cluster of its size can ever meet by waiting without end; here it is refused at once,
with the numbers. A cluster that we start ourselves listens on loopback only and asks for a token that is made for it
alone; a cluster that is joined has its own rules, and its operator the docs (docs/ray.md).
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbr_dist.errors import UserError
from lbr_dist.launch.ports import free_port

OBJECT_STORE_BYTES = 256 << 20
"""Of a cluster that we start: training moves nothing through Ray's object store but small messages."""

ANSWER_S = 10.0
"""How long a head may take to accept a connection."""

LOCAL = {
    "RAY_AUTH_MODE": "token",
    "RAY_prestart_worker_first_driver": "0",  # a Python for every CPU, of which a run needs as many as it has ranks
    "RAY_worker_niceness": "0",  # Ray's 15 leaves a run what every other program on the machine does not want
}
"""Environment of a cluster that we start. What is set already stays as it is."""

ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Where this is 0, on Linux too, loopback is a cluster's address; else Ray takes another one of the machine for it."""

TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token file"


@contextmanager
def cluster(*, dashboard: bool = True) -> Iterator[str]:
    """Join the cluster of RAY_ADDRESS, or run one on this machine for as long as the context lasts (none, or `local`).

    Args:
        dashboard: of a cluster that is run here; Ray Train's own actors ask its state API.

    Inside another such context it is that one's cluster. A process starts at most one: Ray keeps its first token.

    Yields:
        How to name the cluster in messages.

    Raises:
        UserError: there is none at RAY_ADDRESS, or it wants another token; or see `check_python`.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address == "local":  # Ray's own word, with which it would start one on another address, without a token
        address = None
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield f"the cluster at {address}"
        return
    check_python()
    with tempfile.TemporaryDirectory(prefix="lbr-ray-") as folder:
        if not address:
            os.environ.update(_local_environment(os.environ, Path(folder)))
        import ray

        if address:
            _check_answers(address)
        try:
            if address:
                context = ray.init(address=address)
            else:
                context = ray.init(
                    address="local",
                    include_dashboard=dashboard,
                    object_store_memory=OBJECT_STORE_BYTES,
                )
            if context.dashboard_url:
                os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's page on Train runs
        except ray.exceptions.AuthenticationError as error:
            raise UserError(f"RAY_AUTH_MODE is token, and there is none ({_first_line(error)}): {TOKEN}") from None
        except ConnectionError as error:  # also what a wrong token comes to
            raise UserError(
                f"RAY_ADDRESS {address}: no cluster answers there, or not to this token ({_first_line(error)}): "
                f"{TOKEN}; start a cluster, or unset RAY_ADDRESS for one on this machine"
            ) from None
        except RuntimeError as error:
            if "mismatch" not in str(error).lower():
                raise
            versions = " ".join(str(error).split())
            raise UserError(f"RAY_ADDRESS {address}: the cluster has another Ray or Python: {versions}") from None
        try:
            yield f"the cluster at {address}" if address else "this machine"
        finally:
            ray.shutdown()
            if not address:
                del os.environ["RAY_ADDRESS"]


def check_python() -> None:
    """Check that Ray can start workers with this Python: it hands the path to a shell as it is, and they never come.

    Raises:
        UserError: a shell would split the path, or read something else.
    """
    if re.search(r"[^\w@%+=:,./~-]", sys.executable):
        raise UserError(
            f"{sys.executable}: Ray cannot start this Python for its workers, for a space or the like in its path: "
            "call it by another path, as by a link to the environment's folder, or make the environment anew elsewhere"
        )


def _check_answers(address: str) -> None:
    """Check that somebody listens at the HOST:PORT of a head: Ray itself tries for minutes before it says so."""
    if address.startswith(("http:", "https:")) or not re.fullmatch(r"auto|[a-z]+://.+|.+:\d+", address):
        raise UserError(
            f"RAY_ADDRESS {address}: is no cluster's address: a driver needs its head's HOST:PORT, the port of "
            "`ray start --port` (6379) and not the dashboard's; or unset RAY_ADDRESS for a cluster on this machine"
        )
    import ray.util

    if not re.fullmatch(r"[^:/]+:\d+", address):
        return
    host, port = address.rsplit(":", 1)
    hosts = [host, ray.util.get_node_ip_address()] if host == "localhost" or host.startswith("127.") else [host]
    errors = []
    for name in hosts:  # Ray takes the second for the first, unless ALONE is 0
        try:
            socket.create_connection((name, int(port)), timeout=ANSWER_S).close()
        except OSError as error:
            errors.append(f"{name}: {error.strerror or error}")
        else:
            return
    raise UserError(
        f"RAY_ADDRESS {address}: no cluster answers there ({'; '.join(errors)}): start one, name another, or unset "
        "RAY_ADDRESS for one on this machine"
    )


def _local_environment(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """What a cluster of our own finds in its environment: loopback only, a token, and which cluster it is."""
    port = str(free_port())
    made = {
        **{name: value for name, value in LOCAL.items() if name not in environ},
        ALONE: "0",  # of one machine, so every socket is on loopback
        "RAY_GCS_SERVER_PORT": port,
        "RAY_ADDRESS": f"127.0.0.1:{port}",  # Ray's own actors else look for clusters, and find another one's
    }
    if {**environ, **made}["RAY_AUTH_MODE"] == "token" and not token_given(environ):
        made["RAY_AUTH_TOKEN_PATH"] = str(make_token(folder / "token"))
    return made


def make_token(file: Path) -> Path:
    """Write a new cluster token that only its owner can read."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as stream:
        stream.write(secrets.token_hex(32))
    return file


def token_given(environ: Mapping[str, str]) -> bool:
    """Whether the environment names a token."""
    return "RAY_AUTH_TOKEN" in environ or "RAY_AUTH_TOKEN_PATH" in environ


@dataclass(frozen=True)
class Bundle:
    """What one worker asks of its node."""

    cpus: int
    gpus: int

    @property
    def resources(self) -> dict[str, float]:
        """As Ray counts them."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    def __str__(self) -> str:
        gpus = f" and {_count(self.gpus, 'GPU')}" if self.gpus else ""
        return f"{_count(self.cpus, 'CPU')}{gpus}"


@dataclass(frozen=True)
class Node:
    """A living node and what it declares."""

    name: str
    cpus: float
    gpus: float

    def room(self, bundle: Bundle) -> int:
        """How many such bundles fit on it when it is idle."""
        rooms = [self.cpus // bundle.cpus] if bundle.cpus else []
        rooms += [self.gpus // bundle.gpus] if bundle.gpus else []
        return int(min(rooms))

    def __str__(self) -> str:
        return f"{self.name}: {_count(self.cpus, 'CPU')}, {_count(self.gpus, 'GPU')}"


def living_nodes() -> list[Node]:
    """The nodes of the cluster that we are connected to."""
    import ray

    return parse_nodes(ray.nodes())


def parse_nodes(rows: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Nodes from Ray's own list, which keeps dead ones."""
    return [
        Node(row["NodeManagerAddress"], row["Resources"].get("CPU", 0), row["Resources"].get("GPU", 0))
        for row in rows
        if row["Alive"]
    ]


def check_room(nodes: Sequence[Node], bundle: Bundle, workers: int, where: str) -> None:
    """Check that an idle cluster has room for this many workers.

    Raises:
        UserError: it has not; the numbers are given.
    """
    room = sum(node.room(bundle) for node in nodes)
    if room < workers:
        listed = "; ".join(map(str, nodes)) or "no node"
        raise UserError(
            f"--num-workers {workers} of {bundle} each: {where} has room for {room} ({listed}): lower --num-workers, "
            "--cpus-per-worker or --gpus-per-worker, or add nodes"
        )


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
