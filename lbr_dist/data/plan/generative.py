"""Stage 1 plan: windows of samples packed into bins, `global_batch` bins to a step.

The number of steps of an epoch is known only after all its windows are packed, from lengths alone (about 0.1 s for
100,000 samples); that pass is made once per epoch (once for all where none can differ) and keeps four integers per
window. The windows themselves are recomputed when a step needs them, so memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from lbr_dist.config import Recipe
from lbr_dist.data.plan.base import (
    EpochSummary,
    MicroPlan,
    Plan,
    PlannedSample,
    SampleRef,
    Source,
    StepPlan,
    rank_slice,
)
from lbr_dist.data.plan.lengths import GenerativeLengths
from lbr_dist.data.plan.order import Mixture, Stream, key64, shuffled
from lbr_dist.data.plan.packing import assign_bins, group_by_bin
from lbr_dist.errors import UserError

SPAN_WINDOWS = 8
"""Windows' worth of rows within which blocks are shuffled: what a bounded cache of remote shards has to hold."""


class Packed(NamedTuple):
    """Samples in bin order, [5, samples]: set, row, x_len, z_len, y_len; and the bins' bounds, [bins + 1]."""

    columns: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class GenerativeStep(StepPlan):
    """Stage 1 `StepPlan`: whole bins; see `base.StepPlan`."""

    step: int
    epoch: int
    packed: Packed
    bins_per_micro: int

    @property
    def samples(self) -> int:
        """Samples over all ranks."""
        return self.packed.columns.shape[1]

    @property
    def target_tokens(self) -> int:
        """Tokens of all Y: the denominator of the mean loss."""
        return int(self.packed.columns[4].sum())

    @property
    def input_tokens(self) -> int:
        """Tokens of all X, Z and Y."""
        return int(self.packed.columns[2:].sum())

    def micro_batches(self, rank: int, world: int) -> list[MicroPlan]:
        """The rank's bins, `bins_per_micro` at a time; every rank gets as many micro-batches as the fullest one."""
        bins, starts = len(self.packed.starts) - 1, self.packed.starts
        most = -(-bins // world)
        mine = rank_slice(bins, rank, world)
        micros = []
        for low in range(0, most, self.bins_per_micro):
            part = mine[low : low + self.bins_per_micro]
            columns = self.packed.columns[:, starts[part.start] : starts[part.stop]].T.tolist() if part else []
            samples = [PlannedSample(SampleRef(s, row), x, z, y) for s, row, x, z, y in columns]
            micros.append(MicroPlan(samples, "generative"))
        return micros

    def pairs(self, rank: int, world: int) -> range:
        """None in stage 1."""
        return range(0)

    def refs(self) -> list[SampleRef]:
        """Every record used, in plan order."""
        return [SampleRef(*pair) for pair in self.packed.columns[:2].T.tolist()]


class _Table(NamedTuple):
    """One epoch: bounds_W+1 of the windows in samples, ends_W of the windows in bins, and totals."""

    bounds: np.ndarray
    ends: np.ndarray
    input_tokens: int
    target_tokens: int


class GenerativePlan(Plan):
    """Plan of stage 1; see `base.Plan`."""

    def __init__(self, recipe: Recipe, sources: Sequence[Source], *, bos: int, eos: int) -> None:
        """Plan from the indexes.

        Args:
            recipe: settings.
            sources: the sets of the mixture, in the recipe's order.
            bos: tokens put before every X.
            eos: tokens put after every Y.

        Raises:
            UserError: a set does not suit its target, a sample does not fit a bin, or a set has no usable sample,
                or the weights leave none.
        """
        super().__init__(sources)
        data = recipe.data
        if recipe.batch.micro_tokens is not None and recipe.batch.micro_tokens < data.bin_tokens:
            raise UserError(
                f"batch.micro_tokens={recipe.batch.micro_tokens} is smaller than data.bin_tokens={data.bin_tokens}: "
                "a micro-batch holds whole bins; raise the first or lower the second"
            )
        self._bins_per_micro = (recipe.batch.micro_tokens or data.bin_tokens) // data.bin_tokens
        self._bin_tokens, self._window, self._global_batch = data.bin_tokens, data.window, recipe.batch.global_batch
        self._seed = recipe.seed
        self._lengths, streams = [], []
        for number, source in enumerate(self.sources):
            lengths = GenerativeLengths(recipe, source, bos=bos, eos=eos, key=key64(recipe.seed, "prefix", number))
            rows_N, too_long = lengths.usable()
            self._lengths.append(lengths)
            self.too_long += too_long
            streams.append(make_stream(recipe, source, number, rows_N))
        self._mixture = Mixture(streams, [source.weight for source in self.sources])
        self._check_weights(self._mixture.size(0), [stream.count for stream in streams])
        self.identity = make_identity(recipe, self.sources) | {
            "data.bin_tokens": data.bin_tokens,
            "data.max_y_tokens": data.max_y_tokens,
            "generative.prefix": (recipe.generative.prefix_min, recipe.generative.prefix_max),
            "specials": (bos, eos),
        }
        self._table = lru_cache(maxsize=64)(self._make_table)
        self._steps = lru_cache(maxsize=None)(self._count_steps)
        self._packed = lru_cache(maxsize=4)(self._pack)

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch; the last may be partial."""
        return self._steps(0 if self._same_steps else epoch)

    @cached_property
    def _same_steps(self) -> bool:
        """Whether every epoch packs the same lengths together, in whatever order: all of them need not be packed."""
        moved = any(source.target == "prefix" for source in self.sources)
        return self._period == 1 and len(self._bounds(0)) == 2 and not moved

    def summary(self, epoch: int) -> EpochSummary:
        """Totals of an epoch."""
        table = self._table(epoch)
        bins = int(table.ends[-1])
        efficiency = table.input_tokens / max(1, bins * self._bin_tokens)
        samples = int(table.bounds[-1])
        return EpochSummary(
            self.steps_per_epoch(epoch), samples, table.input_tokens, table.target_tokens, bins, efficiency
        )

    def step(self, global_step: int) -> GenerativeStep:
        """The plan of one step: `global_batch` bins, fewer in the last step of an epoch."""
        epoch, number = self.locate(global_step)
        ends = self._table(epoch).ends
        low, high = number * self._global_batch, min(int(ends[-1]), (number + 1) * self._global_batch)
        columns, sizes = [], [np.zeros(1, dtype=np.int64)]
        for window in range(int(np.searchsorted(ends, low, side="right")), len(ends)):
            first = int(ends[window - 1]) if window else 0
            if first >= high:
                break
            packed = self._packed(epoch, window)
            starts = packed.starts[max(0, low - first) : high - first + 1]
            columns.append(packed.columns[:, starts[0] : starts[-1]])
            sizes.append(np.diff(starts))
        joined = Packed(np.concatenate(columns, axis=1), np.cumsum(np.concatenate(sizes)))
        return GenerativeStep(global_step, epoch, joined, self._bins_per_micro)

    def _bounds(self, epoch: int) -> np.ndarray:
        """Bounds of the epoch's windows: equal parts, none over data.window samples."""
        size = self._mixture.size(epoch)
        windows = max(1, -(-size // self._window))
        return size * np.arange(windows + 1) // windows

    def _columns(self, epoch: int, window: int) -> np.ndarray:
        """Columns set, row, x_len, z_len, y_len of a window's samples, shuffled."""
        low, high = self._bounds(epoch)[window : window + 2].tolist()
        set_N, row_N, pass_N = self._mixture.take(epoch, low, high)
        columns_5N = np.empty((5, len(set_N)), dtype=np.int64)
        columns_5N[0], columns_5N[1] = set_N, row_N
        for number, lengths in enumerate(self._lengths):
            of_set = set_N == number
            columns_5N[2:, of_set] = lengths.lengths(row_N[of_set], pass_N[of_set])
        return columns_5N[:, shuffled(len(set_N), self._seed, "window", epoch, window)]

    def _pack(self, epoch: int, window: int) -> Packed:
        columns_5N = self._columns(epoch, window)
        bin_N, bins = assign_bins(columns_5N[2:].sum(axis=0), self._bin_tokens)
        # Best-fit-decreasing opens the bins of long samples first: without this shuffle the steps would be sorted too.
        bin_N = shuffled(bins, self._seed, "bins", epoch, window)[bin_N]
        order_N, starts = group_by_bin(bin_N, bins)
        return Packed(columns_5N[:, order_N], starts)

    def _count_steps(self, epoch: int) -> int:
        return -(-int(self._table(epoch).ends[-1]) // self._global_batch)

    def _make_table(self, epoch: int) -> _Table:
        bounds = self._bounds(epoch)
        bins, input_tokens, target_tokens = [], 0, 0
        for window in range(len(bounds) - 1):
            columns_5N = self._columns(epoch, window)
            lengths_N = columns_5N[2:].sum(axis=0)
            bins.append(assign_bins(lengths_N, self._bin_tokens)[1])
            input_tokens += int(lengths_N.sum())
            target_tokens += int(columns_5N[4].sum())
        return _Table(bounds, np.cumsum(bins), input_tokens, target_tokens)


def make_stream(recipe: Recipe, source: Source, number: int, rows_N: np.ndarray | None) -> Stream:
    """Order of one set's usable rows."""
    shard_N = source.index.shard if rows_N is None else source.index.shard[rows_N]
    span = SPAN_WINDOWS * recipe.data.window
    return Stream(rows_N, shard_N, block=recipe.data.block, span=span, key=key64(recipe.seed, "set", number))


def make_identity(recipe: Recipe, sources: Sequence[Source]) -> dict[str, Any]:
    """What changes the order or content of the data in both stages."""
    identity: dict[str, Any] = {
        "plan.version": 1,
        "stage": recipe.stage,
        "seed": recipe.seed,
        "data.sets": tuple((source.fingerprint, source.weight, source.target) for source in sources),
        "data.max_x_tokens": recipe.data.max_x_tokens,
        "data.too_long": recipe.data.too_long,
        "data.window": recipe.data.window,
        "data.block": recipe.data.block,
        "batch.global_batch": recipe.batch.global_batch,
        "bottleneck": (recipe.bottleneck.count, recipe.bottleneck.effective_ratio),
    }
    surprisal = recipe.bottleneck.by_surprisal
    if surprisal is not None:  # left out otherwise, so that runs begun before it existed go on
        known = [source.information for source in sources if source.information is not None]
        tables = (information.fingerprint for information in known)
        identity["bottleneck.surprisal"] = (surprisal.bits, *sorted({i.model for i in known}), *tables)
    return identity
