"""From a checked recipe to a run that is ready to step: engine, weights, position, logs.

The order matters. Ranks meet first; then they read every byte once (checksums of shards, shared out, and of the
checkpoint, on rank 0) and all hear the verdict; only then is the model loaded, so that a damaged file costs seconds and
not the minutes of a load.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lbr_dist.config import Recipe
from lbr_dist.environment import Environment
from lbr_dist.errors import UserError
from lbr_dist.model.attention import choose_backend
from lbr_dist.model.backbone import DTYPES
from lbr_dist.recipes import recipe_text
from lbr_dist.training import run_folder
from lbr_dist.training.audit import AuditLog, last_attempt
from lbr_dist.training.chain import check_ahead
from lbr_dist.training.checkpoint.checkpointer import Checkpointer, start_from
from lbr_dist.training.checkpoint.random_state import restore_random_state, seed_rank
from lbr_dist.training.collective import on_all_ranks, on_rank_zero
from lbr_dist.training.engine import make_engine, start_distributed
from lbr_dist.training.origin import changed_model, origin
from lbr_dist.training.position import choose, go_back
from lbr_dist.training.preflight import Job, deep_check, disagreement, resumes, same_everywhere
from lbr_dist.training.run_lock import RunLock
from lbr_dist.training.run_recipe import RECIPE
from lbr_dist.training.steps import Objective, make_objective
from lbr_dist.training.tracking import Tracker, check_wandb

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger("lbr")

TOLD_S = 60.0
"""Seconds of waiting for the other ranks after which the log says so."""
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
"""Files of the backbone's folder that a checkpoint carries, so that it needs no other folder."""


@dataclass
class Session:
    """A run that is ready to step."""

    job: Job
    lock: RunLock
    engine: DeepSpeedEngine
    objective: Objective
    checkpointer: Checkpointer
    device: torch.device
    done: int
    """Finished steps."""
    samples: int
    """Samples used by them (records in stage 1, pairs in stage 2)."""
    skipped: int
    wandb_id: str | None
    began_with: dict[str, Any] | None
    """Of the checkpoint in `model.start_from`: `origin`."""
    tracker: Tracker | None
    """On rank 0."""
    audit: AuditLog

    def close(self) -> None:
        """Close the files and let go of the engine."""
        self.audit.close()
        if self.tracker:
            self.tracker.close()
        self.engine.destroy()


