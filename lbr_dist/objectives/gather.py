"""Rows of every rank in one tensor, with the gradient flowing back to each rank.

`torch.distributed.all_gather` cuts the graph: its result carries no gradient to the ranks that sent the rows. Here the
backward of the gather is the sum of the ranks' partial gradients (a reduce-scatter), so that a rank may compute any
share of the global loss and the rows still get their whole gradient. Ranks may hold different numbers of rows, none
included: rows travel padded to the longest rank, one collective each way. The cost is (world x longest) rows of memory;
a ring of point-to-point sends would save it, at a price that benchmarks/ring.py measures.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a batch: all, or this process alone."""

    rank: int
    world: int

    @classmethod
    def of(cls) -> Ranks:
        """The default group where there is one, else this process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls(0, 1)
        return cls(dist.get_rank(), dist.get_world_size())

    def table(self, row: list[int], device: torch.device) -> list[list[int]]:
        """Every rank's row of integers, in rank order (one collective)."""
        if self.world == 1:
            return [row]
        mine = torch.tensor(row, dtype=torch.int64, device=device)
        table = mine.new_empty(self.world * len(row))
        dist.all_gather_into_tensor(table, mine)
        return [[int(value) for value in part] for part in table.view(self.world, -1).tolist()]

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """All-reduce `values` in place and return them."""
        if self.world > 1:
            dist.all_reduce(values, op=op)
        return values


def gather_rows(rows_ND: Tensor, counts: list[int], ranks: Ranks) -> Tensor:
    """Rows of every rank, in rank order: [sum(counts), ...], differentiable.

    Args:
        rows_ND: this rank's rows; `len(rows_ND) == counts[ranks.rank]`. Trailing shape and dtype are the same on all
            ranks.
        counts: number of rows of each rank, known to all (see `Ranks.table`).
        ranks: who takes part.

    The gradient of a rank's rows is the *sum* over ranks of the gradients that reach its part of the result.
    """
    if ranks.world == 1:
        return rows_ND
    return _Gather.apply(rows_ND, counts, ranks)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, counts: list[int], ranks: Ranks) -> Tensor:
        ctx.counts, ctx.ranks = counts, ranks  # type: ignore[attr-defined]
        longest = max(counts)
        padded = rows.new_empty((ranks.world * longest, *rows.shape[1:]))
        dist.all_gather_into_tensor(padded, _pad(rows, longest))
        if min(counts) == longest:
            return padded
        parts = padded.view(ranks.world, longest, *rows.shape[1:])
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        counts, ranks = ctx.counts, ctx.ranks  # type: ignore[attr-defined]
        (grad,) = grads
        longest = max(counts)
        if min(counts) == longest:
            padded = grad.contiguous()
        else:
            ends = list(itertools.accumulate(counts))
            parts = [grad[end - count : end] for end, count in zip(ends, counts, strict=True)]
            padded = torch.cat([_pad(part, longest) for part in parts])
        mine = grad.new_empty((longest, *grad.shape[1:]))
        dist.reduce_scatter_tensor(mine, padded)
        return mine[: counts[ranks.rank]], None, None


def _pad(rows: Tensor, length: int) -> Tensor:
    if len(rows) == length:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros((length - len(rows), *rows.shape[1:]))])
