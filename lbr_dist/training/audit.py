"""Proof that every sample was used exactly once per epoch, in plan order, whatever restarts there were.

Each rank appends one line per step with the ids of its samples, and one line when it starts:

    {"start": 300, "attempt": 2, "world": 4, "plan": "9f...", "saves": "1c..."}
    {"step": 300, "attempt": 2, "epoch": 0, "ids": ["chebi:15365:2", ...]}

A log's `step` counts from 0, messages from 1, as metrics and log.txt do. Each step names its start: one that was
suspended until another took the folder over may still write a few.

A step that was done, lost with the process and done again counts once: a start at step s takes back everything that
earlier attempts did from s on, just as loading the checkpoint did. What remains is the run's history, and is compared
with the plan. It must reach to the last start, and to the last checkpoint of that start (`saves` is the `attempt` in
its manifest): rows that are gone, a rank's whole log among them, are not taken for steps that were under way.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lbr_dist.errors import UserError
from lbr_dist.logs import is_torn, iterate_rows, no_rows, open_log
from lbr_dist.training.run_recipe import load_run_recipe, started_in

if TYPE_CHECKING:
    from lbr_dist.config import Recipe
    from lbr_dist.data.assemble import LocalBatch
    from lbr_dist.data.plan import Plan, Source
    from lbr_dist.data.shard_reader import ShardReader

FOLDER = "audit"
SHARED = ("start", "world", "plan", "saves")
"""What all ranks have alike in the line of a start."""


class AuditLog:
    """One rank's log. A line reaches the operating system before the next step starts, so SIGKILL loses none."""

    def __init__(
        self, run_dir: Path, rank: int, *, start: int, attempt: int, world: int, plan: str, saves: str = ""
    ) -> None:
        file = run_dir / FOLDER / f"rank-{rank}.jsonl"
        torn = is_torn(file)
        self._file: TextIO = open_log(file)
        if torn:
            self._file.write("\n")
        self._attempt = attempt
        self._write({"start": start, "attempt": attempt, "world": world, "plan": plan, "saves": saves})

    def step(self, step: int, epoch: int, batches: Sequence[LocalBatch]) -> None:
        """Log a finished step. In stage 2 a pair is logged once, by its query."""
        ids = [
            id_
            for batch in batches
            for id_, sample in zip(batch.ids, batch.samples, strict=True)
            if sample.side in ("x", "query")
        ]
        self._write({"step": step, "attempt": self._attempt, "epoch": epoch, "ids": ids})

    def sync(self) -> None:
        """Force the rows to disk; before a checkpoint that contains their steps."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


@dataclass
class Audit:
    """What an audit found; no `problems` means that the history is what the plan says."""

    steps: int = 0
    samples: int = 0
    attempts: int = 0
    redone: int = 0
    """Steps done more than once, because a restart took them back."""
    unplanned: int = 0
    """Steps of an earlier plan than the recipe's (`--allow-change`): there is nothing left to compare them with."""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        verdict = "as planned" if not self.problems else f"{len(self.problems)} problems"
        left_out = f", but for {self.unplanned} steps from before the data order was changed (not compared)"
        return (
            f"{self.steps} steps, {self.samples} samples, {self.attempts} starts, {self.redone} steps done again: "
            f"{verdict}{left_out * bool(self.unplanned)}"
        )


def last_attempt(run_dir: Path) -> int:
    """Number of the latest start in any rank's log; 0 where there is none."""
    starts = (row for file in _files(run_dir) for row in iterate_rows(file, holding=b'"start"'))
    return max((row["attempt"] for row in starts if "start" in row), default=0)  # a sample's id may be "start"


def any_step(run_dir: Path) -> bool:
    """Whether any rank logged a step."""
    return any("step" in row for file in _files(run_dir) for row in iterate_rows(file, holding=b'"step"'))


@dataclass
class _Attempt:
    file: Path
    """The first log that has it."""
    start: int
    world: int
    plan: str
    saves: str
    ids: dict[int, dict[int, list[str]]] = field(default_factory=dict)
    """Step, to rank, to sample ids."""


