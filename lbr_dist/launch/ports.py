"""TCP ports that are free on this machine."""

from __future__ import annotations

import socket

from lbr_dist.environment import SlurmStart
from lbr_dist.errors import UserError

PORTS, BLOCK = range(20_000, 32_000), 16
"""Below Linux's ephemeral ports, in blocks: each job and each of its attempts begins at a block of its own."""


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def free_ports(count: int, start: SlurmStart, wanted: str | None = None) -> list[int]:
    """TCP ports that nothing listens on, on this machine, at this moment.

    Args:
        count: how many.
        start: two jobs on one machine, or two starts of one job, begin to look at different places.
        wanted: `MASTER_PORT`, where the user chose one: the first of the list.

    Raises:
        UserError: the wanted port is taken, or none.
    """
    blocks = len(PORTS) // BLOCK
    first = (7 * start.job + start.restart) % blocks * BLOCK
    candidates = [PORTS[(first + offset) % len(PORTS)] for offset in range(len(PORTS))]
    found: list[int] = []
    if wanted:
        if not wanted.isdecimal() or not 0 < int(wanted) < 65_536:
            raise UserError(f"MASTER_PORT={wanted}: is no port: unset it, or choose one of 1 to 65535")
        if not is_free(int(wanted)):
            raise UserError(f"MASTER_PORT={wanted}: taken on {socket.gethostname()}: unset it, or choose another")
        found.append(int(wanted))
    for port in candidates:
        if len(found) == count:
            return found
        if port not in found and is_free(port):
            found.append(port)
    raise UserError(f"{socket.gethostname()}: no {count} free ports between {PORTS[0]} and {PORTS[-1]}")


def is_free(port: int) -> bool:
    """Whether a TCP port can be listened on, on every address of this machine."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError:
            return False
    return True
