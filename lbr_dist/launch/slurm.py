"""What a Slurm job decides at its start and at its end: may it start, which ports, and is it to run again.

The scripts in `slurm/` only trap, start and wait; they ask here. Each start and end of a job is one row in
`RUN/slurm.jsonl`, which is how a requeued job knows what happened before, whoever requeued it: the script, or Slurm
after a lost node or a preemption. It runs several times in every job, and imports nothing that takes long: no torch.

    python -m lbr_dist.launch.slurm begin --stage generative --ports 1 RECIPE [key=value ...]    prints free ports, and
                                                          below them what to resume from, where it is not what was said
    python -m lbr_dist.launch.slurm end --code 75 [--asked] RECIPE [key=value ...]               prints requeue, stop,
                                                          mistake or complete; with --output of the run
                                                          folder, whatever the recipe says by then
    python -m lbr_dist.launch.slurm output RECIPE [key=value ...]                                prints the run folder
    python -m lbr_dist.launch.slurm chain --then STAGE2 [--out OUT] [--tokens N] STAGE1
                                                          prints both run folders, the second's first set, and
                                                          the override with which it starts from the first
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lbr_dist.config import Recipe
from lbr_dist.environment import SlurmStart, slurm_start
from lbr_dist.errors import EXIT_RUN_AGAIN, EXIT_USER_ERROR, UserError, told
from lbr_dist.launch.delivery import check_delivery
from lbr_dist.launch.ports import free_ports
from lbr_dist.launch.slurm_words import FINISHED, HISTORY, word
from lbr_dist.logs import is_torn, read_rows
from lbr_dist.recipes import load_recipe, override
from lbr_dist.training.chain import load_next
from lbr_dist.training.checkpoint.listing import progress

MAX_RESTARTS = 3
"""Restarts without a new checkpoint after which a job is not started again."""
_SCRIPTS = {"generative": "slurm/stage1.sh", "contrastive": "slurm/stage2.sh", "joint": "slurm/stage2.sh"}


@dataclass(frozen=True)
class Attempt:
    """This start of this job."""

    start: SlurmStart
    nodes: str
    limit: int
    """Restarts without progress that are allowed."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Attempt:
        """Read Slurm's variables.

        Raises:
            UserError: not in a job, or `LBR_MAX_RESTARTS` is not a number.
        """
        start = slurm_start(environ)
        if start is None:
            raise UserError("SLURM_JOB_ID is not set, or no number: this is for the scripts in slurm/, by sbatch")
        limit = environ.get("LBR_MAX_RESTARTS") or str(MAX_RESTARTS)
        if not limit.isdigit():
            raise UserError(f"LBR_MAX_RESTARTS={limit}: expected a number of restarts")
        return cls(start, environ.get("SLURM_JOB_NODELIST", ""), int(limit))


@dataclass(frozen=True)
class Decision:
    """What becomes of a job whose run has ended."""

    verdict: Literal["requeue", "stop", "mistake", "complete"]
    """The word for the scripts."""
    reason: str

    @property
    def requeue(self) -> bool:
        """Whether it is to start again."""
        return self.verdict == "requeue"


def decide(code: int, *, asked: bool, idle: int, limit: int) -> Decision:
    """Requeue a job or not.

    Args:
        code: exit code of the run; 128 + n for signal n.
        asked: whether the job was asked to stop (the time limit is near).
        idle: starts of this job that began with the newest checkpoint that there is, this one included.
        limit: restarts without progress that are allowed.
    """
    if code == 0:
        return Decision("complete", "the run is complete")
    if code == EXIT_USER_ERROR:
        return Decision("mistake", "running again would end the same way: the message above says what to change")
    what = "stopped on request" if code == EXIT_RUN_AGAIN or asked else f"ended with code {code}"
    if idle > limit:
        spent = f"{idle} starts without a new checkpoint are as many as LBR_MAX_RESTARTS allows"
        return Decision("stop", f"{what}; {spent}")
    return Decision("requeue", f"{what}; it goes on from its newest checkpoint")


def begin(recipe: Recipe, attempt: Attempt, resume: str = "auto") -> str:
    """Write down that the job starts.

    Args:
        recipe: of the run.
        attempt: this start.
        resume: what the job was submitted with.

    Returns:
        What this start is to resume from: `auto` once the job has a checkpoint, or a run folder, of its own.

    Raises:
        UserError: it made no progress in too many starts, or the run folder cannot be written.
    """
    folder = Path(recipe.output)
    history = read_rows(folder / HISTORY)
    sequence, step = progress(folder)
    idle = idle_starts(history, attempt.start.job, sequence)
    if idle > attempt.limit:
        raise UserError(
            f"job {attempt.start.job}: {idle} starts without a new checkpoint (newest: step {step}): not started "
            f"again; look for the cause in this log, then submit a new job, which goes on from there"
        )
    newest = {"step": step, "sequence": sequence}
    _append(folder, {"event": "start", **_identity(attempt), "nodes": attempt.nodes, **newest})
    found = next((row.get("sequence") for row in _starts(history, attempt.start.job)), None)  # by the job's first start
    own = found is not None and (found != sequence or (found == 0 and resume == "never"))
    return "auto" if own else resume


