"""The run folder: whose it is, and whether this recipe may go on with it.

    recipe.yaml       resolved recipe
    metrics.jsonl     one row per logged step
    audit/rank-N.jsonl    which samples each step used
    checkpoints/      see checkpoint/format.py
    log.txt           what rank 0 says
    stacks/, bad-step-N-rank-R.json    written when something went wrong
    stop              empty; a line in it asks the run to stop (see signals)
    lock              who is at work here (see run_lock)
    ray/              what Ray Train writes about its attempts
    slurm.jsonl       starts and ends of Slurm jobs, and why each was requeued or not
    asked/            starts of Slurm jobs that were asked to stop
    mistakes/         starts of Slurm jobs that a rank, or the check of the nodes, ended for a mistake
    finished/         starts of Slurm jobs with which the run ended

A folder belongs to one recipe, from the first step on. Going on with a changed one is refused unless the change cannot
alter what the run would have been (logging, checkpointing, loader processes, memory layout), or the user allows the
field by name.
"""

from __future__ import annotations

import re
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lbr_dist.config import Recipe
from lbr_dist.disk import sync
from lbr_dist.errors import UserError
from lbr_dist.recipes import save_recipe
from lbr_dist.recipes.settings import settings
from lbr_dist.training.audit import any_step
from lbr_dist.training.origin import same_model
from lbr_dist.training.run_recipe import (
    FOLDERS,
    HARMLESS,
    RECIPE,
    SET_PATH,
    copy_of,
    covered,
    differences,
    load_run_recipe,
)

UNFINISHED = f".{RECIPE}.tmp"
STARTED = ("log.txt", "stacks", "stop", "lock", "ray", "slurm.jsonl", "asked", "mistakes", UNFINISHED)
"""What a start that found a mistake, or was killed, leaves in the folder; the next start goes on in it."""

SEEN_AFTER_S = 75.0
"""Network file systems remember for up to a minute that a file was not there."""


def has_run(folder: Path) -> bool:
    """Whether a run has claimed the folder."""
    return (folder / RECIPE).is_file()


def has_steps(folder: Path) -> bool:
    """Whether a start of the run that claimed the folder came as far as a step."""
    kept = folder / "checkpoints"
    return (kept.is_dir() and any(kept.iterdir())) or any_step(folder)


def check_folder(recipe: Recipe, *, resume: str, allow_change: Sequence[str] = ()) -> list[str]:
    """Check that this recipe may write into its output folder; nothing is written.

    Args:
        recipe: the new recipe.
        resume: auto, never, or a checkpoint's path.
        allow_change: dotted fields, or sections, that may differ from the run that is there.

    Returns:
        The fields that differ and may: for the log.

    Raises:
        UserError: the folder holds something else, or another run (the differing fields are named); or what was given
            is no checkpoint or no field.
    """
    folder = Path(recipe.output)
    for field in allow_change:
        _check_field(field)
    if resume not in ("auto", "never") and not (Path(resume) / "manifest.json").is_file():
        raise UserError(
            f"--resume {resume}: is no checkpoint, it has no manifest.json: give auto (the newest), never (a new run), "
            f"or the path of a checkpoint, a folder in {folder}/checkpoints"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder}: is a file; choose another output")
    kept = folder / "checkpoints"
    if kept.exists() and not kept.is_dir():
        raise UserError(f"{kept}: is a file, not a folder: move it away, or choose another output")
    if kept.is_symlink() and not kept.exists():
        raise UserError(f"{kept}: is a link to {kept.readlink()}, which is not there: mount it, or make the link anew")
    if not has_run(folder):
        if copy := copy_of(folder):
            raise UserError(f"output {folder}: its {RECIPE} is missing: copy it back from {copy}")
        if folder.is_dir() and any(path.name not in STARTED for path in folder.iterdir()):
            raise UserError(f"output {folder}: is not empty and holds no run of lbr; choose another output")
        return []
    if not has_steps(folder):
        return []  # a start that was refused told the user to change the recipe
    if resume == "never":
        raise UserError(f"output {folder}: holds a run already; choose another output, or drop --resume never")
    return check_same(folder, recipe, allow_change)


def _check_field(name: str) -> None:
    numbered = re.sub(r"\.\d+(?=\.|$)", ".N", name)
    if not any(covered(setting.name, (numbered,)) for setting in settings()):
        raise UserError(f"--allow-change {name}: no such field: give a name, or a section, that `lbr settings` lists")


def check_same(folder: Path, recipe: Recipe, allow_change: Sequence[str] = ()) -> list[str]:
    """Check that a run folder, or a checkpoint, is of this recipe, but for changes that are harmless or allowed.

    Returns:
        Those changes.

    Raises:
        UserError: it is another run; the differing fields are named.
    """
    changed = {
        field: (old, new)
        for field, (old, new) in differences(load_run_recipe(folder), recipe).items()
        if not (field in FOLDERS and old and new and _same_folder(old, new))
    }
    refused = {
        field: (old, new)
        for field, (old, new) in changed.items()
        if not (
            covered(field, (*HARMLESS, *allow_change))
            or (SET_PATH.fullmatch(field) and old and new)
            or (field == "model.path" and same_model(folder, recipe))
        )
    }
    if refused:
        listed = "; ".join(f"{field} was {old!r} and is {new!r}" for field, (old, new) in refused.items())
        raise UserError(
            f"{folder}: holds another run ({listed}): choose another output, set the fields back, or allow each with "
            f"--allow-change {next(iter(refused))}"
        )
    return [f"{field} was {old!r} and is now {new!r}" for field, (old, new) in changed.items() if field != "output"]


def claim(recipe: Recipe) -> None:
    """Make the folder this recipe's.

    Raises:
        OSError: the disk is full, or cannot be written; nothing is left behind.
    """
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / UNFINISHED
    try:
        save_recipe(recipe, temporary)
        sync(temporary)
        temporary.replace(folder / RECIPE)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(folder)


def check_shared(folder: Path, rank: int) -> None:
    """Check that every rank sees the folder which rank 0 has claimed: the run may have been copied, with its recipe, to
    a disk of a machine, so rank 0 makes a file for the others to find. Collective.

    Raises:
        UserError: a rank has another folder of the same name, or none.
    """
    from lbr_dist.training.collective import on_all_ranks, on_rank_zero

    sign = folder / on_rank_zero(lambda: _make_sign(folder))

    def look() -> None:
        if not in_time(sign.exists):
            raise UserError(
                f"output {folder}: rank {rank} on {socket.gethostname()} does not see the run that rank 0 started "
                "there: name a folder on storage that all machines share, mounted at the same path, or leave that "
                "machine out"
            )

    try:
        on_all_ranks(look)
    finally:
        if rank == 0:
            sign.unlink(missing_ok=True)


def _make_sign(folder: Path) -> str:
    for left in folder.glob(".seen-*"):  # by a start that was killed
        left.unlink(missing_ok=True)
    name = f".seen-{secrets.token_hex(8)}"  # new, so that no cache knows that it was not there
    (folder / name).touch()
    return name


def in_time(seen: Callable[[], bool]) -> bool:
    """Whether something that another machine has written is seen here, at the latest when caches have expired."""
    deadline = time.monotonic() + SEEN_AFTER_S
    while not seen():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _same_folder(old: str, new: str) -> bool:
    return Path(new).exists() and Path(old).resolve() == Path(new).resolve()
