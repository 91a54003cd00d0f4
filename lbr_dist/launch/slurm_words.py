"""The word that is left under Slurm where srun's exit code may say otherwise.

srun reports the highest exit code of its tasks, so that a rank which hangs, and is killed when another has ended with
2, hides the 2: the job would run again, to end the same way. So does a node that cannot start Python. And where a node
is lost it may say 0 of a run that has not finished. The word, of a mistake or of the run's end, is a file in the run
folder, for this start of the job.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lbr_dist.environment import SlurmStart, slurm_start
from lbr_dist.errors import UserError

FOLDER = "mistakes"
FINISHED = "finished"
"""Folders of the words."""
HISTORY = "slurm.jsonl"
"""Starts and ends of jobs in the run folder: where there is none, nobody asks for a word."""


def word(run_dir: Path, start: SlurmStart, folder: str = FOLDER) -> Path:
    """The file of a start of a job."""
    return run_dir / folder / str(start)


@contextlib.contextmanager
def left(run_dir: Path) -> Iterator[None]:
    """Context of a rank: a `UserError` leaves the word on its way out."""
    try:
        yield
    except UserError:
        leave(run_dir)
        raise


def leave(folder: Path, kind: str = FOLDER) -> None:
    """Leave a word, where the folder is the run folder of one of the scripts' jobs."""
    start = slurm_start(os.environ)
    if start and (folder / HISTORY).is_file():
        with contextlib.suppress(OSError):
            file = word(folder, start, kind)
            file.parent.mkdir(exist_ok=True)
            file.touch()
