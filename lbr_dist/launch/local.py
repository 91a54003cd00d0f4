"""`lbr train --nproc N`: N ranks on this machine, started, watched and ended together.

What torchrun does, without its rendezvous and restarts: one failed rank ends the others within seconds (they would wait
for it in a collective call for half an hour), the message shown is that of the rank that failed first and not of those
it took along, and exit codes keep their meaning: 0 done, 2 nothing to retry, 75 run me again, 1 anything else.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from lbr_dist.config import Recipe
from lbr_dist.environment import detect
from lbr_dist.errors import EXIT_RUN_AGAIN, EXIT_USER_ERROR, UserError
from lbr_dist.launch.ports import free_port
from lbr_dist.recipes import load_recipe, save_recipe
from lbr_dist.training.signals import FirstSignal, stop_signals

GRACE_S = 3.0
"""Time that the other ranks have to say their last words once one has failed."""
STOP_S = 300.0
"""Time that the other ranks have to finish once one has stopped on request."""
POLL_S = 0.05
TAIL_LINES = 40
THEN = "then.yaml"
"""Beside the recipe of the ranks, that of the run after theirs, where there is one."""


def launch(
    recipe: Recipe,
    nproc: int,
    *,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    then: Recipe | None = None,
) -> int:
    """Run `train`, which has the same arguments, on `nproc` ranks; returns the exit code.

    SIGTERM, SIGUSR1, SIGINT and SIGHUP are passed on to every rank; a second one, later, ends them all. Rank 0 writes
    to this process's output, the others' is kept and shown if they are the cause of a failure.

    Raises:
        UserError: this process is one of several ranks itself.
    """
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: expected at least 1")
    _check_alone(nproc)
    with tempfile.TemporaryDirectory(prefix="lbr-launch-") as folder:
        file = Path(folder) / "recipe.yaml"
        save_recipe(recipe, file)
        if then is not None:
            save_recipe(then, file.with_name(THEN))
        ranks = _Ranks(Path(folder), Path(recipe.output))
        before = {number: signal.signal(number, ranks.forward) for number in stop_signals()}
        try:
            ranks.start([str(file), resume, *allow_change], nproc)
            return ranks.wait()
        finally:
            ranks.kill()
            for number, handler in before.items():
                signal.signal(number, handler)


def _check_alone(nproc: int) -> None:
    """Each of several launchers would start a run of its own, all but one of them to wait for the folder in vain."""
    try:
        here = detect()
    except UserError:  # half-set variables: each rank gets whole ones
        return
    if here.world > 1:
        raise UserError(
            f"--nproc {nproc}: this process is rank {here.rank} of {here.world} already ({here.source}): leave --nproc "
            "out, and have that launcher start one process for each rank"
        )


class _Ranks:
    def __init__(self, folder: Path, run_dir: Path) -> None:
        self._folder, self._processes = folder, list[subprocess.Popen[bytes]]()
        self._stacks = run_dir / "stacks" / "rank-0.txt"  # of the one rank whose stream is not kept
        self._old_stacks = self._written()
        self._asked, self._signal = 0, FirstSignal(sys.exit)

    def start(self, arguments: list[str], nproc: int) -> None:
        shared = {
            **os.environ,
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "LBR_LAUNCHER": f"lbr --nproc {nproc}",
            "LBR_LAUNCHER_PID": str(os.getpid()),
        }
        shared.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # an outer torchrun's: rank 0 would wait for its agent's store
        shared.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
        for rank in range(nproc):
            output: IO[bytes] | None = self._output(rank).open("wb") if rank else None
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "lbr_dist.launch.local", *arguments],
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # a Ctrl-C reaches them once, through `forward`
                )
            )
            if output:
                output.close()

    def wait(self) -> int:
        stopped_at = None
        while True:
            codes = [process.poll() for process in self._processes]
            failed = [rank for rank, code in enumerate(codes) if code not in (None, 0, EXIT_RUN_AGAIN)]
            if failed:
                return self._failed(failed)
            if None not in codes:
                return EXIT_RUN_AGAIN if EXIT_RUN_AGAIN in codes else 0
            if stopped_at is None and any(code is not None for code in codes):
                stopped_at = time.monotonic()
            if stopped_at is not None and time.monotonic() - stopped_at > STOP_S:
                waiting = [rank for rank, code in enumerate(codes) if code is None]
                print(f"error: ranks {waiting} did not end with the others; killed", file=sys.stderr)
                return 1
            time.sleep(POLL_S)

    def _failed(self, failed: list[int]) -> int:
        """End everything, and tell whose fault it was: of those seen together, one killed from outside comes first."""
        first = min(failed, key=lambda rank: (self._processes[rank].returncode > 0, rank))
        code = self._processes[first].returncode
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(process.poll() is None for process in self._processes):
            time.sleep(POLL_S)
        running = [rank for rank, process in enumerate(self._processes) if process.poll() is None]
        self.kill()
        if self._asked and code == -self._asked:
            print("stopped on request before the run had begun", file=sys.stderr)
            return EXIT_RUN_AGAIN
        if code == EXIT_USER_ERROR:
            if self._processes[0].returncode != EXIT_USER_ERROR:
                self._show(first)
            return EXIT_USER_ERROR
        for rank in range(1, len(self._processes)):
            if rank == first or self._reported(rank):
                self._show(rank)
        hung = [rank for rank in running if not self._reported(rank)]
        if hung and self._reported(first):
            who = f"rank {hung[0]}" if len(hung) == 1 else f"ranks {', '.join(map(str, hung))}"
            print(f"error: {who} hung (no report); rank {first} waited in vain; all were ended", file=sys.stderr)
            return 1
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        print(f"error: rank {first} failed ({how}); the other ranks were ended", file=sys.stderr)
        return 1

    def _reported(self, rank: int) -> bool:
        """Whether a rank has said, when it had waited for too long, where it stood."""
        if rank:
            return b"Python stacks:" in self._output(rank).read_bytes()
        return self._written() != self._old_stacks

    def _written(self) -> int:
        try:
            return self._stacks.stat().st_mtime_ns
        except OSError:
            return 0

    def _show(self, rank: int) -> None:
        if rank:
            lines = self._output(rank).read_text(encoding="utf-8", errors="replace").splitlines()
            for line in lines[-TAIL_LINES:]:
                print(f"[rank {rank}] {line}", file=sys.stderr)

    def _output(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.txt"

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on, all but SIGUSR1 as SIGTERM: of SIGINT a rank that still imports would make a traceback.

        The second request is obeyed here: a rank that waits for a hung one, within a call, notices no signal.
        """
        if not self._signal.receive(number):
            return
        number = self._asked = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()


def worker(file: str, resume: str, *allow_change: str) -> int:
    """What each rank runs."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives a killed launcher
    if os.getppid() != int(os.environ["LBR_LAUNCHER_PID"]):
        return 1
    from lbr_dist.training.faults import FaultError
    from lbr_dist.training.run import train

    try:
        then = Path(file).with_name(THEN)
        following = load_recipe(then) if then.exists() else None
        return train(load_recipe(file), resume=resume, allow_change=allow_change, then=following).exit_code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except FaultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(worker(*sys.argv[1:]))
