"""The one training loop, for every stage, on one process or a thousand.

A step is a pure function of its number (which samples) and of the engine's state (weights and moments), so a run that
was killed goes on from its newest checkpoint as if nothing had happened. Every decision that must be the same on all
ranks (stop, skip, which checkpoint) comes out of one collective call per step, or from rank 0.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr_dist.config import Recipe
from lbr_dist.environment import Environment, detect
from lbr_dist.errors import EXIT_RUN_AGAIN, UserError
from lbr_dist.training import tracking
from lbr_dist.training.faults import explained, storage_named
from lbr_dist.training.run_lock import RunLock
from lbr_dist.training.schedule import factor
from lbr_dist.training.signals import StopRequest
from lbr_dist.training.watchdog import Watchdog

if TYPE_CHECKING:
    from lbr_dist.data.loader import LocalBatch
    from lbr_dist.data.plan import StepPlan
    from lbr_dist.training.session import Session

log = logging.getLogger("lbr")

COPY_S = 600.0
"""Seconds that the copy of a checkpoint to host memory may take, if a step may not take longer."""
UNDAMAGED = "use a model that is not damaged"


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended."""

    run_dir: Path
    step: int
    """Finished optimizer steps; 0 where it was stopped before it had begun."""
    total_steps: int

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        return self.step >= self.total_steps

    @property
    def exit_code(self) -> int:
        """0, or 75 where a signal stopped the run, after a checkpoint or before it had begun: run again to go on."""
        return 0 if self.finished else EXIT_RUN_AGAIN


def train(
    recipe: Recipe,
    *,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    then: Recipe | None = None,
    environment: Environment | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    on_claim: Callable[[], object] | None = None,
) -> Outcome:
    """Run a recipe from where its run folder stands to its end. Called alike on every rank.

    Args:
        recipe: of any stage.
        resume: `auto`: the newest verified checkpoint of the run folder, if there is one; `never`: refuse a folder
            that holds a run; else the path of a checkpoint of this run.
        allow_change: recipe fields, or sections, that may differ from the run that is resumed.
        then: the run that is to begin with this one's weights: what it needs is checked before this one begins.
        environment: this rank; default: what the environment variables say.
        on_row: gets each logged row of metrics too, on rank 0.
        on_claim: called on rank 0 when the run folder is this run's: its lock is held, and a stop request is for it.

    Raises:
        UserError: something cannot work, a loss is not finite, or memory does not suffice for the run's
            first step; the message names it.
        FaultError: memory did not suffice for a later one.
        ContactLostError: another rank ended, or never came.
    """
    began = time.monotonic()
    environment = environment or detect()
    run_dir = Path(recipe.output)
    signals = StopRequest(run_dir if environment.rank == 0 else None)
    from lbr_dist.training import preflight

    with storage_named(run_dir):
        job = preflight.check(recipe, environment, resume=resume, allow_change=allow_change, then=then)
    tracking.start_log(run_dir, environment.rank)
    log.info("%s: %s", run_dir, environment.describe())

    def claimed() -> None:
        signals.begin()
        if on_claim is not None:
            on_claim()

    watch = Watchdog(run_dir, environment.rank, recipe.step_timeout)
    with storage_named(run_dir), signals as stop, watch as watchdog, RunLock(run_dir, stop.signalled) as lock:
        from lbr_dist.training.session import start

        session = None
        try:
            session = start(job, resume, lock, claimed, on_row)
            if session is None:
                log.info("stopped by %s before the run had begun; run again to go on", stop.signalled() or "a signal")
                return Outcome(run_dir, 0, job.total_steps)
            log.info("ready after %s", tracking.duration(time.monotonic() - began))
            return _Loop(session, stop, watchdog).run()
        except (RuntimeError, MemoryError) as error:
            if told := explained(error, job, None if session is None else session.done):
                raise told from error
            raise
        finally:
            if session is not None:
                session.close()


