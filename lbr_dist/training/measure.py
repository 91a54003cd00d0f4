"""How fast a step was and how well it used the machine; and the one collective call in which the ranks compare notes.

The ranks' shares of the loss, their tokens and operations, and whether any of them was asked to stop travel together in
one small all-reduce per step.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lbr_dist.training.cost.flops import FlopCounter
from lbr_dist.training.cost.machines import peak_flops
from lbr_dist.training.tracking import METRICS, duration

if TYPE_CHECKING:
    from lbr_dist.data.loader import LocalBatch
    from lbr_dist.data.plan import StepPlan
    from lbr_dist.training.session import Session

log = logging.getLogger("lbr")


class Reached(NamedTuple):
    """What the ranks know together after a step's backward pass."""

    loss: float
    """Of the global batch; NaN where there is none."""
    tokens: int
    """Useful tokens of all ranks."""
    packing: float
    """Useful tokens over what the micro-batches of all ranks could hold."""
    flops: float
    stop: bool
    """Some rank was asked to stop."""
    unsaved: bool
    """Some rank knows that the last checkpoint could not be written."""


class Meter:
    """Times the loop of one rank. Data wait, checkpoint stall and memory are rank 0's."""

    def __init__(self, session: Session) -> None:
        recipe = session.job.recipe
        self._session, self._device = session, session.device
        self._capacity = recipe.batch.micro_tokens or recipe.data.bin_tokens
        self._flops = FlopCounter.of(session.engine.module.causal_lm.config, recipe)
        self._peak = peak_flops(session.device)
        self._saving = self._waited = 0.0
        self._step_began = self._began = time.monotonic()
        self._tokens, self._first_step, self._told = 0, session.done, False

    def start(self) -> None:
        """The first step's data is about to be waited for."""
        self._step_began = self._began = time.monotonic()

    def loaded(self) -> None:
        """The step's data is there."""
        self._waited = time.monotonic() - self._step_began

    def saved(self, seconds: float) -> None:
        """Training stood still for a checkpoint."""
        self._saving += seconds
        self._step_began += seconds  # the stall is not part of the next step's data wait

    def gather(self, part: Tensor | None, batches: Sequence[LocalBatch], *, stop: bool, unsaved: bool) -> Reached:
        """Compare notes. Collective.

        Args:
            part: this rank's share of the loss; None: there is no loss.
            batches: of this rank.
            stop: this rank was asked to stop.
            unsaved: this rank knows that the last checkpoint could not be written.
        """
        mine = torch.zeros(6, dtype=torch.float64, device=self._device)
        mine[0] = float("nan") if part is None else part
        mine[1:] = torch.tensor(
            [
                sum(batch.tokens for batch in batches),
                self._capacity * len(batches),
                sum(self._flops.of_samples(batch.samples) for batch in batches),
                float(stop),
                float(unsaved),
            ],
            dtype=torch.float64,
        )
        if self._session.job.environment.world > 1:
            dist.all_reduce(mine)
        loss, tokens, capacity, flops, wishes, failures = mine.tolist()
        return Reached(loss, int(tokens), tokens / capacity, flops, wishes > 0, failures > 0)

    def log(
        self,
        plan: StepPlan,
        reached: Reached,
        norm: float,
        rate: float,
        figures: dict[str, float],
        *,
        skipped: bool,
    ) -> None:
        """Write the step's row (rank 0), and warn of the first step in which no query has a negative."""
        now = time.monotonic()
        seconds, self._step_began = now - self._step_began, now
        self._tokens += reached.tokens
        tracker = self._session.tracker
        if tracker is None:
            return
        if figures.get("effective_negatives") == 0 and not self._told:
            self._told = True
            log.warning("step %d: %s", plan.step + 1, _no_negatives(figures))
        epoch, in_epoch = plan.epoch, self._session.job.plan.locate(plan.step)[1]
        world = self._session.job.environment.world
        row: dict[str, Any] = {
            "step": plan.step + 1,
            "epoch": round(epoch + (in_epoch + 1) / self._session.job.plan.steps_per_epoch(epoch), 6),
            "samples": self._session.samples,
            "loss": reached.loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens": reached.tokens,
            "target_tokens": plan.target_tokens,
            "step_s": seconds,
            "tokens_per_s": reached.tokens / seconds,
            "samples_per_s": plan.samples / seconds,
            "packing": reached.packing,
            "data_wait_s": self._waited,
            "checkpoint_stall_s": self._saving,
            "memory_gib": self._memory(),
            "mfu": reached.flops / (seconds * world * self._peak) if self._peak else None,
            **{key: value for key, value in figures.items() if key != "loss"},
        }
        if skipped:
            row["skipped"] = True
        if tracker.row(row):
            self._saving = 0.0

    def summary(self, done: int) -> None:
        """One line at the end of the run."""
        seconds, steps = time.monotonic() - self._began, done - self._first_step
        if steps:
            log.info(
                "finished: %d steps in %s, %s tokens/s on average, peak memory %.2f GiB on rank 0",
                steps,
                duration(seconds),
                f"{self._tokens / seconds:,.0f}",
                self._memory(),
            )
        else:
            log.info("finished already: %d steps", done)

    def _memory(self) -> float:
        """Peak memory of this rank in GiB: the GPU's, or the process's."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _no_negatives(figures: dict[str, float]) -> str:
    """Why no query of a step has a negative, for the log."""
    masked = {"contrastive.margin": figures["masked_margin"]}
    masked["contrastive.mask_same_answer"] = figures["masked_share"] - masked["contrastive.margin"]
    causes = [f"{name} leaves out {share:.0%} of the negatives" for name, share in masked.items() if share >= 0.005]
    why = " and ".join(causes) or "its batch is a single pair"
    return f"no query has a negative, so its pairs teach nothing: {why}; {METRICS} has effective_negatives of all steps"
