"""Ray inside a Slurm allocation: what each node runs, and how to know that all of them are there.

Head and workers are one job step, `srun --ntasks-per-node=1 python -m lbr_dist.launch.slurm_ray node ...`, and the
driver is another, so that a stop signal reaches the driver alone and Ray lives on until the ranks have stopped. Ray's
own `symmetric-run` was not taken: it puts both into one step, waits 30 s for nodes whatever their number, and its
workers linger for a minute. Every port that Ray would take by a fixed number is given, because two jobs may share a
node; the dashboard and job server listen on loopback, GCS and raylets on the address that the other nodes reach (a job
of one node: loopback, too), and all of it asks for a token that is made for this attempt of the job alone.

    node STEP PORT DASHBOARD CLIENT AGENT    run Ray on this node until the step ends (`ray start --block`)
    wait STEP NODES                          return once so many nodes are alive; exit code 1 after WAIT_S

STEP.log has the step's output; STEP.code, once one of the nodes has failed or all have ended, the exit code, and maybe
why: nobody waits for the others then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from lbr_dist.environment import detect
from lbr_dist.errors import EXIT_USER_ERROR, UserError
from lbr_dist.launch.ray_cluster import OBJECT_STORE_BYTES
from lbr_dist.launch.ray_start import address_towards, keep_to_node_address, start

WAIT_S = 180.0
LIVED_S = 60.0
"""A node that ends after so long had started: a start that fails does so sooner."""
ENDING_S = 2.0
"""How long Ray's processes may still write when they are told to end; `ray start` itself would look on for 30 s."""
SOCKET = "r/session_2026-11-23_08-00-00_000000_1234567/sockets/plasma_store.9"
"""The longest path of a socket in Ray's folder: with a process id of seven digits, and the last start of a node."""
SOCKET_BYTES = 107
"""Linux takes no longer paths of sockets."""


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
    return [*options, f"--temp-dir={environ['LBR_RAY_FOLDER']}/r"]


def check_folder(folder: Path) -> None:
    """Check that Ray's sockets can be in a folder of this path.

    Raises:
        UserError: it is too long.
    """
    scratch, excess = folder.parent, len(os.fsencode(folder / SOCKET)) - SOCKET_BYTES
    if excess > 0:
        size = len(os.fsencode(scratch))
        raise UserError(
            f"LBR_SCRATCH {scratch}: its path has {size} bytes, and Ray's sockets leave room for {size - excess}: "
            "name a folder with a shorter path on each node's own disk"
        )


def make_folder(folder: Path) -> None:
    """Make the folder of this node in which Ray makes its own: that one is open to every user, this one is not.

    Raises:
        UserError: it cannot be made, or is another user's.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
    except OSError as error:
        raise UserError(f"LBR_SCRATCH: {folder} cannot be made on {socket.gethostname()}: {error.strerror}") from None
    if state.st_uid != os.getuid() or not stat.S_ISDIR(state.st_mode):
        raise UserError(f"LBR_SCRATCH: {folder} is not yours on {socket.gethostname()}: choose another LBR_SCRATCH")
    folder.chmod(0o700)


def run_node(ports: Sequence[int]) -> int:
    """Run Ray until the step ends; nodes other than the head wait until it listens.

    Its folder is removed then; where Ray failed it stays, for its logs.

    Ray gives its own processes 20 to 30 s to come up, which is little on a busy node, or where all nodes read Python
    from one file system at once: a start that fails is tried again, within WAIT_S. And so is a node that had started
    and died (its raylet ran out of memory), however late, as long as the head is there: a run waits for its room.
    """
    head = os.environ["RAY_ADDRESS"]
    options = start_options(os.environ, address_towards(head), ports)
    host, port = head.rsplit(":", 1)
    if detect().rank > 0:
        _wait_for_port(host, int(port))
    folder = Path(os.environ["LBR_RAY_FOLDER"])
    make_folder(folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        code = _keep_up(options, host, int(port))
    except SystemExit:  # the step is ended: Slurm tells all of Ray's processes, too
        time.sleep(ENDING_S)
        code = 0
    if code == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return code


def _keep_up(options: Sequence[str], host: str, port: int) -> int:
    """Start the node, and again where that can help."""
    deadline = time.monotonic() + WAIT_S
    while True:
        began = time.monotonic()
        code = start(options)
        ended = time.monotonic()
        if ended - began > LIVED_S and _answers(host, port):
            deadline = ended + WAIT_S
        if code == 0 or ended > deadline:
            return code


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def _wait_for_port(host: str, port: int, look: Callable[[], None] = lambda: None) -> None:
    deadline = time.monotonic() + WAIT_S
    while not _answers(host, port):
        look()
        if time.monotonic() > deadline:
            raise ConnectionError(f"Ray's head at {host}:{port} did not answer within {WAIT_S:.0f} s: see its log")
        time.sleep(0.2)


def check_step(step: Path) -> None:
    """Check that all of the step's nodes go on.

    Raises:
        UserError, ConnectionError: one has ended, by a mistake or otherwise; with the last that the log says.
    """
    try:
        ended, _, why = step.with_suffix(".code").read_text().partition("\n")
        code = int(ended)
    except (OSError, ValueError):  # not there, or not written yet
        return
    log = step.with_suffix(".log")
    lines = why.split("\n") if why.strip() else log.read_text(errors="replace").split("\n")[-20:]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or ["", *filter(None, lines)]
    kind = UserError if code == EXIT_USER_ERROR else ConnectionError
    raise kind(f"a node of Ray ended with code {code}: {said[-1]} (see {log})")


def wait_for_nodes(count: int, step: Path) -> bool:
    """Whether so many nodes are alive, before too long.

    Raises:
        UserError, ConnectionError: see `check_step`; or the head does not answer.
    """
    address = os.environ["RAY_ADDRESS"]
    host, port = address.rsplit(":", 1)
    _wait_for_port(host, int(port), partial(check_step, step))
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
        check_step(step)
        time.sleep(0.2)
    print(f"error: {len(alive)} of {count} nodes joined Ray in {WAIT_S:.0f} s: {alive}", file=sys.stderr)
    return False


def main(arguments: Sequence[str]) -> int:
    """The scripts' side of this module."""
    command, step, *rest = arguments
    why = ""
    try:
        check_folder(Path(os.environ["LBR_RAY_FOLDER"]))
        if command == "node":
            code = run_node([int(number) for number in rest])
        else:
            keep_to_node_address()
            code = 0 if wait_for_nodes(int(rest[0]), Path(step)) else 1
    except (UserError, ConnectionError) as error:
        why, code = str(error), EXIT_USER_ERROR if isinstance(error, UserError) else 1
        print(f"error: {why}", file=sys.stderr)
    if command == "node" and code != 0:
        with contextlib.suppress(OSError):
            Path(f"{step}.code").write_text(f"{code}\n{why}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
