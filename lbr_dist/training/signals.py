"""Stop requests: the first SIGTERM, SIGUSR1, SIGINT or SIGHUP asks the loop to stop after its step, a later one ends at
once.

Slurm and Ray give notice before they take a machine away. A signal reaches the ranks at different moments, so what it
sets is only this rank's wish; the loop adds the wishes of all ranks up and all stop after the same step.

Where no signal reaches a rank (a Ray worker, whose main thread is Ray's; another machine), the file `stop` in the run
folder does: rank 0 reads it once a step and stops when it says anything (`echo maintenance > RUN/stop`). It is there
from the start and written in place, because opening a file that exists is what network file systems keep consistent;
a file that appears can stay unseen for a minute.

A signal to a Slurm job reaches no rank while srun, or torchrun's agent, has yet to start them. So the job scripts first
write it down (`asked/JOB-RESTART` in the run folder), and rank 0 looks once, when it listens.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from lbr_dist.disk import mark
from lbr_dist.environment import slurm_start

FILE = "stop"
ASKED = "asked"
REPEATED_S = 2.0
"""A signal so soon after the first is the same request: what is sent to all processes, a launcher passes on as well."""


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a run to stop; a lost terminal's SIGHUP is one, unless it is ignored (nohup)."""
    asking = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    return asking if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (*asking, signal.SIGHUP)


def request_stop(run_dir: Path, reason: str) -> None:
    """Ask the run in this folder to stop after its step; `reason`, one line, goes into its log. "" takes it back."""
    with (run_dir / FILE).open("w", encoding="utf-8") as file:
        file.write(reason)


def stop_requested(run_dir: Path) -> str:
    """What the folder's `stop` file says; "" is nothing, and so is a file that is not there."""
    try:
        return (run_dir / FILE).read_text(encoding="utf-8", errors="replace").strip()[:200]
    except OSError:
        return ""


def asked_before(run_dir: Path) -> bool:
    """Whether this start of a Slurm job was asked to stop already."""
    start = slurm_start(os.environ)
    return start is not None and (run_dir / ASKED / str(start)).is_file()


class FirstSignal:
    """The first signal asks to stop; a repetition within `REPEATED_S` changes nothing, a later one ends the process.

    Args:
        end: called with the exit code to end it; default: at once, without a word.
    """

    def __init__(self, end: Callable[[int], Any] | None = None) -> None:
        self.asked = ""
        """Name of the signal, or of whoever else asked."""
        self._at, self._end = -math.inf, end

    def receive(self, number: int) -> bool:
        """Take a signal; whether it is the first request."""
        now = time.monotonic()
        if not self.asked:
            self.asked, self._at = signal.Signals(number).name, now
            return True
        if now - self._at > REPEATED_S:
            (self._end or os._exit)(128 + number)
        return False


class StopRequest:
    """Context in which stop signals, and the `stop` file of a run folder, are noticed instead of ending the process.

    Args:
        run_dir: whose `stop` file to read; None (all ranks but 0): signals only.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        self._run_dir, self._signal = run_dir, FirstSignal()
        self._older = mark(run_dir / FILE) if run_dir is not None else None
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}

    def asked(self) -> str:
        """Who asked this rank to stop; "": nobody."""
        if not self._signal.asked and self._run_dir is not None:
            self._signal.asked = stop_requested(self._run_dir)
        return self._signal.asked

    def signalled(self) -> str:
        """The signal that asked this rank to stop; "": none. Before `begin` the file is for the run before."""
        return self._signal.asked

    def begin(self) -> None:
        """The folder is this run's now: what its file asked of an earlier start, before this was made, is forgotten."""
        if self._run_dir is not None and mark(self._run_dir / FILE) == self._older:
            request_stop(self._run_dir, "")

    def obeyed(self) -> None:
        """The run has stopped: its file asks for nothing more."""
        if self._run_dir is not None:
            request_stop(self._run_dir, "")

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere (a Ray worker) the host owns the signals
            self._before = {number: signal.signal(number, self._receive) for number in stop_signals()}
        if self._run_dir is not None and not self._signal.asked and asked_before(self._run_dir):
            self._signal.receive(signal.SIGUSR1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner:  # in a forked helper its parent decides
            self._signal.receive(number)
