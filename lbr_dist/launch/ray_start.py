"""`ray start` with the doors shut: a token is asked for, and every port listens on the node's own address.

Ray's gcs_server, raylet and workers listen on every interface of a node whose address is not loopback, and no option of
Ray 2.60 says otherwise. So its processes get a small C library, loaded before the others: what would listen everywhere
listens on the cluster's address, and what looks for it on loopback is led there (`ray_listen.c`; compiled on the node,
once). A node without a C compiler says so and starts all the same: the token guards it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from lbr_dist.errors import EXIT_RUN_AGAIN, EXIT_USER_ERROR, UserError
from lbr_dist.launch.ray_cluster import ALONE, TOKEN, check_python, token_given

SOURCE = Path(__file__).with_name("ray_listen.c")
COMPILERS = ("cc", "gcc", "clang")
LISTENS = "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[0])"

logger = logging.getLogger(__name__)


def start(options: Sequence[str]) -> int:
    """Run `ray start` with these options, its own, on this node; returns its exit code.

    `--node-ip-address` may be left out where `--address` is given: it is the address that faces the head.

    Raises:
        UserError: a head without `--node-ip-address`; no token (RAY_AUTH_MODE is `token` where nothing is set); or see
            `check_python`.
    """
    check_python()
    environ = {"RAY_AUTH_MODE": "token", **os.environ}
    if environ["RAY_AUTH_MODE"] == "token" and not token_given(environ):
        raise UserError(f"there is no token, and without one whoever reaches this cluster runs code as you: {TOKEN}")
    address, head = _option(options, "--node-ip-address"), _option(options, "--address")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats", *options]
    if address is None:
        if head is None or ":" not in head:
            raise UserError(
                "--node-ip-address: name the address of this node that the others reach, or 127.0.0.1 for a cluster "
                "of this machine alone"
            )
        address = address_towards(head)
        command.append(f"--node-ip-address={address}")
    if address.startswith("127.") and environ.get(ALONE) != "0":
        raise UserError(f"--node-ip-address={address}: set {ALONE}=0 here and for drivers: else Ray takes another")
    environ.pop("RAY_ADDRESS", None)  # `ray start` refuses to start a head where one is named
    return subprocess.call(command, env={**environ, **listening_on(address, environ)})


def run_driver(main: Callable[[], int]) -> NoReturn:
    """A driver's whole program: `main` with its ports where they belong; its result is the exit code."""
    try:
        keep_to_node_address()
    except UserError as error:
        print(f"error: RAY_ADDRESS {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # a run that has begun listens for itself
        print("stopped on request; run again to go on", file=sys.stderr)
        sys.exit(EXIT_RUN_AGAIN)


def keep_to_node_address() -> None:
    """Begin this program again with its own ports on the address that faces RAY_ADDRESS: a driver listens, too.

    Nothing happens where RAY_ADDRESS is not HOST:PORT, and in what a node of `start` has started (`ray job submit`).
    """
    head = os.environ.get("RAY_ADDRESS", "")
    if "LBR_NODE_ADDRESS" in os.environ or not re.fullmatch(r"[^:/]+:\d+", head):
        return
    made = listening_on(address_towards(head), os.environ)
    if made:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **made})


def address_towards(head: str) -> str:
    """Which of this node's addresses faces the head.

    Args:
        head: its host and port.
    """
    host, port = head.rsplit(":", 1)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            route.connect((host, int(port)))  # sends nothing
            return str(route.getsockname()[0])
    except (OSError, ValueError) as error:
        raise UserError(f"{head}: not the HOST:PORT of a head that this node can reach: {error}") from None


def listening_on(address: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables with which a program's TCP sockets listen on this address where they would on every interface.

    Args:
        address: IPv4, of this node.
        environ: what the program gets besides: CC and LD_PRELOAD are heeded.

    Returns:
        Nothing where the library cannot be made or does not work here; a warning says why.
    """
    try:
        library = _library(environ)
        preload = ":".join(filter(None, [str(library), environ.get("LD_PRELOAD")]))
        made = {"LD_PRELOAD": preload, "LBR_NODE_ADDRESS": address}
        command = [sys.executable, "-c", LISTENS]
        found = subprocess.run(command, env={**environ, **made}, capture_output=True, text=True, check=True, timeout=60)
        if found.stdout.strip() == address:
            return made
        why = f"a socket listens on {found.stdout.strip()} in spite of {library}"
    except (OSError, subprocess.SubprocessError) as error:
        output = (getattr(error, "stderr", None) or "").strip().splitlines()
        why = f"{error}{': ' if output else ''}{output[-1] if output else ''}"
    message = "Ray listens on every interface of this node, not on %s alone: its token guards it (%s)"
    logger.warning(message, address, why)
    return {}


def _library(environ: Mapping[str, str]) -> Path:
    """The compiled source, in a folder of this node and user."""
    folder = Path(tempfile.gettempdir()) / f"lbr-ray-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022 or not folder.is_dir() or folder.is_symlink():
        raise PermissionError(f"{folder} is not this user's own folder")
    library = folder / f"listen-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}-{platform.machine()}.so"
    if library.is_file():
        return library
    compilers = [shlex.split(environ["CC"])] if environ.get("CC") else [[name] for name in COMPILERS]
    compiler = next((command for command in compilers if shutil.which(command[0])), None)
    if compiler is None:
        raise FileNotFoundError(f"no C compiler: {', '.join(map(shlex.join, compilers))}")
    temporary = library.with_suffix(f".{os.getpid()}")
    command = [*compiler, "-shared", "-fPIC", "-O1", "-o", str(temporary), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    temporary.replace(library)
    return library


def _option(options: Sequence[str], name: str) -> str | None:
    """The value of an option, given as `--name value` or `--name=value`."""
    for number, given in enumerate(options):
        if given == name and number + 1 < len(options):
            return options[number + 1]
        if given.startswith(f"{name}="):
            return given.partition("=")[2]
    return None