class _Loop:
    def __init__(self, session: Session, stop: StopRequest, watchdog: Watchdog) -> None:
        from lbr_dist.training.checkpoint.writer import SLOWEST_WRITE
        from lbr_dist.training.measure import Meter

        self._s, self._stop, self._watchdog = session, stop, watchdog
        self._recipe = session.job.recipe
        self._meter, self._write_s = Meter(session), SLOWEST_WRITE.total_seconds()
        self._applied = True

    def run(self) -> Outcome:
        from lbr_dist.data.loader import Loader

        s, job = self._s, self._s.job
        total, environment = job.total_steps, job.environment
        if s.done < total:
            loader = Loader(
                job.plan, job.readers, job.tokenization, job.recipe, environment.rank, environment.world, s.done
            )
            self._meter.start()
            due = False
            for plan, batches in loader:
                self._watchdog.alive(f"running step {plan.step + 1}")
                asked, unsaved = self._step(plan, batches)
                last = s.done == total
                due = due or unsaved or s.done % self._recipe.checkpoint.every_steps == 0
                if asked or last or (due and self._applied):  # weights that give nan must not rotate good ones away
                    self._save(wait=asked or last)
                    due = False
                if asked:
                    who = self._stop.asked() or "a signal"
                    self._stop.obeyed()
                    log.info("stopped by %s after step %d%s", who, s.done, "" if last else "; run again to go on")
                    break
                self._watchdog.alive(f"loading the samples of step {s.done + 1}")
        outcome = Outcome(Path(self._recipe.output), s.done, total)
        if outcome.finished:
            self._meter.summary(outcome.step)
        return outcome

    def _step(self, plan: StepPlan, batches: list[LocalBatch]) -> tuple[bool, bool]:
        """One optimizer step; returns whether any rank was asked to stop, and whether the last save failed."""
        from lbr_dist.objectives.infonce import DegenerateEmbeddingError
        from lbr_dist.training.engine import apply_gradients
        from lbr_dist.training.optimizer import set_rate

        s, recipe = self._s, self._recipe
        self._meter.loaded()
        share = factor(recipe.optim, plan.step + 1, s.job.total_steps)
        set_rate(s.engine.optimizer, share)
        figures: dict[str, float] = {}
        cause, remedy = "", "look at them, lower optim.lr, or set on_nan=skip"
        try:
            part, figures = s.objective(plan, [batch.to(s.device) for batch in batches])
            reached = self._meter.gather(part, batches, **self._news())
            norm, applied = apply_gradients(s.engine)
        except DegenerateEmbeddingError as error:
            if error.every and s.done == s.skipped:
                why = f"all there are, before any update: {self._model} itself gives no usable embedding"
                remedy = UNDAMAGED
            else:
                why = "the weights have diverged (lower optim.lr) or these samples are broken"
            cause = f" ({error}; {why})"
            s.engine.zero_grad()
            reached = self._meter.gather(None, batches, **self._news())
            norm, applied = math.nan, False
        else:
            if not (applied or math.isfinite(reached.loss)) and s.done == s.skipped and self._damaged:
                cause = f" (before any update: {self._model} has a weight that is not finite, {self._damaged})"
                remedy = UNDAMAGED
        s.done, s.samples, self._applied = plan.step + 1, s.samples + plan.samples, applied
        if not (applied and math.isfinite(reached.loss)):
            self._not_finite(plan, batches, f"loss {reached.loss:g}, gradient norm {norm:g}{cause}", applied, remedy)
        s.audit.step(plan.step, plan.epoch, batches)
        self._meter.log(plan, reached, norm, share * recipe.optim.lr, figures, skipped=not applied)
        return reached.stop, reached.unsaved

    @property
    def _model(self) -> str:
        """Whose weights the run began with, as messages name it."""
        model = self._recipe.model
        return f"model.path {model.path}" if model.start_from is None else f"model.start_from {model.start_from}"

    @cached_property
    def _damaged(self) -> str:
        """The first weight that is not finite; "": none is. Collective."""
        import deepspeed
        import torch

        engine = self._s.engine
        for name, parameter in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=engine.zero_optimization_stage() == 3):
                if not torch.isfinite(parameter).all():
                    return str(name)
        return ""

    def _news(self) -> dict[str, bool]:
        """What this rank has to tell the others, as late in a step as can be."""
        return {"stop": bool(self._stop.asked()), "unsaved": self._s.checkpointer.failed}

    def _not_finite(self, plan: StepPlan, batches: list[LocalBatch], found: str, applied: bool, remedy: str) -> None:
        """Write down the step's samples; then stop, or go on without its gradient."""
        s, recipe = self._s, self._recipe
        file = Path(recipe.output) / f"bad-step-{plan.step + 1}-rank-{s.job.environment.rank}.json"
        ids = [id_ for batch in batches for id_ in batch.ids]
        file.write_text(json.dumps({"step": plan.step + 1, "found": found, "ids": ids}))
        s.skipped += 1
        what = f"step {plan.step + 1}: {found}; its sample ids are in {file}"
        if recipe.on_nan == "skip" and not applied:
            if s.skipped <= recipe.max_skips:
                log.warning("%s: skipped", what)
                return
            remedy = f"{s.skipped} steps skipped, more than max_skips={recipe.max_skips}"
        if error := self._wait_for_writer():  # so that the run can go on from the newest one
            log.warning("%s", error)
        raise UserError(f"{what}: {remedy}")

    def _wait_for_writer(self) -> Exception | None:
        """Return when the last checkpoint is committed, or why it was not; its writer has more time than a step."""
        from lbr_dist.training.checkpoint.writer import StorageError

        self._watchdog.alive("waiting for the last checkpoint to be written", self._write_s)
        failed = None
        try:
            self._s.checkpointer.wait()
        except (UserError, StorageError) as error:  # the same one on every rank
            failed = error
        self._watchdog.alive("going on after the last checkpoint")
        return failed

    def _save(self, wait: bool) -> None:
        from lbr_dist.training.checkpoint.random_state import random_state
        from lbr_dist.training.collective import on_rank_zero
        from lbr_dist.training.position import loop_state

        s = self._s
        there = on_rank_zero(s.lock.check)
        began = time.monotonic()
        if error := self._wait_for_writer():
            wait = True
            if s.job.environment.rank == 0:
                log.warning("%s; trying once more, with step %d", error, s.done)
        state = loop_state(
            s.job, step=s.done, samples=s.samples, skipped=s.skipped, wandb_id=s.wandb_id, began_with=s.began_with
        )
        s.audit.sync()
        wait = wait or not there
        written = wait or not self._recipe.checkpoint.asynchronous
        self._watchdog.alive(f"saving step {s.done}", self._write_s if written else COPY_S)
        s.checkpointer.save(s.done, state, rank_state=random_state(), wait=wait)
        self._watchdog.alive(f"going on after the save of step {s.done}")
        self._meter.saved(time.monotonic() - began)
        if not there:
            raise UserError(
                f"output {self._recipe.output}: was moved or removed while the run was at work there; the weights of "
                f"step {s.done} are in its checkpoints/ now: put the folder back, or set model.start_from to them"
            )
