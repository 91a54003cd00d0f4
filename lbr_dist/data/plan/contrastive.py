"""Stage 2 plan: `global_batch` query-passage pairs to a step, their texts packed into micro-batches.

Which pairs form a step decides the negatives, so it must not depend on the number of ranks; how a rank packs its texts
into micro-batches changes nothing but speed. Two records with the same answer in one step would be each other's false
negatives: the loss masks them, and the plan moves one to another step of the window where that is easily done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lbr_dist.config import Recipe
from lbr_dist.data.plan.base import (
    SIDES,
    EpochSummary,
    MicroPlan,
    Plan,
    PlannedSample,
    SampleRef,
    Source,
    StepPlan,
    rank_slice,
)
from lbr_dist.data.plan.generative import make_identity
from lbr_dist.data.plan.groups import make_groups
from lbr_dist.data.plan.lengths import ContrastiveLengths
from lbr_dist.data.plan.order import key64, shuffled
from lbr_dist.data.plan.packing import assign_bins
from lbr_dist.errors import UserError

SWAP_TRIES = 256
"""Other pairs tried for one that repeats an answer of its step; then it stays, and the loss masks it."""
CACHED_GROUPS = 256
"""Most groups whose current window is kept: their batches take turns."""


class Texts(NamedTuple):
    """Texts, [7, texts]: set, row, x_len, z_len, side (of `SIDES`), pair, choice; and the pairs' bounds, [pairs + 1].

    Of each pair the query, the passage and then its hard negatives.
    """

    columns: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class ContrastiveStep(StepPlan):
    """Stage 2 `StepPlan`: pairs, each with its hard negatives; see `base.StepPlan`."""

    step: int
    epoch: int
    texts: Texts
    micro_tokens: int

    @property
    def samples(self) -> int:
        """Pairs over all ranks."""
        return len(self.texts.starts) - 1

    @property
    def target_tokens(self) -> int:
        """0: nothing is predicted in stage 2."""
        return 0

    @property
    def input_tokens(self) -> int:
        """Tokens of all texts with their Z."""
        return int(self.texts.columns[2:4].sum())

    def micro_batches(self, rank: int, world: int) -> list[MicroPlan]:
        """The texts of the rank's pairs, best fit into micro-batches; every rank gets as many as the fullest one."""
        columns, bin_N, own = self._pack(rank, world)
        sides = [*SIDES]
        micros = [MicroPlan([], "contrastive") for _ in range(self._most_bins(rank, own, world))]
        for (set_, row, x, z, side, pair, choice), number in zip(columns.T.tolist(), bin_N.tolist(), strict=True):
            text = PlannedSample(SampleRef(set_, row), x, z, side=sides[side], pair=pair, choice=choice)
            micros[number].samples.append(text)
        return micros

    def pairs(self, rank: int, world: int) -> range:
        """The rank's contiguous range of pair indices."""
        return rank_slice(self.samples, rank, world)

    def refs(self) -> list[SampleRef]:
        """The record of each pair, in plan order."""
        return [SampleRef(*pair) for pair in self.texts.columns[:2, self.texts.starts[:-1]].T.tolist()]

    def _most_bins(self, rank: int, own: int, world: int) -> int:
        """Bins of the rank that needs most, where `rank` needs `own`.

        Any two of best fit's bins hold more than one can, so n (n > 1) hold more than n / 2 full ones do: a rank
        of few tokens need not be packed to know that it has no more bins than another.
        """
        ends_N = np.append(0, np.cumsum(self.texts.columns[2:4].sum(axis=0)))[self.texts.starts]
        slices = [self.pairs(other, world) for other in range(world)]
        tokens_W = np.array([ends_N[part.stop] - ends_N[part.start] for part in slices])
        most = max(own, 1)
        for other in np.argsort(-tokens_W, kind="stable").tolist():
            if 2 * tokens_W[other] <= (most + 1) * self.micro_tokens:
                break
            if other != rank:
                most = max(most, self._pack(other, world)[2])
        return most

    def _pack(self, rank: int, world: int) -> tuple[np.ndarray, np.ndarray, int]:
        """A rank's texts (queries, then passages, then hard negatives), the bin of each, and the number of bins."""
        mine = self.pairs(rank, world)
        columns = self.texts.columns[:, self.texts.starts[mine.start] : self.texts.starts[mine.stop]]
        columns = columns[:, np.argsort(columns[4], kind="stable")]
        return columns, *assign_bins(columns[2:4].sum(axis=0), self.micro_tokens)


