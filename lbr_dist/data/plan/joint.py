"""Joint plan: a stage 1 and a stage 2 plan side by side, each a pure function of the step.

Every step has bins of the one and pairs of the other. The pairs say what an epoch and how long the run is; the bins go
through their own data at their own pace, again from the start when it ends, each sample once per pass. So neither plan
knows of the other, and what holds for each (same steps at any world size, exact resuming, the audit) holds for both.
"""

from __future__ import annotations

from dataclasses import dataclass

from lbr_dist.data.plan.base import EpochSummary, MicroPlan, Plan, SampleRef, StepPlan


@dataclass(frozen=True)
class JointStep(StepPlan):
    """One step of both plans; see `base.StepPlan`."""

    step: int
    epoch: int
    generative: StepPlan
    contrastive: StepPlan
    first_set: int
    """Sets of the generative plan, which come first in `Plan.sources`."""

    @property
    def samples(self) -> int:
        """Samples in bins, and pairs."""
        return self.generative.samples + self.contrastive.samples

    @property
    def target_tokens(self) -> int:
        """Of the generative loss."""
        return self.generative.target_tokens

    @property
    def input_tokens(self) -> int:
        """Of both."""
        return self.generative.input_tokens + self.contrastive.input_tokens

    def micro_batches(self, rank: int, world: int) -> list[MicroPlan]:
        """Bins first, then the texts of pairs."""
        texts = [
            MicroPlan([text._replace(ref=self._ref(text.ref)) for text in micro.samples], micro.task)
            for micro in self.contrastive.micro_batches(rank, world)
        ]
        return self.generative.micro_batches(rank, world) + texts

    def pairs(self, rank: int, world: int) -> range:
        """Of the contrastive loss."""
        return self.contrastive.pairs(rank, world)

    def refs(self) -> list[SampleRef]:
        """Samples in bins, then pairs."""
        return self.generative.refs() + [self._ref(ref) for ref in self.contrastive.refs()]

    def uses(self) -> list[tuple[int, SampleRef]]:
        """`refs`, each with the epoch of its own plan."""
        pairs = [(epoch, self._ref(ref)) for epoch, ref in self.contrastive.uses()]
        return self.generative.uses() + pairs

    def _ref(self, ref: SampleRef) -> SampleRef:
        return SampleRef(ref.set + self.first_set, ref.row)


class JointPlan(Plan):
    """Plan of a joint run; see `base.Plan`. Epochs are those of the pairs."""

    def __init__(self, generative: Plan, contrastive: Plan) -> None:
        super().__init__([*generative.sources, *contrastive.sources])
        self._generative, self._contrastive = generative, contrastive
        for name, plan in (("generative", generative), ("contrastive", contrastive)):
            self.identity |= {f"joint.{name}.{key}": value for key, value in plan.identity.items()}
            self.too_long += plan.too_long
            self.notes += plan.notes

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch of pairs."""
        return self._contrastive.steps_per_epoch(epoch)

    def step(self, global_step: int) -> JointStep:
        """The same step of both plans."""
        contrastive = self._contrastive.step(global_step)
        generative = self._generative.step(global_step)
        return JointStep(global_step, contrastive.epoch, generative, contrastive, len(self._generative.sources))

    def summary(self, epoch: int) -> EpochSummary:
        """Totals of an epoch of pairs; the generative part is counted by its average step."""
        pairs, bins = self._contrastive.summary(epoch), self._generative.summary(0)
        share = pairs.steps / bins.steps
        return EpochSummary(
            pairs.steps,
            pairs.samples + round(share * bins.samples),
            pairs.input_tokens + round(share * bins.input_tokens),
            round(share * bins.target_tokens),
            round(share * bins.bins),
            bins.efficiency,
        )
