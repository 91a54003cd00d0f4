"""What a plan is made of: the types that the plans, the loader, the training loop and the audit share.

Torch-free and small, so that `lbr plan` can compute a whole run's steps without starting anything.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import xxhash

from lbr_dist.config import Duration
from lbr_dist.errors import UserError

if TYPE_CHECKING:
    from lbr_dist.data.information import Information
    from lbr_dist.data.split_index import SplitIndex

INSTRUCTIONS = ("contrastive.query_instruction", "contrastive.passage_instruction")
FOLLOWS: dict[str, tuple[str, ...]] = {
    "data.sets": ("data.sets", "generative.target"),
    "bottleneck.surprisal": ("bottleneck",),
    "generative.prefix": ("generative.prefix_min", "generative.prefix_max"),
    "contrastive.instructions": INSTRUCTIONS,
    "specials": INSTRUCTIONS,
    "joint.generative.batch.global_batch": ("joint.bins",),
}
"""Entry of `Plan.identity`, to the recipe's fields, or sections, that it follows from; others are named as the field.
In a joint run the part's name is in front."""

Side = Literal["x", "query", "passage", "negative"]
"""Role of a sample: "x" in stage 1, the other three in stage 2."""
SIDES: dict[Side, int] = {"x": 0, "query": 1, "passage": 2, "negative": 3}
"""Codes of the roles, in columns and tensors."""


@dataclass(frozen=True)
class Source:
    """One set of the mixture, as the plan sees it: its index and how it is used."""

    name: str
    """Path of the set and its split, for messages only: never part of the fingerprint."""
    fingerprint: str
    """Identity of the content and order of the index."""
    index: SplitIndex
    weight: float
    target: str
    """Stage 1 target: sft, reconstruct or prefix."""
    information: Information | None = None
    """Bits in each text, where they decide the number of bottleneck tokens."""


class SampleRef(NamedTuple):
    """Where a record lies: `row` in the split index of mixture set `set`."""

    set: int
    row: int


class PlannedSample(NamedTuple):
    """One sample of a micro-batch, with the lengths (in tokens) that it has to have."""

    ref: SampleRef
    x_len: int
    """|X|: bos + instruction + text, after any cut."""
    z_len: int
    """|Z|: bottleneck tokens."""
    y_len: int = 0
    """|Y|: target + eos, after any cut; 0 in stage 2."""
    side: Side = "x"
    pair: int = -1
    """Stage 2: index of the query-passage pair in the step, over all ranks."""
    choice: int = -1
    """Side "negative": which of the record's negatives; "passage": which of its `positives`, -1 for the answer."""

    @property
    def tokens(self) -> int:
        """Tokens that the sample takes in a packed batch."""
        return self.x_len + self.z_len + self.y_len


Task = Literal["generative", "contrastive"]
"""Which loss a micro-batch is for."""


@dataclass(frozen=True)
class MicroPlan:
    """What one rank runs in one forward pass. No samples: a dummy pass that keeps the ranks in step."""

    samples: list[PlannedSample]
    task: Task

    @property
    def tokens(self) -> int:
        """Useful tokens of the micro-batch."""
        return sum(sample.tokens for sample in self.samples)


class StepPlan(ABC):
    """One optimizer step over all ranks."""

    step: int
    """Global step, from 0."""
    epoch: int

    @property
    @abstractmethod
    def samples(self) -> int:
        """Real samples (stage 2: pairs) over all ranks."""

    @property
    @abstractmethod
    def target_tokens(self) -> int:
        """Stage 1: tokens predicted over the whole global batch, the denominator of the mean loss; 0 in stage 2."""

    @property
    @abstractmethod
    def input_tokens(self) -> int:
        """Useful tokens over all ranks: X, Z and Y."""

    @abstractmethod
    def micro_batches(self, rank: int, world: int) -> list[MicroPlan]:
        """The rank's forward passes: the same number on every rank, shorter ranks padded with empty ones."""

    @abstractmethod
    def pairs(self, rank: int, world: int) -> range:
        """Stage 2: the rank's contiguous range of pair indices; the ranges of all ranks make up 0..samples - 1."""

    @abstractmethod
    def refs(self) -> list[SampleRef]:
        """The record of every sample, in plan order: what the audit compares a run's log with."""

    def uses(self) -> list[tuple[int, SampleRef]]:
        """`refs`, each with the epoch that its use counts in."""
        return [(self.epoch, ref) for ref in self.refs()]