class ContrastivePlan(Plan):
    """Plan of stage 2; see `base.Plan`."""

    def __init__(self, recipe: Recipe, sources: Sequence[Source], *, query_extra: int, passage_extra: int) -> None:
        """Plan from the indexes.

        Args:
            recipe: settings.
            sources: the sets of the mixture, in the recipe's order.
            query_extra: tokens put before every query: bos and instruction.
            passage_extra: tokens put before every passage and hard negative.

        Raises:
            UserError: a set without questions and answers, or without a usable one; a text that no micro-batch holds;
                weights that leave no pair.
        """
        super().__init__(sources)
        self._recipe, self._seed, self._global_batch = recipe, recipe.seed, recipe.batch.global_batch
        self._micro_tokens = recipe.batch.micro_tokens or recipe.data.bin_tokens
        longest = recipe.data.max_x_tokens + recipe.bottleneck.count
        self._lengths, rows = [], []
        for number, source in enumerate(self.sources):
            lengths = ContrastiveLengths(
                recipe,
                source,
                query_extra=query_extra,
                passage_extra=passage_extra,
                number=number,
            )
            if longest > self._micro_tokens:
                setting = "batch.micro_tokens" if recipe.batch.micro_tokens else "data.bin_tokens"
                raise UserError(
                    f"{source.name}: a text of data.max_x_tokens={recipe.data.max_x_tokens} with its bottleneck tokens "
                    f"({longest} in all) does not fit {setting}={self._micro_tokens}: "
                    "raise it or lower data.max_x_tokens"
                )
            rows_N, too_long = lengths.usable()
            self._lengths.append(lengths)
            self.too_long += too_long
            rows.append(rows_N)
        self._check_negatives(rows)
        self._groups = make_groups(recipe, self.sources, rows)
        usable = [len(s.index) if row_N is None else len(row_N) for s, row_N in zip(self.sources, rows, strict=True)]
        self._check_weights(self._groups.size(0), usable)
        self._note_options()
        self.identity = make_identity(recipe, self.sources) | {
            "contrastive.hard_negatives": recipe.contrastive.hard_negatives,
            "contrastive.instructions": (recipe.contrastive.query_instruction, recipe.contrastive.passage_instruction),
            "specials": (query_extra, passage_extra),
        }
        for name, default in (("homogeneous", "none"), ("positives", "answer")):
            value = getattr(recipe.contrastive, name)
            if value != default:  # left out otherwise, so that runs begun before these settings existed go on
                self.identity[f"contrastive.{name}"] = value
        if self._groups.carried:  # runs begun before it was carried over had other pairs
            self.identity["contrastive.homogeneous"] += ", parts of pairs carried over"
        self._steps = lru_cache(maxsize=None)(self._groups.steps)
        self._ordered = lru_cache(maxsize=2 + min(len(self._groups), CACHED_GROUPS))(self._order)

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch; the last may be partial."""
        return self._steps(epoch % self._period)

    def summary(self, epoch: int) -> EpochSummary:
        """Totals of an epoch."""
        tokens = 0
        for part in range(len(self._groups)):
            group = self._groups[part]
            size = group.size(epoch)
            for low in range(0, size, self._recipe.data.window):
                set_N, row_N, pass_N = group.take(epoch, low, min(size, low + self._recipe.data.window))
                for number, lengths in enumerate(self._lengths):
                    of_set = set_N == number
                    tokens += lengths.tokens(row_N[of_set], pass_N[of_set])
        return EpochSummary(self.steps_per_epoch(epoch), self._groups.size(epoch), tokens, 0, 0, float("nan"))

    def step(self, global_step: int) -> ContrastiveStep:
        """The plan of one step: `global_batch` pairs, fewer in the last step of an epoch (of groups: see `Group`)."""
        epoch, number = self.locate(global_step)
        turn = self._groups.turn(epoch, number)
        group = self._groups[turn.group]
        bounds = group.windows(epoch)
        window = int(np.searchsorted(bounds, turn.batch, side="right")) - 1
        edges = group.edges(epoch, int(bounds[window]), int(bounds[window + 1]))
        inside = turn.batch - int(bounds[window])
        low, high = (edges[inside : inside + 2] - edges[0]).tolist()
        set_N, row_N, pass_N = (part[low:high] for part in self._ordered(turn.group, epoch, window))
        return ContrastiveStep(global_step, epoch, self._texts(set_N, row_N, pass_N), self._micro_tokens)

    def _texts(self, set_N: np.ndarray, row_N: np.ndarray, pass_N: np.ndarray) -> Texts:
        """All texts of these pairs."""
        parts = []
        for number, lengths in enumerate(self._lengths):
            pair_N = np.flatnonzero(set_N == number)
            rows, passes = row_N[pair_N], pass_N[pair_N]
            x_N, z_N, choice_N = lengths.positive(rows, passes)
            of_sides = [(pair_N, np.full_like(pair_N, -1), *lengths.query(rows)), (pair_N, choice_N, x_N, z_N)]
            if self._recipe.contrastive.hard_negatives:
                place_K, *found = lengths.negatives(rows, passes)
                of_sides.append((pair_N[place_K], *found))
            for side, (pair_K, choice_K, x_K, z_K) in enumerate(of_sides, SIDES["query"]):
                set_K, side_K = np.full_like(pair_K, number), np.full_like(pair_K, side)
                parts.append(np.stack([set_K, row_N[pair_K], x_K, z_K, side_K, pair_K, choice_K]))
        columns = np.concatenate(parts, axis=1)
        columns = columns[:, np.argsort(columns[5], kind="stable")]
        return Texts(columns, np.append(0, np.cumsum(np.bincount(columns[5], minlength=len(set_N)))))

    def _check_negatives(self, rows: Sequence[np.ndarray | None]) -> None:
        """Count the records with fewer hard negatives than asked for, those left aside that are too long or empty.

        Args:
            rows: usable rows of each set (None: all).

        Raises:
            UserError: no record has one.
        """
        wanted, found = self._recipe.contrastive.hard_negatives, False
        if not wanted:
            return
        for source, lengths, row_N in zip(self.sources, self._lengths, rows, strict=True):
            counts_N = lengths.count_negatives(row_N)
            found |= bool(counts_N.any())
            short = int((counts_N < wanted).sum())
            if short:
                self.notes.append(
                    f"{source.name}: {short} of {len(counts_N)} records have fewer than contrastive.hard_negatives="
                    f"{wanted} ({int((counts_N == 0).sum())} have none); they are used with what they have"
                )
        if not found:
            left, remedy = "", "mine some (lbr mine)"
            if any(len(source.index.negative_tokens.values) for source in self.sources):
                left = f" that are used ({'; '.join(map(str, self.too_long))})"
                remedy = "raise data.max_x_tokens, mine others (lbr mine)"
            raise UserError(
                f"contrastive.hard_negatives={wanted}, but no record of {', '.join(s.name for s in self.sources)} has "
                f"`negatives`{left}: {remedy}, or set it to 0"
            )

    def _note_options(self) -> None:
        """Note what `homogeneous` and `positives` come to, also where the sets leave them nothing to do."""
        kind, count = self._recipe.contrastive.homogeneous, len(self._groups)
        if kind != "none":
            groups = f"{count} groups" if count > 1 else "1 group"
            note = f"batches of one {kind}: {groups}, the smallest batch has {self._groups.smallest()} pairs"
            if count == 1:
                note += f"; contrastive.homogeneous={kind} keeps no pairs apart"
                if kind == "domain" and not self._groups[0].name:
                    note += ", since no record names a domain"
            self.notes.append(note)
        if self._recipe.contrastive.positives == "draw":
            texts = [source.index.positive_tokens for source in self.sources]
            if not any(ragged is not None and len(ragged.values) for ragged in texts):
                self.notes.append(
                    f"contrastive.positives=draw has no effect: no record of {', '.join(s.name for s in self.sources)} "
                    "has `positives`"
                )

    def _order(self, part: int, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """set_N, row_N, pass_N of a window's pairs of one group, in the order of its batches."""
        group = self._groups[part]
        edges = group.edges(epoch, *group.windows(epoch)[window : window + 2].tolist())
        columns = group.take(epoch, int(edges[0]), int(edges[-1]))
        own = (epoch, window) if len(self._groups) == 1 else (part, epoch, window)
        order_N = shuffled(len(columns[0]), self._seed, "window", *own)
        set_N, row_N, pass_N = (column[order_N] for column in columns)
        answer_N = np.empty(len(set_N), dtype=np.int64)
        for number, source in enumerate(self.sources):
            of_set = set_N == number
            answer_N[of_set] = source.index.answer_hash[row_N[of_set]]
        step_N = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
        order_N = spread(answer_N, step_N, key64(self._seed, "swaps", *own))
        return set_N[order_N], row_N[order_N], pass_N[order_N]


