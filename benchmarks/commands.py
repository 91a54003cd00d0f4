"""Run `lbr` commands as a user would type them: what the quickstart and the paper's experiments are made of."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class Lbr:
    """Runs `lbr` commands in one folder; a failure ends everything with the end of its log."""

    def __init__(self, folder: Path, *, threads: int | None = 1, echo: bool = True) -> None:
        """`threads`: of each command's matrix library, None for its own choice; `echo`: print commands."""
        self.folder, self._echo = folder, echo
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self._environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if threads is not None:
            self._environment["OMP_NUM_THREADS"] = str(threads)

    def __call__(self, log: str, *arguments: str) -> str:
        """Run `lbr ARGUMENTS`, with its output in `logs/LOG.log`; returns the output."""
        if self._echo:
            print("    lbr " + " ".join(f"'{a}'" if set(a) & set(" ~*$") else a for a in arguments), flush=True)
        text, code = self.attempt(log, *arguments)
        if code:
            file = self.folder / "logs" / f"{log}.log"
            raise SystemExit(f"{text[-2000:]}\n`lbr {' '.join(arguments)}` failed; its log is {file}")
        return text

    def attempt(self, log: str, *arguments: str) -> tuple[str, int]:
        """As a call, but a failure is returned: output and exit code."""
        file = self.folder / "logs" / f"{log}.log"
        with file.open("w", encoding="utf-8") as sink:
            done = subprocess.run(
                [sys.executable, "-m", "lbr_dist", *arguments],
                cwd=self.folder,
                env=self._environment,
                stdout=sink,
                stderr=subprocess.STDOUT,
                check=False,
            )
        return file.read_text(encoding="utf-8"), done.returncode


def side_by_side(*jobs: Callable[[], object]) -> None:
    """Run functions in threads (each waits for processes); the first error ends the program."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()
