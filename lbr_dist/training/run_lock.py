"""One run at a time in a run folder: a second one would remove the checkpoints that the first one goes on from.

Rank 0 holds a lock on `RUN/lock` (flock), which ends with the process, however it ends, and writes into the file who
holds it. A start that finds it held waits a while, because the attempt before may still be ending. On a network file
system the lock of a machine that is gone can outlast it; so the holder touches the file every few seconds, and a lock
of another machine whose file has not been touched for long is taken over.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lbr_dist.disk import take_lock
from lbr_dist.environment import slurm_start
from lbr_dist.errors import UserError

log = logging.getLogger("lbr")

LOCK = "lock"
TOUCH_S = 10.0
"""Seconds between two signs of life."""
PATIENCE_S = 120.0
"""How long a start waits for a holder that lives: as long as ranks that lost contact may need to end."""
GONE_S = 180.0
"""Without a sign of life for so long, a holder on another machine is gone."""


def holder(folder: Path) -> str:
    """Who holds, or held last, the lock of a run folder; "" where nobody ever did."""
    try:
        return (folder / LOCK).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


class RunLock:
    """Context that gives the lock back, if `take` was called.

    Args:
        folder: of the run.
        asked: who asked this start to stop, "" for nobody; one that waits for the lock obeys.
    """

    def __init__(self, folder: Path, asked: Callable[[], str] = lambda: "") -> None:
        self._asked = asked
        self._folder, self._path = folder, folder / LOCK
        self._file: IO[str] | None = None
        start = slurm_start(os.environ)
        self._job = f" of Slurm job {start.job}, restart {start.restart}" if start else ""
        self._mine = f"process {os.getpid()}{self._job} on {socket.gethostname()}"  # a machine's name may change
        self._ended = threading.Event()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self) -> bool:
        """Hold the lock, after waiting for it if need be; False: asked to stop before that was over.

        Raises:
            UserError: another run is in progress in the folder.
            RuntimeError: it is that of an earlier start of this Slurm job, whose end Slurm did not see: no mistake of
                the user, and a later start may find it ended.
        """
        began = seen = time.monotonic()
        self._folder.mkdir(parents=True, exist_ok=True)
        last, alive = 0.0, False
        while not self._try():
            holder, touched = self._look()
            now = time.monotonic()
            if not last:
                log.info("%s: %s is at work there; waiting for its end", self._folder, holder)
            elif touched != last:
                seen, alive = now, True
            last = touched
            here = holder.endswith(f" on {socket.gethostname()}")
            if (here or alive) and now - began > PATIENCE_S:
                if self._earlier(holder):
                    raise RuntimeError(f"{self._folder}: {holder}, of an earlier start of this job, is still at work")
                raise UserError(
                    f"output {self._folder}: {holder} is at work there: let it end or stop it, or choose another output"
                )
            if not here and now - seen > GONE_S:
                log.info("%s: no sign of life of %s for %.0f s; taking over", self._folder, holder, now - seen)
                self._path.unlink(missing_ok=True)
            if self._asked():
                return False
            time.sleep(0.2)
        threading.Thread(target=self._live, name="run-lock", daemon=True).start()
        return True

    def check(self) -> bool:
        """Whether the run folder is still there, for a run that holds its lock; True for any other.

        Raises:
            UserError: another run has taken over, as it may when this one gave no sign of life for so long.
        """
        if self._file is None:
            return True
        try:
            now = self._path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return False
        except OSError:  # storage that fails says nothing about the lock
            return True
        if now != self._mine:
            raise UserError(
                f"output {self._folder}: {now or 'another run'} took the folder over while this run ({self._mine}) was "
                "suspended or cut off: that one goes on, from the newest checkpoint"
            )
        return True

    def _earlier(self, holder: str) -> bool:
        job, _, start = self._job.rpartition(" ")
        return bool(job) and f"{job} " in holder and f"{job} {start} " not in holder

    def _try(self) -> bool:
        """Take the lock if it is free; where the file system has no locks, say so and go on without."""
        file = self._path.open("a+", encoding="utf-8")
        if not take_lock(file.fileno(), self._path):
            file.close()
            return False
        file.truncate(0)
        file.write(f"{self._mine}\n")
        file.flush()
        os.fsync(file.fileno())  # other machines ask `holder`
        self._file = file
        return True

    def _look(self) -> tuple[str, float]:
        """Who holds the lock, and when the file was touched."""
        try:
            return self._path.read_text(encoding="utf-8").strip() or "another run", self._path.stat().st_mtime
        except FileNotFoundError:
            return "another run", 0.0

    def _live(self) -> None:
        while not self._ended.wait(TOUCH_S):
            try:
                os.utime(self._path)
            except OSError as error:
                log.warning("%s: cannot be touched (%s)", self._path, error)