def start(
    job: Job,
    resume: str,
    lock: RunLock,
    on_claim: Callable[[], object],
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> Session | None:
    """Bring the run to where it goes on; `on_claim` and `on_row` as for `train`. Collective.

    Returns:
        None: this start was asked to stop while it waited for the run folder.

    Raises:
        UserError: a damaged set, checkpoint or model, a checkpoint of another run, a run folder that is in use, a
            wandb that has no key, or the run after this one could not start.
    """
    recipe, environment = job.recipe, job.environment
    device = _meet(environment, recipe.step_timeout + 600)
    choose_backend(recipe.model.attention, device, DTYPES[recipe.model.dtype])  # refused before the load
    on_rank_zero(lambda: check_wandb(recipe.tracking))
    if not on_rank_zero(lock.take):
        return None
    on_rank_zero(on_claim)
    checkpoint = _checked(job, resume)
    log.info(
        "DeepSpeed %s, stage %d%s", job.regime.name, job.regime.stage, f" ({job.regime.note})" * bool(job.regime.note)
    )
    files = _extra_files(recipe)  # as they are now, whatever becomes of the model's folder during the run
    engine = make_engine(recipe, job.regime)
    _describe(engine, job)
    checkpointer, state = _placed(job, engine, files, resume, checkpoint)
    attempt = on_rank_zero(lambda: last_attempt(Path(recipe.output)) + 1)
    tracker = None

    def track() -> None:
        nonlocal tracker
        if environment.rank == 0:
            tracker = Tracker(
                recipe, total_steps=job.total_steps, done=state["step"], wandb_id=state["wandb_id"], on_row=on_row
            )

    on_all_ranks(track)
    return Session(
        job=job,
        lock=lock,
        engine=engine,
        objective=make_objective(engine, recipe, environment.world, job.total_steps),
        checkpointer=checkpointer,
        device=device,
        done=state["step"],
        samples=state["samples"],
        skipped=state["skipped"],
        wandb_id=on_rank_zero(lambda: tracker.wandb_id if tracker else None),
        began_with=state.get("began_with"),
        tracker=tracker,
        audit=AuditLog(
            Path(recipe.output),
            environment.rank,
            start=state["step"],
            attempt=attempt,
            world=environment.world,
            plan=job.plan.fingerprint,
            saves=checkpointer.attempt,
        ),
    )


def _meet(environment: Environment, timeout_s: float) -> torch.device:
    """`start_distributed`, which waits in silence for a rank that does not come."""
    told = threading.Timer(
        TOLD_S,
        log.info,
        ("waiting for the other ranks to come to %s, for %g s in all", environment.meeting, timeout_s),
    )
    told.daemon = True
    told.start()
    try:
        return start_distributed(environment, timeout_s)
    finally:
        told.cancel()


def _check_agreement(job: Job) -> None:
    """Ranks of different settings would train on, and none of them would notice. Collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, same_everywhere(job))
    if problem := disagreement(found):
        raise UserError(problem)


def _checked(job: Job, resume: str) -> Path | None:
    """What the ranks check together before a model is loaded; the checkpoint to go on from. Collective."""
    recipe = job.recipe
    _check_agreement(job)
    on_rank_zero(lambda: check_ahead(job, resumes=resumes(recipe, resume)))
    on_all_ranks(lambda: deep_check(job))
    checkpoint = on_rank_zero(lambda: choose(job, resume))
    run_folder.check_shared(Path(recipe.output), job.environment.rank)
    return checkpoint


def _placed(
    job: Job, engine: DeepSpeedEngine, files: dict[str, bytes], resume: str, checkpoint: Path | None
) -> tuple[Checkpointer, dict[str, Any]]:
    """Weights, moments and random state where the run goes on, and the state of its loop there. Collective."""
    recipe = job.recipe
    state: dict[str, Any] = {"step": 0, "samples": 0, "skipped": 0, "wandb_id": None}
    if checkpoint is None and recipe.model.start_from is not None:
        state["began_with"] = origin(_start_from(engine, recipe))
    checkpointer = Checkpointer(Path(recipe.output), engine, recipe.checkpoint, extra_files=files)
    own = None
    if checkpoint is not None:
        state, own = checkpointer.load(checkpoint)
    seed_rank(recipe.seed, job.environment.rank, state["step"])
    if own is not None:
        restore_random_state(own)
    if checkpoint is not None and state["step"] < job.total_steps:  # else what was run stays on record
        if resume != "auto":
            go_back(job, checkpoint, checkpointer, state)
        on_rank_zero(lambda: run_folder.claim(recipe))
    return checkpointer, state


def _start_from(engine: DeepSpeedEngine, recipe: Recipe) -> Path:
    """Load the weights of another run; which checkpoint they are of."""
    assert recipe.model.start_from is not None
    checkpoint, missing, unexpected = start_from(engine, recipe.model.start_from)
    own = ("z", "temperature")
    left, added = [n for n in unexpected if n not in own], [n for n in missing if n not in own]
    if left or added:
        raise UserError(
            f"model.start_from {recipe.model.start_from}: another model ({len(added)} weights are not there, such as "
            f"{(added or ['none'])[0]}; {len(left)} are not used, such as {(left or ['none'])[0]}): set model.path and "
            "model.lora as in that run"
        )
    log.info("weights from %s", checkpoint)
    if other := changed_model(checkpoint / "model", recipe):
        log.warning("model %s: is not that of %s (%s), as allowed", recipe.model.path, checkpoint, other)
    if "z" in missing:
        log.info("it has no bottleneck tokens: Z starts from the mean embedding")
    if "z" in unexpected:
        log.info("its bottleneck tokens are not used")
    if "temperature" in unexpected:
        log.info("its learned temperature is not used: contrastive.learn_temperature is not set")
    return checkpoint


def _describe(engine: DeepSpeedEngine, job: Job) -> None:
    sizes = [
        (p.requires_grad, int(getattr(p, "ds_numel", p.numel())))
        for p in dict(engine.module.named_parameters()).values()
    ]
    trained = sum(size for wanted, size in sizes if wanted)
    log.info(
        "%.2fM parameters, %.2fM trained; %d steps of %d %s",
        sum(size for _, size in sizes) / 1e6,
        trained / 1e6,
        job.total_steps,
        job.recipe.batch.global_batch,
        "bins" if job.recipe.stage == "generative" else "pairs",
    )


def _extra_files(recipe: Recipe) -> dict[str, bytes]:
    folder = Path(recipe.model.path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(recipe.model.path, local_files_only=True))
    files = {f"model/{name}": (folder / name).read_bytes() for name in MODEL_FILES if (folder / name).is_file()}
    return {RECIPE: recipe_text(recipe).encode()} | files
