"""What runs inside a Ray Train worker: this rank's environment, our training loop, and its end as Ray can carry it.

Ray Train has set up the process group by then (its rank 0 named its own node's address, so rank 0 sits where the ranks
meet) and calls `work` in a thread; signals go to Ray. Only plain values leave a worker: a result, or an exception that
the driver sorts by its type.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

from lbr_dist.environment import Environment
from lbr_dist.errors import UserError

STARTED = "started"
"""File in the attempt's folder: which holder of the run folder's lock rank 0 is; empty until it holds it."""
RESUME = "resume"
"""File in the attempt's folder: what these workers resume from."""
CONTROLLER = "controller"
"""File in the attempt's folder: the handle of Ray Train's controller, pickled."""


def work(config: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank.

    Args:
        config: `recipe` (a resolved recipe as a mapping), `allow_change`, `then` (None, or a recipe as the first),
            `attempt` (folder), `source` (for the log), `here` (the driver's working directory: a run that another
            launcher began may know relative paths).

    Returns:
        `step`, `total_steps` and `exit_code` of the outcome.

    Raises:
        UserError, FaultError: see `resume_from` and `train`.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    go_to(config["here"])
    environment = this_rank(config["source"])
    from lbr_dist.recipes import parse_recipe
    from lbr_dist.training.run import train
    from lbr_dist.training.run_lock import holder

    started, run_dir = Path(config["attempt"]) / STARTED, Path(config["recipe"]["output"])
    outcome = train(
        parse_recipe(config["recipe"], "the driver's recipe"),
        resume=resume_from(Path(config["attempt"]), run_dir, environment.rank),
        allow_change=config["allow_change"],
        then=config["then"] and parse_recipe(config["then"], "the driver's second recipe"),
        environment=environment,
        on_row=Gauges(config["recipe"]["output"]) if environment.rank == 0 else None,
        on_claim=lambda: started.write_text(holder(run_dir), encoding="utf-8"),
    )
    return {"step": outcome.step, "total_steps": outcome.total_steps, "exit_code": outcome.exit_code}


def resume_from(attempt: Path, run_dir: Path, rank: int) -> str:
    """What the workers of an attempt resume from.

    Raises:
        UserError: this node does not see what the driver's has written.
    """
    from lbr_dist.training.run_folder import in_time

    file = attempt / RESUME
    if not in_time(file.is_file):
        raise UserError(
            f"output {run_dir}: rank {rank} on {socket.gethostname()} does not see the folder that the driver made "
            "there: name a folder on storage that all nodes share, mounted at the same path, or leave that node out"
        )
    return file.read_text(encoding="utf-8")


def go_to(here: str) -> None:
    """Enter the driver's working directory, where this node has it: relative paths are those of the user."""
    with contextlib.suppress(OSError):
        os.chdir(here)


def claimed(attempt: Path) -> str:
    """Which holder of the run folder's lock an attempt is; "": it does not hold it yet."""
    try:
        return (attempt / STARTED).read_text(encoding="utf-8")
    except OSError:
        return ""


def is_ours(run_dir: Path, attempt: Path) -> bool:
    """Whether the run that is at work in the folder is this attempt's, and a stop request would be for it."""
    from lbr_dist.training.run_lock import holder

    return bool(claimed(attempt)) and claimed(attempt) == holder(run_dir)


def this_rank(source: str) -> Environment:
    """This worker among the ranks, from Ray Train's context."""
    import ray.train

    context = ray.train.get_context()
    return Environment(
        context.get_world_rank(),
        context.get_world_size(),
        context.get_local_rank(),
        context.get_local_world_size(),
        (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])),
        source,
    )


class Gauges:
    """Rows of metrics as Ray metrics, which each node exports for its dashboard and for Prometheus: `ray_lbr_loss`
    and so on, with the run's folder as the tag `run`."""

    def __init__(self, run: str) -> None:
        self._run = run.encode("ascii", "backslashreplace").decode("ascii")  # all that Ray's metrics take
        self._gauges: dict[str, Any] = {}

    def __call__(self, row: dict[str, Any]) -> None:
        """Set them to a row's values."""
        from ray.util.metrics import Gauge

        for key, value in row.items():
            if isinstance(value, int | float):
                if key not in self._gauges:
                    self._gauges[key] = Gauge(f"lbr_{key}", f"lbr_dist: {key}", tag_keys=("run",))
                self._gauges[key].set(value, tags={"run": self._run})
