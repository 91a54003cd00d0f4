"""Where a run goes on: from which checkpoint, whether that is of this run and this plan, and what the next one says."""

from __future__ import annotations

import logging
from ast import literal_eval
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lbr_dist.config import Recipe
from lbr_dist.data.plan.base import FOLLOWS
from lbr_dist.disk import usable_folder
from lbr_dist.errors import UserError
from lbr_dist.training import run_folder, run_recipe
from lbr_dist.training.audit import last_attempt
from lbr_dist.training.checkpoint.checkpointer import Checkpointer
from lbr_dist.training.checkpoint.format import checkpoints_folder, read_manifest, verify
from lbr_dist.training.checkpoint.listing import find_resumable, list_checkpoints, newest
from lbr_dist.training.checkpoint.random_state import random_state
from lbr_dist.training.checkpoint.rotation import bring_back
from lbr_dist.training.collective import on_rank_zero
from lbr_dist.training.ds_config import versions
from lbr_dist.training.origin import check_resumed_model, other_attention, outdated
from lbr_dist.training.preflight import Job

log = logging.getLogger("lbr")


def choose(job: Job, resume: str) -> Path | None:
    """The checkpoint to go on from, None for step 0; a folder that has no run yet is claimed. On rank 0, with the lock.

    Raises:
        UserError: the folder holds another run, or checkpoints of which none can be used, or cannot be written; or the
            checkpoint is of another model or plan.
    """
    recipe = job.recipe
    kept = checkpoints_folder(Path(recipe.output))
    bring_back(kept)  # else the newest one may be passed over, and rotated away later
    for change in run_folder.check_folder(recipe, resume=resume, allow_change=job.allow_change):
        log.info("changed since the last start: %s", change)
    if other := check_resumed_model(recipe, resume, job.allow_change):
        log.warning("%s, as allowed", other)
    for entry in (*job.plan.too_long, *job.plan.notes):
        log.info("%s", entry)
    if job.plan.steps_per_epoch(0) == 1:
        step = job.plan.step(0)
        takes = f"{step.samples} samples" if recipe.stage == "generative" else f"{len(step.pairs(0, 1))} pairs"
        batch = recipe.batch.global_batch
        log.warning("an epoch is a single step: batch.global_batch=%d takes all its %s at once", batch, takes)
    checkpoint: Path | None = None
    reasons: list[str] = []
    if resume not in ("auto", "never"):
        checkpoint = Path(resume)
        problems = verify(checkpoint)
        if problems:
            raise UserError(f"--resume {resume}: cannot be resumed from: {'; '.join(problems)}")
        run_folder.check_same(checkpoint, recipe, job.allow_change)
    elif resume == "auto" and run_folder.has_run(Path(recipe.output)):
        checkpoint, reasons = find_resumable(recipe.output)
    for reason in reasons:
        log.warning("passed over %s", reason)
    if checkpoint is None and list_checkpoints(recipe.output):
        raise UserError(
            f"{recipe.output}: none of its checkpoints can be used ({'; '.join(reasons)}): if their storage comes "
            "back, run again then; to start over from step 0, move the folder checkpoints/ away"
        )
    if checkpoint is not None:
        _check_plan(job, checkpoint)
        _check_versions(checkpoint)
        log.info("resuming from %s", checkpoint)
        if other := outdated(recipe, checkpoint):
            log.warning("%s", other)
    elif resume == "auto" and last_attempt(Path(recipe.output)):
        log.warning("%s: was started before, and has no checkpoint: from step 0", recipe.output)
    if checkpoint is None and (other := other_attention(recipe)):
        log.warning("%s", other)
    if checkpoint is None or not run_folder.has_run(Path(recipe.output)):
        run_folder.claim(recipe)
    if checkpoint is None or read_manifest(checkpoint).step < job.total_steps:  # not found out at the first save
        usable_folder(kept, str(kept), "see to it that this user can write there, or choose another output")
    return checkpoint