def spread(answer_N: np.ndarray, step_N: np.ndarray, key: int) -> np.ndarray:
    """Permutation of pairs, close to the identity, in which a step rarely holds the same answer twice.

    Args:
        answer_N: hash of each pair's answer.
        step_N: step of each place, ascending.
        key: seed of the order in which partners for a swap are tried.
    """
    count = len(answer_N)
    order_N = np.arange(count)
    by_answer = np.lexsort((step_N, answer_N))
    same = (np.diff(answer_N[by_answer]) == 0) & (np.diff(step_N[by_answer]) == 0)
    repeats = np.sort(by_answer[1:][same]).tolist()
    if not repeats or step_N[0] == step_N[-1]:
        return order_N
    answers, order, steps = answer_N.tolist(), order_N.tolist(), step_N.tolist()
    held: dict[tuple[int, int], int] = {}
    for place, answer in enumerate(answers):
        held[steps[place], answer] = held.get((steps[place], answer), 0) + 1
    for place in repeats:
        mine, step = answers[order[place]], steps[place]
        start = key64(key, place) % count
        for partner in ((start + offset) % count for offset in range(min(SWAP_TRIES, count))):
            other, theirs = steps[partner], answers[order[partner]]
            if other != step and not held.get((other, mine)) and not held.get((step, theirs)):
                order[place], order[partner] = order[partner], order[place]
                for moved, source, target in ((mine, step, other), (theirs, other, step)):
                    held[source, moved] -= 1
                    held[target, moved] = held.get((target, moved), 0) + 1
                break
    return np.array(order, dtype=np.int64)
