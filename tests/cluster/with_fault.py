"""Stands in for Python in a job (`LBR_PYTHON`): `lbr train` is slowed down, or killed at once, on request.

PACE=0.5     seconds to wait after every step
CRASH=1      every rank is killed when it starts
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from typing import Any


def main(arguments: list[str]) -> None:
    arguments = [argument for argument in arguments if argument != "-u"]  # torchrun's
    assert arguments[0] == "-m", arguments
    module, sys.argv = arguments[1], ["lbr", *arguments[2:]]
    if "train" in arguments[:3]:
        if os.environ.get("CRASH"):
            os.kill(os.getpid(), signal.SIGKILL)
        _pace(float(os.environ.get("PACE", "0")))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _pace(seconds: float) -> None:
    from lbr_dist.training import run

    real = run._Loop._step

    def step(self: Any, *arguments: Any) -> bool:
        asked = real(self, *arguments)
        time.sleep(seconds)
        return asked

    run._Loop._step = step  # type: ignore[method-assign]


if __name__ == "__main__":
    main(sys.argv[1:])