def go_back(job: Job, checkpoint: Path, checkpointer: Checkpointer, state: dict[str, Any]) -> None:
    """Save what was loaded again, if the folder has anything newer. Collective.

    Rows of later steps are dropped next; a start that is killed before its first save would otherwise be forgotten.
    """

    def needed() -> bool:
        found = newest(job.recipe.output)
        return found is None or not checkpoint.samefile(found[0])

    if on_rank_zero(needed):
        checkpointer.save(state["step"], loop_state(job, **state), rank_state=random_state(), wait=True)


def loop_state(
    job: Job,
    *,
    step: int,
    samples: int,
    skipped: int,
    wandb_id: str | None,
    began_with: dict[str, Any] | None = None,
    **_: Any,
) -> dict[str, Any]:
    """What a checkpoint says of the loop, of where it began, and of the plan that it follows."""
    identity = {key: str(value) for key, value in job.plan.identity.items()}
    done = {"step": step, "samples": samples, "skipped": skipped, "wandb_id": wandb_id, "began_with": began_with}
    return {**done, "plan": job.plan.fingerprint, "identity": identity}


def _check_plan(job: Job, checkpoint: Path) -> None:
    """The checkpoint must have been trained on this plan."""
    state = read_manifest(checkpoint).state
    if state["plan"] == job.plan.fingerprint:
        return
    now = {key: str(value) for key, value in job.plan.identity.items()}
    differing = [key for key in sorted({*now, *state["identity"]}) if now.get(key) != state["identity"].get(key)]
    before = run_recipe.load_run_recipe(checkpoint)
    fields: list[str] = []
    for key in differing:
        fields += _fields(key, state["identity"].get(key), now.get(key), before, job.recipe)
    if all(run_recipe.covered(field, job.allow_change) for field in fields):
        log.warning("the data order changed (%s), as allowed", ", ".join(differing))
        return
    listed = "; ".join(f"{key} was {state['identity'].get(key)} and is {now.get(key)}" for key in differing)
    raise UserError(
        f"{checkpoint}: the order of the data changed since ({listed}), so samples would be repeated or left out: set "
        "the recipe's fields back, restore the prepared sets, start a new run, or allow it with "
        + " ".join(f"--allow-change {field}" for field in dict.fromkeys(fields))
    )


def _fields(key: str, old: str | None, new: str | None, before: Recipe, recipe: Recipe) -> list[str]:
    """The fields of the recipe that an entry of the plan's identity changed by, in themselves or in what they name."""
    _, task, name = key.split(".", 2) if key.startswith("joint.") else ("", recipe.stage, key)
    follows = FOLLOWS.get(key) or FOLLOWS.get(name, (name,))
    changed = [
        field
        for field in run_recipe.differences(before, recipe)
        if run_recipe.covered(field, follows)
        and not (run_recipe.covered(field, run_recipe.HARMLESS) or run_recipe.SET_PATH.fullmatch(field))
    ]
    named: list[str] = []
    if name == "data.sets":
        longer = max(recipe, before, key=lambda either: len(either.data.sets))
        numbers = [n for n, data_set in enumerate(longer.data.sets) if data_set in longer.part(task).data.sets]  # type: ignore[arg-type]
        contents = ([content.rpartition("/")[0] for content, *_ in literal_eval(entry or "()")] for entry in (old, new))
        pairs = zip_longest(numbers, *contents)
        changes = [number for number, first, second in pairs if first != second]
        named = ["data.sets" if number is None else f"data.sets.{number}.path" for number in changes]
    elif name == "bottleneck.surprisal" and old and new and literal_eval(old)[1:] != literal_eval(new)[1:]:
        named = ["bottleneck.surprisal.model"]
    elif name == "specials" and not changed:
        named = ["model.path"]
    return changed + named or [follows[0]]


def _check_versions(checkpoint: Path) -> None:
    """Say what else changed. The data order and the shapes are compared by themselves, so this refuses nothing."""
    now = versions()
    for name, before in read_manifest(checkpoint).versions.items():
        if now.get(name) != before:
            log.warning("%s was %s and is now %s: losses may differ in the last digits", name, before, now.get(name))
