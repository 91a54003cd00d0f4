"""A rank that hangs must not hang the run in silence: no step for too long, and every rank shows where it stands.

When one rank is stuck, the others wait for it in a collective call, so all of them run out of time together; each
writes the Python stacks of all its threads to the run folder and to its error stream, and ends. The odd one out is the
culprit.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

EXIT_HUNG = 1
START_S = 3600.0
"""Time to load a model and compare checksums, before the first step."""
AWAY_S = 1.0
"""A thread that slept so much longer than it meant to was not run: the process was suspended, and no step was made."""
GRACE_S = 5.0
"""Between report and end: the other ranks started to wait a little later, and must not see a dead rank first."""


class Watchdog:
    """Context that ends the process when `alive`, once called, is not called again in time (`timeout_s` seconds)."""

    def __init__(self, run_dir: Path, rank: int, timeout_s: float) -> None:
        self._file = run_dir / "stacks" / f"rank-{rank}.txt"
        self._rank, self._doing = rank, "starting"
        self._step_timeout, self._timeout = timeout_s, max(timeout_s, START_S)
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def alive(self, doing: str, at_least_s: float = 0.0) -> None:
        """Progress was made; `doing` says what comes next, for the report, and may take `at_least_s` seconds."""
        self._last, self._doing, self._timeout = time.monotonic(), doing, max(self._step_timeout, at_least_s)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _watch(self) -> None:
        pause, seen = min(1.0, self._step_timeout / 4), time.monotonic()
        while not self._ended.wait(pause):
            now = time.monotonic()
            away, seen = now - seen - pause, now
            if away > AWAY_S:
                self._last = min(now, self._last + away)
            if now - self._last > self._timeout:
                threading.Thread(target=self._report, daemon=True).start()  # a file system may be what hangs
                time.sleep(GRACE_S)
                os._exit(EXIT_HUNG)

    def _report(self) -> None:
        line = f"rank {self._rank}: no progress for {self._timeout:g} s, while {self._doing}; Python stacks:"
        with contextlib.suppress(Exception):  # a host's stream may not be a file
            print(line, file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("w", encoding="utf-8") as file:
            print(line, file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)