@dataclass(frozen=True)
class EpochSummary:
    """Totals of one epoch, known before it starts."""

    steps: int
    samples: int
    input_tokens: int
    target_tokens: int
    bins: int
    """Stage 1: packed bins; 0 in stage 2, where packing depends on the number of ranks."""
    efficiency: float
    """Stage 1: useful tokens over the bins' capacity; NaN in stage 2."""


@dataclass(frozen=True)
class TooLong:
    """Samples of one set that exceed a limit, or are empty, in one pass over the set."""

    set_name: str
    part: str
    """question, answer, document, passage, negative ..."""
    limit: int
    """Tokens allowed, specials included; 0 where the part has none, so that there is nothing to read."""
    action: str
    """"cut" or "drop"."""
    count: int
    longest: int
    """Tokens of the longest one, specials included."""

    def __str__(self) -> str:
        if not self.limit:
            return f"{self.set_name}: {self.count} samples with an empty {self.part} dropped"
        done = "cut" if self.action == "cut" else "dropped"
        return (
            f"{self.set_name}: {self.count} samples whose {self.part} exceeds {self.limit} tokens {done} "
            f"(the longest has {self.longest})"
        )


class Plan(ABC):
    """Which samples form each step: a pure function of the indexes, the settings and the seed.

    The same on every rank, in any process and at any world size; nothing is remembered between steps but caches.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.identity: dict[str, Any] = {}
        """All that changes the order or content of the data: compare two to name the setting that differs."""
        self.too_long: list[TooLong] = []
        """Samples cut or dropped in one pass over each set: for the log."""
        self.notes: list[str] = []
        """What else the log should say about the data."""
        self._ends: list[int] = []  # global step at which each known epoch ends

    def _check_weights(self, samples: int, usable: Sequence[int]) -> None:
        """Note the sets of which the first epoch has no sample.

        Args:
            samples: of the first epoch.
            usable: samples of each set.

        Raises:
            UserError: it has none of any.
        """
        few = [
            f"{source.name}: of {count} usable samples, weight {source.weight:g} takes none in the first epoch"
            for source, count in zip(self.sources, usable, strict=True)
            if source.weight * count < 1 or not samples
        ]
        if not samples:
            raise UserError(f"{'; '.join(few)}: raise data.sets.N.weight")
        self.notes += few

    @property
    def fingerprint(self) -> str:
        """Hash of `identity`: two plans with the same one give the same steps."""
        return xxhash.xxh128_hexdigest(repr(sorted(self.identity.items())).encode())

    @cached_property
    def _period(self) -> int:
        """Epochs after which each set stands again where a pass begins: from there on their sizes repeat."""
        return math.lcm(*(Fraction(str(source.weight)).denominator for source in self.sources))

    @abstractmethod
    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch; the last may be partial."""

    @abstractmethod
    def step(self, global_step: int) -> StepPlan:
        """The plan of one step. Cheap but for the first access to an epoch and to a window of samples."""

    @abstractmethod
    def summary(self, epoch: int) -> EpochSummary:
        """Totals of an epoch."""

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within the epoch) of a global step."""
        while not self._ends or self._ends[-1] <= step:
            self._ends.append((self._ends[-1] if self._ends else 0) + self.steps_per_epoch(len(self._ends)))
        epoch = int(np.searchsorted(self._ends, step, side="right"))
        return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def total_steps(self, duration: Duration) -> int:
        """Optimizer steps of a run; a fraction of an epoch is rounded up to whole steps."""
        if duration.steps is not None:
            return duration.steps
        assert duration.epochs is not None
        whole = int(duration.epochs)
        steps = sum(self.steps_per_epoch(epoch) for epoch in range(whole))
        share = duration.epochs - whole
        return steps + (math.ceil(share * self.steps_per_epoch(whole) - 1e-9) if share else 0)


def rank_slice(count: int, rank: int, world: int) -> range:
    """Contiguous share of `count` items for one rank; shares differ by one item at most."""
    return range(rank * count // world, (rank + 1) * count // world)
