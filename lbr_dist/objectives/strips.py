"""The arithmetic of InfoNCE, strip by strip: scores never exist whole.

A strip is a block of this rank's query rows against *all* passages of the global batch, as tall as `tile * tile`
elements allow. Because a strip holds whole rows, its softmax is final at once, and the gradient is taken in the same
pass: three matrix products, as many as the untiled loss, where square tiles would need a fourth to compute the scores
again. Only the two-way loss with more than one strip pays that price, since a column's normaliser is known after the
last strip of the last rank (an online log-sum-exp). The trade-off: gradients are computed in the forward pass and held
until the backward (2 x batch x width numbers).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import normalize, softplus

from lbr_dist.objectives.gather import Ranks

NO_KEY = -(2**63)
"""Stands for "no hash" among the int64 keys; matches nothing."""

MIN_ROWS = 16
_LOWEST = -1e30  # a finite stand-in for minus infinity: exp(-inf - _LOWEST) is 0 where exp(-inf + inf) is not a number

SUMS = (
    *("row_loss", "column_loss", "correct", "positive", "negative", "negatives", "alone"),
    *("same_record", "same_answer", "known_positive", "margin"),
)
"""What each rank sums over its own query rows."""


@dataclass(frozen=True)
class Keys:
    """int64 hashes by which a passage is known to be no negative of a query."""

    record_Q: Tensor | None  # None: the rule is off
    record_P: Tensor
    known_QK: Tensor  # column 0: the query's own answer; then its other known positives
    answer_P: Tensor


@dataclass(frozen=True)
class Strips:
    """One rank's share of the score matrix: its queries (rows) against the passages of every rank (columns)."""

    own_Q: Tensor  # column of each query's positive
    columns: Tensor  # columns that are positives, of all ranks: the passages of the passage-to-query loss
    queries: int  # over all ranks
    temperature: float
    margin: float | None
    two_way: bool
    tile: int
    keys: Keys | None
    ranks: Ranks
    differentiable: bool
    sums: dict[str, Tensor | float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))

    def cut(self, rows: int, columns: int) -> list[slice]:
        """Row ranges of the strips."""
        height = max(MIN_ROWS, self.tile * self.tile // max(1, columns))
        return [slice(start, min(rows, start + height)) for start in range(0, rows, height)]

    def add(self, name: str, value: Tensor | float) -> None:
        """Add to a running sum; on the device, without waiting for it."""
        self.sums[name] = self.sums[name] + value


class StripLoss(torch.autograd.Function):
    """(query_QD, passage_PD, strips) -> (loss, sums): the global mean, and the global sums in the order of `SUMS`.

    The gradient is that of `world x loss` with respect to this rank's queries, and this rank's *share* of it with
    respect to all passages; `gather_rows` adds the shares up. Backward works once: it hands its buffers over.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, passage: Tensor, strips: Strips) -> tuple[Tensor, Tensor]:
        """Loss, statistics, and where wanted the gradient, held for `backward`."""
        unit_PD = normalize(passage, dim=1)
        work = _Work(query, unit_PD, strips)
        (_two_way if strips.two_way else _one_way)(work)
        if strips.differentiable:
            _through_norm(work.d_passage, unit_PD, passage)
            ctx.grads = (work.d_query, work.d_passage)  # type: ignore[attr-defined]
            ctx.world = strips.ranks.world  # type: ignore[attr-defined]
        values = [torch.as_tensor(strips.sums[name], dtype=torch.float64, device=query.device) for name in SUMS]
        sums = strips.ranks.reduce(torch.stack(values))
        loss = sums[0] / strips.queries
        if strips.two_way:
            loss = (loss + sums[1] / strips.queries) / 2
        ctx.mark_non_differentiable(sums)
        return loss.to(query.dtype), sums

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Hand over the held gradient, times world."""
        scale = grads[0] * ctx.world  # type: ignore[attr-defined]
        d_query, d_passage = ctx.grads  # type: ignore[attr-defined]
        del ctx.grads  # type: ignore[attr-defined]
        return d_query.mul_(scale), d_passage.mul_(scale), None


class _Work:
    """Buffers of one evaluation."""

    def __init__(self, query: Tensor, unit_PD: Tensor, strips: Strips) -> None:
        self.query, self.unit_PD, self.strips = query, unit_PD, strips
        self.slices = strips.cut(len(query), len(unit_PD))
        self.weight = 1.0 / strips.queries / (2 if strips.two_way else 1)
        if strips.differentiable:
            self.d_query = torch.empty_like(query)
            self.d_passage = torch.zeros_like(unit_PD)

    def scores(self, rows: slice, count: bool = True) -> tuple[Tensor, Tensor]:
        """Scores over temperature of one strip.

        Of the positives [R], and of all passages [R, P] with -inf at the positives and at what is masked. `count`: add
        to the statistics.
        """
        strips = self.strips
        unit = normalize(self.query[rows], dim=1)
        scores = (unit / strips.temperature) @ self.unit_PD.T
        at = (torch.arange(len(scores), device=scores.device), strips.own_Q[rows])
        positive = scores[at]
        masked = None
        hidden: Tensor | int = 0
        for name, found in _false_negatives(strips, rows, scores, positive):
            masked = found if masked is None else masked.logical_or_(found)
            masked[at] = False
            if count:
                before, hidden = hidden, masked.count_nonzero()
                strips.add(name, hidden - before)
        if count:
            if masked is not None:
                scores.masked_fill_(masked, 0.0)
            strips.add("positive", positive.sum() * strips.temperature)
            strips.add("negative", (scores.sum() - positive.sum()) * strips.temperature)
            strips.add("negatives", len(scores) * (len(self.unit_PD) - 1) - hidden)
        if masked is not None:
            scores.masked_fill_(masked, -torch.inf)
        scores[at] = -torch.inf
        return positive, scores

    def pull_back(self, d_scores: Tensor, d_positive: Tensor, rows: slice) -> None:
        """From the gradient of one strip's scores (over temperature) to that of its queries and of all passages."""
        d_scores[torch.arange(len(d_scores), device=d_scores.device), self.strips.own_Q[rows]] = d_positive
        query = self.query[rows]
        unit = normalize(query, dim=1)
        d_unit = d_scores @ self.unit_PD
        self.d_query[rows] = d_unit.div_(self.strips.temperature)
        _through_norm(self.d_query[rows], unit, query)
        self.d_passage.addmm_(d_scores.T, unit, alpha=1 / self.strips.temperature)


def _false_negatives(strips: Strips, rows: slice, scores: Tensor, positive: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(reason, [R, P] mask) for each rule in force; the positives themselves are not spared here."""
    keys = strips.keys
    if keys is not None:
        if keys.record_Q is not None:
            yield "same_record", keys.record_Q[rows, None] == keys.record_P
        for k in range(keys.known_QK.shape[1]):
            yield "known_positive" if k else "same_answer", keys.known_QK[rows, k, None] == keys.answer_P
    if strips.margin is not None:
        yield "margin", scores > positive[:, None] + strips.margin / strips.temperature


def _one_way(work: _Work) -> None:
    """Loss of each query over all passages, and the gradient, in one pass.

    With gap = logsumexp(negatives) - positive, the loss is softplus(gap), and the positive's own derivative is
    -sigmoid(gap): nothing cancels where a query is nearly solved, as `probability - 1` does.
    """
    strips = work.strips
    for rows in work.slices:
        positive, scores = work.scores(rows)
        highest = scores.amax(1)
        strips.add("correct", (positive > highest).sum())
        strips.add("alone", highest.isneginf().sum())
        highest.clamp_(min=_LOWEST)
        gap = scores.sub_(highest[:, None]).exp_().sum(1).log_() + highest - positive
        loss = softplus(gap)
        strips.add("row_loss", loss.sum(dtype=torch.float64))
        if strips.differentiable:
            d_scores = scores.mul_(((highest - positive - loss).exp_() * work.weight)[:, None])
            work.pull_back(d_scores, -gap.sigmoid_() * work.weight, rows)


def _two_way(work: _Work) -> None:
    """Both directions: one pass for the normalisers of rows and columns, a second for the gradient."""
    strips, columns = work.strips, work.strips.columns
    row_gap, row_lse, own = (work.query.new_empty(len(work.query)) for _ in range(3))
    highest_P = work.query.new_full((len(work.unit_PD),), _LOWEST)
    sum_P, positive_P = torch.zeros_like(highest_P), torch.zeros_like(highest_P)
    kept = None
    for rows in work.slices:
        positive, scores = work.scores(rows)
        highest = scores.amax(1)
        strips.add("correct", (positive > highest).sum())
        strips.add("alone", highest.isneginf().sum())
        highest.clamp_(min=_LOWEST)
        own[rows], row_gap[rows] = positive, (scores - highest[:, None]).exp_().sum(1).log_() + highest - positive
        higher_P = torch.maximum(highest_P, scores.amax(0))
        sum_P.mul_((highest_P - higher_P).exp_()).add_((scores - higher_P).exp_().sum(0))
        highest_P = higher_P
        kept = scores if len(work.slices) == 1 else None
    loss = softplus(row_gap)
    row_lse = own + loss
    strips.add("row_loss", loss.sum(dtype=torch.float64))
    positive_P[strips.own_Q] = own
    positive_P = strips.ranks.reduce(positive_P)
    gap_P = _combine(highest_P, sum_P, strips.ranks) - positive_P
    loss = softplus(gap_P[columns])
    strips.add("column_loss", loss.sum(dtype=torch.float64) / strips.ranks.world)
    lse_P = torch.full_like(gap_P, torch.inf)  # a hard negative asks for no query: its column weighs nothing
    lse_P[columns] = positive_P[columns] + loss
    if not strips.differentiable:
        return
    for rows in work.slices:
        scores = work.scores(rows, count=False)[1] if kept is None else kept
        d_scores = (scores - lse_P).exp_()
        d_scores.add_(scores.sub_(row_lse[rows, None]).exp_()).mul_(work.weight)
        both = row_gap[rows].sigmoid() + gap_P[strips.own_Q[rows]].sigmoid()
        work.pull_back(d_scores, -both * work.weight, rows)


def _combine(highest_P: Tensor, sum_P: Tensor, ranks: Ranks) -> Tensor:
    """Log-sum-exp of each column over the rows of every rank, from each rank's maximum and sum."""
    highest = ranks.reduce(highest_P.clone(), dist.ReduceOp.MAX)
    total = ranks.reduce(sum_P * (highest_P - highest).exp(), dist.ReduceOp.SUM)
    return highest + total.log()


def _through_norm(grad: Tensor, unit: Tensor, rows: Tensor, chunk: int = 4096) -> None:
    """Turn the gradient of `unit = rows / |rows|` into that of `rows`, in place: (g - (g.u) u) / |rows|."""
    for start in range(0, len(grad), chunk):
        g, u = grad[start : start + chunk], unit[start : start + chunk]
        g.sub_(u * (g * u).sum(1, keepdim=True))
        g.div_(torch.linalg.vector_norm(rows[start : start + chunk], dim=1, keepdim=True))
