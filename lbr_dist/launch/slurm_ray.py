"""Ray inside a Slurm allocation: what each node runs, and how to know that all of them are there.

Head and workers are one job step, `srun --ntasks-per-node=1 python -m lbr_dist.launch.slurm_ray node ...`, and the
driver is another, so that a stop signal reaches the driver alone and Ray lives on until the ranks have stopped. Ray's
own `symmetric-run` was not taken: it puts both into one step, waits 30 s for nodes whatever their number, and its
workers linger for a minute. Every port that Ray would take by a fixed number is given, because two jobs may share a
node; the dashboard and job server listen on loopback, GCS and raylets on the address that the other nodes reach (a job
of one node: loopback, too), and all of it asks for a token that is made for this attempt of the job alone.

    node PORT DASHBOARD CLIENT AGENT    run Ray on this node until the step ends (`ray start --block`)
    wait NODES                          return once so many nodes are alive; exit code 1 after WAIT_S
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lbr_dist.environment import detect
from lbr_dist.errors import EXIT_USER_ERROR, UserError
from lbr_dist.launch.ray_start import address_towards, keep_to_node_address, start

WAIT_S = 180.0
LIVED_S = 60.0
"""A node that ends after so long had started: a start that fails does so sooner."""
SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest path, with the longest process id, that Ray makes in its folder; a socket's may have 107 bytes in all."""
OBJECT_STORE_BYTES = 256 << 20
"""Training moves nothing through Ray's object store but small messages."""


def start_options(environ: Mapping[str, str], address: str, ports: Sequence[int]) -> list[str]:
    """The options of `ray start` for this node of the step.

    Args:
        environ: Slurm's variables, RAY_ADDRESS (the head's host and port), LBR_RAY_FOLDER, LBR_GPUS.
        address: of this node.
        ports: of GCS, dashboard and Ray client on the head, and of each node's agent.
    """
    gcs, dashboard, client, agent = ports
    options = ["--block", f"--node-ip-address={address}"]
    options += [f"--num-cpus={environ['SLURM_CPUS_ON_NODE']}", f"--num-gpus={environ.get('LBR_GPUS') or 0}"]
    options += [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--dashboard-agent-listen-port={agent}"]
    options += ["--min-worker-port=0", "--max-worker-port=0"]  # any free one: two raylets of a node must not share
    if detect(environ).rank > 0:
        return [*options, f"--address={environ['RAY_ADDRESS']}"]
    options += ["--head", f"--port={gcs}", f"--ray-client-server-port={client}"]
    options += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    return [*options, f"--temp-dir={temp_folder(environ)}"]


def temp_folder(environ: Mapping[str, str]) -> Path:
    """Ray's folder on every node, which it opens to all: in one that only this user may enter.

    Raises:
        UserError: its path is too long for Ray's sockets.
    """
    folder = Path(environ["LBR_RAY_FOLDER"]) / "r"
    over = len(os.fsencode(f"{folder}{SOCKET}")) - 107
    if over > 0:
        raise UserError(
            f"LBR_SCRATCH: the path {folder.parent} is {over} characters too long for Ray's sockets: name a folder "
            "with a shorter one (slurm/site.env), or use another LAUNCHER"
        )
    return folder


def run_node(ports: Sequence[int]) -> int:
    """Run Ray until the step ends; nodes other than the head wait until it listens.

    Ray gives its own processes 20 to 30 s to come up, which is little on a busy node, or where all nodes read Python
    from one file system at once: a start that fails is tried again, within WAIT_S. And so is a node that had started
    and died (its raylet ran out of memory), however late, as long as the head is there: a run waits for its room.
    """
    head = os.environ["RAY_ADDRESS"]
    options = start_options(os.environ, address_towards(head), ports)
    host, port = head.rsplit(":", 1)
    if detect().rank > 0:
        _wait_for_port(host, int(port))
    deadline = time.monotonic() + WAIT_S
    while True:
        began = time.monotonic()
        code = start(options)
        ended = time.monotonic()
        if ended - began > LIVED_S and _answers(host, int(port)):
            deadline = ended + WAIT_S
        if code == 0 or ended > deadline:
            return code


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def _wait_for_port(host: str, port: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while not _answers(host, port):
        if time.monotonic() > deadline:
            raise ConnectionError(f"Ray's head at {host}:{port} did not answer within {WAIT_S:.0f} s: see its log")
        time.sleep(0.2)


def wait_for_nodes(count: int) -> bool:
    """Whether so many nodes are alive, before too long."""
    address = os.environ["RAY_ADDRESS"]
    host, port = address.rsplit(":", 1)
    _wait_for_port(host, int(port))
    import ray

    deadline = time.monotonic() + WAIT_S
    alive: list[str] = []
    while time.monotonic() < deadline:
        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            alive = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
        except ConnectionError:  # the head answers, but its own node has not joined yet
            pass
        if len(alive) >= count:
            return True
        time.sleep(0.2)
    print(f"error: {len(alive)} of {count} nodes joined Ray in {WAIT_S:.0f} s: {alive}", file=sys.stderr)
    return False


def main(arguments: Sequence[str]) -> int:
    """The scripts' side of this module."""
    command, *numbers = arguments
    try:
        folder = temp_folder(os.environ).parent
        if command == "node":
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"LBR_SCRATCH: {folder} cannot be made ({error.strerror}): name another") from None
            return run_node([int(number) for number in numbers])
        keep_to_node_address()
        return 0 if wait_for_nodes(int(numbers[0])) else 1
    except (UserError, ConnectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