def end(recipe: Recipe, attempt: Attempt, code: int, *, asked: bool) -> Decision:
    """Decide what becomes of the job and write it down; a rank's word counts more than the code, of a mistake as of the
    end: without that one a code of 0 is srun's, of a lost node, and counts as 1.

    Raises:
        UserError: the run folder cannot be written, so that restarts could not be counted.
    """
    folder = Path(recipe.output)
    if code != 0 and word(folder, attempt.start).exists():
        code = EXIT_USER_ERROR
    elif code == 0 and not word(folder, attempt.start, FINISHED).exists():
        code = 1
    sequence, step = progress(folder)
    idle = idle_starts(read_rows(folder / HISTORY), attempt.start.job, sequence)
    decision = decide(code, asked=asked, idle=idle, limit=attempt.limit)
    row = {"code": code, "asked": asked, "step": step, "requeue": decision.requeue, "reason": decision.reason}
    _append(folder, {"event": "end", **_identity(attempt), **row})
    return decision


def idle_starts(history: Sequence[Mapping[str, Any]], job: int, sequence: int) -> int:
    """Starts of a job that already had as much as there is now."""
    return sum(row.get("sequence", 0) >= sequence for row in _starts(history, job))


def _starts(history: Sequence[Mapping[str, Any]], job: int) -> list[Mapping[str, Any]]:
    return [row for row in history if row["event"] == "start" and row["job"] == job]


def _identity(attempt: Attempt) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"job": attempt.start.job, "restart": attempt.start.restart, "time": now}


def _append(folder: Path, row: dict[str, Any]) -> None:
    file = folder / HISTORY
    try:
        folder.mkdir(parents=True, exist_ok=True)
        line_break = "\n" * is_torn(file)
        with file.open("a", encoding="utf-8") as rows:
            rows.write(line_break + json.dumps(row) + "\n")
            rows.flush()
            os.fsync(rows.fileno())
    except OSError as error:
        raise UserError(f"{file}: cannot be written on {socket.gethostname()}: {error.strerror}") from error


def main(arguments: Sequence[str]) -> int:
    """The scripts' side of this module."""
    parser = argparse.ArgumentParser(prog="slurm", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("command", choices=("begin", "end", "output", "chain"))
    parser.add_argument("--then")
    parser.add_argument("--out")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--output")
    parser.add_argument("--stage", choices=tuple(_SCRIPTS))
    parser.add_argument("--ports", type=int, default=1)
    parser.add_argument("--code", type=int, default=1)
    parser.add_argument("--asked", action="store_true")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    for option in ("--resume", "--allow-change"):  # for the run: the scripts give it the same arguments
        parser.add_argument(option, action="append")
    given = parser.parse_intermixed_args(arguments)
    try:
        return _run(given)
    except (UserError, PermissionError) as error:
        return told(error)


def _run(given: argparse.Namespace) -> int:
    recipe = load_recipe(given.recipe, given.overrides)
    if given.command == "output":
        print(recipe.output)
    elif given.command == "chain":
        second = load_next(recipe, given.recipe, given.then)
        check_delivery(second, given.out, given.tokens)
        start = override("model.start_from", recipe.output)
        print(recipe.output, second.output, second.data.sets[0].path, start, sep="\n")
    elif given.command == "begin":
        if given.stage and _SCRIPTS[recipe.stage] != _SCRIPTS[given.stage]:
            raise UserError(f"recipe {given.recipe}: stage is {recipe.stage}: submit {_SCRIPTS[recipe.stage]}")
        attempt = Attempt.from_environment(os.environ)
        ports = free_ports(given.ports, attempt.start, os.environ.get("MASTER_PORT"))
        said = given.resume[-1] if given.resume else "auto"
        resume = begin(recipe, attempt, said)
        print(*ports)
        if resume != said:
            print(resume)
    else:
        if given.output:
            recipe = recipe.model_copy(update={"output": given.output})
        decision = end(recipe, Attempt.from_environment(os.environ), given.code, asked=given.asked)
        print(f"lbr: {decision.reason}", file=sys.stderr)
        print(decision.verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
