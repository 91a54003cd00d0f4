"""What differs between the stages inside the one loop: how a step's micro-batches become a gradient and a loss.

Both leave in the engine the gradient of the mean over the *global* batch, whatever the number of ranks and
micro-batches; the loop then clips, updates and logs alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lbr_dist.config import Recipe
from lbr_dist.data.loader import LocalBatch
from lbr_dist.data.plan import StepPlan
from lbr_dist.objectives.contrastive import contrastive_loss
from lbr_dist.objectives.generative import generative_loss
from lbr_dist.training.accumulate import Reduce, accumulate
from lbr_dist.training.gradcache import cached_step

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Objective(Protocol):
    """Computes the gradient of one step."""

    def __call__(self, plan: StepPlan, batches: Sequence[LocalBatch]) -> tuple[Tensor, dict[str, float]]:
        """Run the step's micro-batches (on the model's device) forward and backward.

        Returns:
            This rank's share of the step's loss, a float64 scalar: the shares of all ranks add up to it; and figures
            for the log that are the same on every rank.
        """
        ...


class Generative:
    """Stage 1: the mean over the target tokens of the global batch."""

    def __init__(self, engine: DeepSpeedEngine, recipe: Recipe, world: int, reduce: Reduce) -> None:
        self._engine, self._world, self._reduce = engine, world, reduce

    def __call__(self, plan: StepPlan, batches: Sequence[LocalBatch]) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`."""
        closures = [partial(self._loss, batch, plan.target_tokens) for batch in batches]
        values = accumulate(self._engine, closures, reduce=self._reduce)
        return torch.stack(values).double().sum() / self._world, {}

    def _loss(self, batch: LocalBatch, target_tokens: int) -> Tensor:
        loss = generative_loss(self._engine, batch.packed, target_tokens=target_tokens, world_size=self._world).backward
        return poisoned(loss)


class Contrastive:
    """Stage 2: InfoNCE over the pairs of the global batch."""

    def __init__(self, engine: DeepSpeedEngine, recipe: Recipe, world: int, reduce: Reduce) -> None:
        self._engine, self._settings, self._world, self._reduce = engine, recipe.contrastive, world, reduce

    def __call__(self, plan: StepPlan, batches: Sequence[LocalBatch]) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`."""
        loss, figures = cached_step(
            self._engine,
            batches,
            lambda batch: self._engine(batch.packed, "embed", self._settings.pooling),
            partial(self._loss, batches=batches),
            reduce=self._reduce,
        )
        return loss.double() / self._world, figures

    def _loss(self, embeddings: Sequence[Tensor], batches: Sequence[LocalBatch]) -> tuple[Tensor, dict[str, float]]:
        loss, figures = contrastive_loss(embeddings, batches, self._settings)
        return poisoned(loss), figures


def poisoned(loss: Tensor) -> Tensor:
    """The loss, and NaN where it is infinite: so that its gradient is seen not to be finite, on every rank."""
    return loss + (loss.detach() - loss.detach())


def make_objective(engine: DeepSpeedEngine, recipe: Recipe, world: int) -> Objective:
    """The objective of the recipe's stage."""
    each = engine.zero_optimization_stage() == 3 and torch.cuda.is_available()
    reduce: Reduce = "each" if each else "auto"  # reduced once, a whole gradient would lie on every GPU
    if recipe.stage == "generative":
        return Generative(engine, recipe, world, reduce)
    return Contrastive(engine, recipe, world, reduce)
