"""Stop requests: the first SIGTERM or SIGUSR1 asks the loop to stop after its step, the second ends at once.

Slurm and Ray give notice before they take a machine away. A signal reaches the ranks at different moments, so what it
sets is only this rank's wish; the loop adds the wishes of all ranks up and all stop after the same step.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Context in which stop signals set `asked` instead of ending the process."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere (a Ray worker) the host owns the signals
            self._before = {number: signal.signal(number, self._receive) for number in NUMBERS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked helper: its parent decides
            return
        if self.asked is not None:
            os._exit(128 + number)
        self.asked = signal.Signals(number).name