def audit(run_dir: str | Path) -> Audit:
    """Read the logs of a run and compare its history with its plan.

    The plan is made again from `recipe.yaml` and the prepared sets, which must still be there (by relative paths from
    where the run was started).

    Raises:
        UserError: not a run with an audit log that can be read, or the plan cannot be made.
    """
    run_dir = Path(run_dir)
    result = Audit()
    found = _attempts(run_dir, result.problems)
    if not found and result.problems:
        raise UserError(f"{result.problems[0]}: put a whole copy in its place")
    if not found:
        raise UserError(f"{run_dir}: has no audit log (audit/rank-*.jsonl): not a run, or it never started")
    result.attempts = len(found)
    history: dict[int, list[str]] = {}
    plans: dict[int, str] = {}
    for attempt in found:  # in order: a later one takes back the steps from its start on
        taken_back = [step for step in history if step >= attempt.start]
        result.redone += len(taken_back)
        for step in taken_back:
            del history[step]
        for step, ranks in attempt.ids.items():
            if len(ranks) == attempt.world:  # else the step was under way on some ranks when the run ended
                history[step] = [id_ for rank in sorted(ranks) for id_ in ranks[rank]]
                plans[step] = attempt.plan
    result.steps, result.samples = len(history), sum(map(len, history.values()))
    end = max([_reached(run_dir, found[-1]), *(step + 1 for step in history)])
    result.problems += _gaps(run_dir, found, [step for step in range(end) if step not in history])
    recipe = load_run_recipe(run_dir)
    with contextlib.chdir(started_in(run_dir, recipe)):
        plan, readers = _plan_of(recipe)
        # A start that made no step has the recipe as its own; one of a run that was complete has not
        if plan.fingerprint not in (found[-1].plan, plans[max(history)] if history else ""):
            raise UserError(
                f"{run_dir}: the prepared sets or the recipe changed since the run; audit with the old ones"
            )
        planned = {step: ids for step, ids in history.items() if plans[step] == plan.fingerprint}
        result.unplanned = len(history) - len(planned)
        _compare(plan, readers, planned, result)
    return result


def _reached(run_dir: Path, last: _Attempt) -> int:
    """Steps that the run has made for certain: those before its last start, and those that this start has saved."""
    from lbr_dist.training.checkpoint.listing import list_checkpoints

    saved = [m.step for _, m in list_checkpoints(run_dir) if m is not None and m.attempt == last.saves]
    return max([last.start, *saved])


def _gaps(run_dir: Path, found: Sequence[_Attempt], missing: Sequence[int]) -> Iterator[str]:
    """In words, the steps without a record, and the logs that lack them."""

    def why(step: int) -> str:
        made = next((attempt for attempt in reversed(found) if attempt.start <= step), None)
        if made is None:
            return "no log has the start that made it"
        lacking = [rank for rank in range(made.world) if rank not in made.ids.get(step, {})]
        logs = ", ".join(_named(run_dir / FOLDER / f"rank-{rank}.jsonl") for rank in lacking[:3])
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        return f"not in {logs}{more} (the start had {made.world} ranks)"

    for (_, reason), group in groupby(enumerate(missing), lambda item: (item[1] - item[0], why(item[1]))):
        steps = [step + 1 for _, step in group]
        yield f"step {steps[0]}{f' to {steps[-1]}' * (len(steps) > 1)}: no record: {reason}"


def _named(file: Path) -> str:
    if not file.exists():
        return f"{file}, which is missing"
    return str(file) if file.is_dir() or file.stat().st_size else f"{file}, which is empty"


def _plan_of(recipe: Recipe) -> tuple[Plan, list[ShardReader]]:
    from lbr_dist.data.plan import open_data
    from lbr_dist.model.tokenizer import Tokenization

    return open_data(recipe, Tokenization.load(recipe.model.path))


