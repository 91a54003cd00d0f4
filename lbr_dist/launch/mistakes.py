"""The word that a rank, or the check of the nodes, leaves under Slurm when it ends for a mistake.

srun reports the highest exit code of its tasks, so that a rank which hangs, and is killed when another has ended with
2, hides the 2: the job would run again, to end the same way. So does a node that cannot start Python. The word is a
file in the run folder, for this start of the job.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lbr_dist.errors import UserError

FOLDER = "mistakes"
HISTORY = "slurm.jsonl"
"""Starts and ends of jobs in the run folder: where there is none, nobody asks for a word."""


def word(run_dir: Path, job: int, restart: int) -> Path:
    """The file of a start of a job."""
    return run_dir / FOLDER / f"{job}-{restart}"


@contextlib.contextmanager
def left(run_dir: Path) -> Iterator[None]:
    """Context of a rank: a `UserError` leaves the word on its way out."""
    try:
        yield
    except UserError:
        leave(run_dir)
        raise


def leave(folder: Path) -> None:
    """Leave the word, where the folder is the run folder of one of the scripts' jobs."""
    job, restart = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT") or "0"
    if job.isdigit() and restart.isdigit() and (folder / HISTORY).is_file():
        with contextlib.suppress(OSError):
            file = word(folder, int(job), int(restart))
            file.parent.mkdir(exist_ok=True)
            file.touch()
