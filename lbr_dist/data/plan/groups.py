"""Which pairs may share a batch: everything, one set of the mixture, or one domain.

Negatives from another domain are easy, and a batch of many domains lets a model win by telling domains apart. A group
is cut into equal batches: of n pairs, ceil(n / B) batches of at most B, so that no pair is left out and none of the
batches is tiny, at the price of batches that are a little below B. The batches of all groups are then shuffled over the
epoch. Without groups there is one, whose batches are whole but for the last.

A weight asks for parts of a pair: 1.5 of a domain of 3 at weight 0.5. What one group of a set leaves of them the next
one has more, so that the set as a whole gets its share, exactly in the first epoch and on average in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lbr_dist.config import Recipe
from lbr_dist.data.plan.base import Source
from lbr_dist.data.plan.generative import make_stream
from lbr_dist.data.plan.order import Mixture, shuffled
from lbr_dist.errors import UserError


class Group:
    """Pairs that may share a batch: the streams of some sets, or of parts of them."""

    def __init__(
        self, name: str, mixture: Mixture, sets: Sequence[int], *, batch: int, window: int, even: bool
    ) -> None:
        """Set up.

        Args:
            name: for messages.
            mixture: of its streams.
            sets: number of the set that each stream is of.
            batch: most pairs in a batch.
            window: pairs shuffled together, about.
            even: cut into equal batches; else whole ones and a rest.
        """
        self.name, self._mixture, self._sets = name, mixture, np.asarray(sets, dtype=np.int64)
        self._batch, self._window, self._even = batch, window, even

    def size(self, epoch: int) -> int:
        """Pairs of an epoch."""
        return self._mixture.size(epoch)

    def steps(self, epoch: int) -> int:
        """Batches of an epoch."""
        return -(-self.size(epoch) // self._batch)

    def edges(self, epoch: int, low: int, high: int) -> np.ndarray:
        """Position of the first pair of the batches low..high - 1, and the end of the last."""
        numbers, size = np.arange(low, high + 1), self.size(epoch)
        return numbers * size // max(1, self.steps(epoch)) if self._even else np.minimum(numbers * self._batch, size)

    def windows(self, epoch: int) -> np.ndarray:
        """Bounds of the epoch's windows, in batches: equal parts of whole batches, about `window` pairs each."""
        steps = self.steps(epoch)
        count = max(1, -(-steps // max(1, self._window // self._batch)))
        return steps * np.arange(count + 1) // count

    def take(self, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """set_N, row_N, pass_N at positions start..stop - 1, as `Mixture.take`."""
        stream_N, row_N, pass_N = self._mixture.take(epoch, start, stop)
        return self._sets[stream_N], row_N, pass_N


class Turn(NamedTuple):
    """Which batch a step of an epoch is: the group's number, and the batch's within the group."""

    group: int
    batch: int


class Groups:
    """All groups of a plan, and whose turn it is."""

    def __init__(self, groups: Sequence[Group], seed: int, carried: bool) -> None:
        """Set up.

        Args:
            groups: all of them.
            seed: of their turns.
            carried: some group begins with a part of a pair that another one left.
        """
        self._groups, self._seed, self.carried = list(groups), seed, carried
        self._turns = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, number: int) -> Group:
        return self._groups[number]

    def size(self, epoch: int) -> int:
        """Pairs of an epoch."""
        return sum(group.size(epoch) for group in self._groups)

    def steps(self, epoch: int) -> int:
        """Batches of an epoch."""
        return sum(group.steps(epoch) for group in self._groups)

    def turn(self, epoch: int, number: int) -> Turn:
        """The batch of step `number` of an epoch."""
        if len(self._groups) == 1:
            return Turn(0, number)
        group_N, batch_N = self._turns(epoch)
        return Turn(int(group_N[number]), int(batch_N[number]))

    def smallest(self) -> int:
        """Pairs of the smallest batch of the first epoch."""
        found = [int(np.diff(group.edges(0, 0, group.steps(0))).min()) for group in self._groups if group.steps(0)]
        return min(found)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        counts = [group.steps(epoch) for group in self._groups]
        group_N = np.repeat(np.arange(len(counts)), counts)
        group_N = group_N[shuffled(len(group_N), self._seed, "groups", epoch)]
        batch_N = np.empty_like(group_N)
        batch_N[np.argsort(group_N, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
        return group_N, batch_N


def make_groups(recipe: Recipe, sources: Sequence[Source], rows: Sequence[np.ndarray | None]) -> Groups:
    """The groups that `contrastive.homogeneous` asks for.

    Args:
        recipe: settings.
        sources: the sets of the mixture.
        rows: usable rows of each (None: all).

    Raises:
        UserError: by domain, and a set was prepared before its index had domains.
    """
    kind = recipe.contrastive.homogeneous
    parts: dict[str, list[tuple[int, np.ndarray | None]]] = {}
    for number, (source, row_N) in enumerate(zip(sources, rows, strict=True)):
        if kind == "domain":
            for name, of_domain_N in _by_domain(source, row_N).items():
                parts.setdefault(name, []).append((number, of_domain_N))
        else:
            parts.setdefault(source.name if kind == "set" else "", []).append((number, row_N))
    groups, carried = [], False
    left = [Fraction(0)] * len(sources)  # of each set: what its groups up to here took less than its weight asks for
    for name in sorted(parts) if kind == "domain" else parts:
        streams = [make_stream(recipe, sources[number], number, row_N) for number, row_N in parts[name]]
        sets = [number for number, _ in parts[name]]
        mixture = Mixture(streams, [sources[number].weight for number in sets], [left[number] for number in sets])
        carried |= any(left[number] for number in sets)
        for number, stream, weight in zip(sets, streams, mixture.weights, strict=True):
            left[number] = (left[number] + weight * stream.count) % 1
        size, window = recipe.batch.global_batch, recipe.data.window
        groups.append(Group(name, mixture, sets, batch=size, window=window, even=kind != "none"))
    return Groups(groups, recipe.seed, carried)


def _by_domain(source: Source, row_N: np.ndarray | None) -> dict[str, np.ndarray]:
    domains = source.index.domains
    if domains is None:
        raise UserError(
            f"{source.name}: contrastive.homogeneous=domain needs the records' domains in the index, and this set was "
            "prepared before they were kept: prepare the set again"
        )
    used_N = np.arange(len(domains)) if row_N is None else row_N
    names, which_N, count_D = np.unique(domains[used_N].astype(str), return_inverse=True, return_counts=True)
    by_domain_N = used_N[np.argsort(which_N, kind="stable")]
    return {str(name): part for name, part in zip(names, np.split(by_domain_N, np.cumsum(count_D)[:-1]), strict=False)}