def _compare(plan: Plan, readers: Sequence[ShardReader], history: dict[int, list[str]], result: Audit) -> None:
    """Compare each step's samples, and each epoch's, with the plan."""
    ids = [reader.index.ids for reader in readers]
    used = {number: (0, Counter[int]()) for number in range(len(plan.sources))}
    """Of each set: the epoch under way, and how often it used each row."""
    for step in sorted(history):
        planned = plan.step(step)
        refs = planned.refs()
        names = [str(ids[ref.set][ref.row]) for ref in refs]
        if sorted(names) != sorted(history[step]):
            strange = sorted((Counter(history[step]) - Counter(names)).keys())[:3]
            lacking = sorted((Counter(names) - Counter(history[step])).keys())[:3]
            result.problems.append(f"step {step + 1}: not the planned samples (extra {strange}, missing {lacking})")
        for epoch, ref in planned.uses():
            if used[ref.set][0] != epoch:
                _check_epoch(plan.sources[ref.set], *used[ref.set], result)
                used[ref.set] = epoch, Counter()
            used[ref.set][1][ref.row] += 1
    for number, (epoch, counts) in used.items():
        _check_epoch(plan.sources[number], epoch, counts, result)


def _check_epoch(source: Source, epoch: int, counts: Counter[int], result: Audit) -> None:
    """No row more often than there are passes over the set that the epoch has a part of."""
    weight = Fraction(str(source.weight))
    most = math.ceil((epoch + 1) * weight) - math.floor(epoch * weight)
    if twice := sum(count > most for count in counts.values()):
        result.problems.append(f"epoch {epoch}: {twice} samples of {source.name} more than {most} times")


def _attempts(run_dir: Path, problems: list[str]) -> list[_Attempt]:
    """The starts in the logs, in order, with their steps; `problems` gets what no log of one run has."""
    attempts: dict[int, _Attempt] = {}
    for file in _files(run_dir):
        _read(file, attempts, problems)
    return [attempts[number] for number in sorted(attempts)]


def _read(file: Path, attempts: dict[int, _Attempt], problems: list[str]) -> None:
    """Add a rank's log to the starts."""
    rank, lost = int(file.stem.removeprefix("rank-")), 0
    current: int | None = None
    reached: dict[int, int] = {}  # of each start, the last step in this log
    misplaced: dict[int, list[str]] = {}
    unreadable: list[int] = []
    for count, row in enumerate(iterate_rows(file, unreadable=unreadable), 1):
        line = f"{file} line {count + len(unreadable)}"
        if {"start", "attempt", "world", "plan"} <= row.keys():
            if current is not None and row["attempt"] <= current:
                problems.append(
                    f"{line}: start {row['attempt']} after start {current}, so the rest is of another run, and is not "
                    "read: put the run's own log in its place"
                )
                break
            current = row["attempt"]
            made = _Attempt(file, row["start"], row["world"], row["plan"], row.get("saves", ""))
            first = attempts.setdefault(row["attempt"], made)
            other = [key for key in SHARED if getattr(made, key) != getattr(first, key)]
            said = ", ".join(f"{key} is {getattr(made, key)!r} and not {getattr(first, key)!r}" for key in other)
            if other:
                problems.append(f"{line}: of another run than {first.file}: of start {current}, {said}")
            if rank >= first.world:
                problems.append(f"{line}: there was no rank {rank}: start {current} had {first.world} ranks")
            reached[current] = first.start - 1
        elif {"step", "ids"} <= row.keys():
            number, step = row.get("attempt", current), row["step"]
            if number not in reached:
                lost += 1
                continue
            if step <= reached[number]:
                misplaced.setdefault(number, []).append(f"{line}: step {step + 1} after step {reached[number] + 1}")
            if rank < attempts[number].world and step >= attempts[number].start:
                attempts[number].ids.setdefault(step, {}).setdefault(rank, row["ids"])
            reached[number] = max(step, reached[number])
    for number, lines in misplaced.items():
        more = f", and {len(lines) - 1} more lines like it" if len(lines) > 1 else ""
        problems.append(f"{lines[0]} in start {number}{more}")
    if lost:
        problems.append(f"{file}: the line of the start before its first {lost} steps cannot be read")
    elif current is None and (reason := no_rows(file)):
        problems.append(f"{file}: {reason}")


def _files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / FOLDER).glob("rank-*.jsonl"))
