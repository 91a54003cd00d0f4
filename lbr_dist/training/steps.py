"""What differs between the stages inside the one loop: how a step's micro-batches become a gradient and a loss.

All leave in the engine the gradient of the mean over the *global* batch, whatever the number of ranks and
micro-batches; the loop then clips, updates and logs alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lbr_dist.config import Recipe
from lbr_dist.data.loader import LocalBatch
from lbr_dist.data.plan import StepPlan
from lbr_dist.objectives.contrastive import contrastive_loss
from lbr_dist.objectives.generative import generative_loss
from lbr_dist.training.accumulate import Reduce, accumulate
from lbr_dist.training.gradcache import prepare
from lbr_dist.training.schedule import moved

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

    def __init__(self, engine: DeepSpeedEngine, world: int, reduce: Reduce) -> None:
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

    def __init__(self, engine: DeepSpeedEngine, recipe: Recipe, world: int, reduce: Reduce, total_steps: int) -> None:
        self._engine, self._settings, self._world, self._reduce = engine, recipe.contrastive, world, reduce
        self._total_steps = total_steps
        self._task = "embed" if recipe.contrastive.learn_temperature is None else "embed_with_temperature"

    def __call__(self, plan: StepPlan, batches: Sequence[LocalBatch]) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`."""
        closures, result = self.closures(plan, batches)
        accumulate(self._engine, closures, reduce=self._reduce)
        loss, figures = result()
        return loss.double() / self._world, figures

    def closures(self, plan: StepPlan, batches: Sequence[LocalBatch], weight: float = 1.0) -> Any:
        """What `gradcache.prepare` gives for the step's pairs, their loss times `weight`."""
        return prepare(
            batches,
            lambda batch: self._engine(batch.packed, self._task, self._settings.pooling),
            partial(self._loss, batches=batches, temperature=self._temperature(plan.step), weight=weight),
        )

    def _loss(
        self, embeddings: Sequence[Tensor], batches: Sequence[LocalBatch], temperature: float | None, weight: float
    ) -> tuple[Tensor, dict[str, float]]:
        loss, figures = contrastive_loss(embeddings, batches, self._settings, temperature=temperature)
        return poisoned(loss) * weight, figures

    def _temperature(self, step: int) -> float | None:
        """Scheduled temperature of a step; None where there is no schedule."""
        settings = self._settings
        if settings.final_temperature is None:
            return None
        ends = settings.temperature, settings.final_temperature
        return moved(settings.temperature_schedule, *ends, step, self._total_steps)


class Joint:
    """Both losses in every step: (1 - w) generative + w contrastive, reduced together."""

    def __init__(self, engine: DeepSpeedEngine, recipe: Recipe, world: int, reduce: Reduce, total_steps: int) -> None:
        self._engine, self._settings, self._world, self._reduce = engine, recipe.joint, world, reduce
        self._total_steps = total_steps
        self._contrastive = Contrastive(engine, recipe, world, reduce, total_steps)
        self._squares: list[Tensor] = []
        engine.module.causal_lm.lm_head.register_forward_pre_hook(self._watch)

    def __call__(self, plan: StepPlan, batches: Sequence[LocalBatch]) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`."""
        joint = self._settings
        weight = moved(joint.schedule, joint.weight, joint.final_weight, plan.step, self._total_steps)
        pairs = [batch for batch in batches if batch.task == "contrastive"]
        self._squares.clear()
        closures, result = self._contrastive.closures(plan, pairs, weight)
        totals: list[Tensor] = []
        for batch in batches:
            if batch.task == "generative":
                closures.append(partial(self._generative, batch, plan.target_tokens, 1 - weight, totals))
        values = accumulate(self._engine, closures, reduce=self._reduce)
        loss, figures = result()
        generative = torch.stack(values[-len(totals) :]).double().sum()
        ours = torch.stack([torch.stack(totals).double().sum(), torch.stack(self._squares).double().sum()])
        if self._world > 1:
            dist.all_reduce(ours)
        norms = {name: value * weight if name.startswith("gradient_norm") else value for name, value in figures.items()}
        return (loss.double() + generative) / self._world, norms | {
            "loss_contrastive": figures["loss"],
            "loss_generative": float(ours[0]) / max(1, plan.target_tokens),
            "gradient_norm_generative": float(ours[1]) ** 0.5 / self._world,
            "joint_weight": weight,
        }

    def _generative(self, batch: LocalBatch, target_tokens: int, weight: float, totals: list[Tensor]) -> Tensor:
        loss = generative_loss(self._engine, batch.packed, target_tokens=target_tokens, world_size=self._world)
        totals.append(loss.total)
        return poisoned(loss.backward) * weight

    def _watch(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep the squared gradient at the hidden states that predict, for the log."""
        if inputs[0].requires_grad:
            inputs[0].register_hook(lambda grad: self._squares.append(grad.float().square().sum()))


def poisoned(loss: Tensor) -> Tensor:
    """The loss, and NaN where it is infinite: so that its gradient is seen not to be finite, on every rank."""
    return loss + (loss.detach() - loss.detach())


def make_objective(engine: DeepSpeedEngine, recipe: Recipe, world: int, total_steps: int) -> Objective:
    """The objective of the recipe's stage, for a run of `total_steps`."""
    each = engine.zero_optimization_stage() == 3 and torch.cuda.is_available()
    reduce: Reduce = "each" if each else "auto"  # reduced once, a whole gradient would lie on every GPU
    if recipe.stage == "generative":
        return Generative(engine, world, reduce)
    return (Joint if recipe.stage == "joint" else Contrastive)(engine, recipe, world, reduce, total_steps)
