"""The arithmetic of InfoNCE, strip by strip: scores never exist whole.

A strip is a block of this rank's pairs (rows) against *all* columns of the global batch, as tall as `tile * tile`
elements allow. Because a strip holds whole rows, its softmax is final at once, and the gradient is taken in the same
pass: three matrix products, as many as the untiled loss, where square tiles would need a fourth to compute the scores
again. Only the two-way loss with more than one strip pays that price, since a column's normaliser is known after the
last strip of the last rank (an online log-sum-exp). The trade-off: gradients are computed in the forward pass and held
until the backward (2 x batch x width numbers).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import normalize, softplus

from lbr_dist.objectives.gather import Ranks
from lbr_dist.objectives.negatives import Block, Keys, Term, make_blocks, through_norm

MIN_ROWS = 16
_LOWEST = -1e30  # a finite stand-in for minus infinity: exp(-inf - _LOWEST) is 0 where exp(-inf + inf) is not a number

RULES = ("same_question", "same_answer", "known_positive", "margin")
TERMS: tuple[Term, ...] = get_args(Term)
SUMS = (
    *(
        "row_loss",
        "column_loss",
        "correct",
        "positive",
        "negative",
        "scored",
        "negatives",
        "alone",
        "d_log_temperature",
    ),
    *RULES,
    *(f"squares_{term}" for term in TERMS),
)
"""What each rank sums over its own rows."""


@dataclass(frozen=True)
class Strips:
    """One rank's share of the scores: its pairs (rows) against the passages, and queries, of every rank (columns)."""

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
    passage_passage: bool = False
    sums: dict[str, Tensor | float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))

    def cut(self, rows: int, columns: int) -> list[slice]:
        """Row ranges of the strips."""
        height = max(MIN_ROWS, self.tile * self.tile // max(1, columns))
        return [slice(start, min(rows, start + height)) for start in range(0, rows, height)]

    def add(self, name: str, value: Tensor | float) -> None:
        """Add to a running sum; on the device, without waiting for it."""
        self.sums[name] = self.sums[name] + value


class StripLoss(torch.autograd.Function):
    """(query_QD, passage_PD, queries_AD, temperature, strips) -> (loss, sums).

    `queries_AD` (all ranks' queries) and `temperature` may be None: no query-query term, nothing learned. The loss is
    the global mean, the sums are global, in the order of `SUMS`. The gradient is that of `world x loss` with respect to
    this rank's queries, and this rank's *share* of it with respect to all passages and all queries; `gather_rows` adds
    the shares up. For the temperature it is the whole gradient of the loss, the same on every rank, so that the ranks'
    average is right too. Backward works once: it hands its buffers over.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        query: Tensor,
        passage: Tensor,
        queries: Tensor | None,
        temperature: Tensor | None,
        strips: Strips,
    ) -> tuple[Tensor, Tensor]:
        """Loss, statistics, and where wanted the gradient, held for `backward`."""
        unit_PD = normalize(passage, dim=1)
        unit_AD = None if queries is None else normalize(queries, dim=1)
        work = _Work(query, passage, unit_PD, unit_AD, strips)
        (_two_way if strips.two_way else _one_way)(work)
        if strips.differentiable:
            through_norm(work.d_passage, unit_PD, passage)
            if queries is not None and unit_AD is not None and work.d_queries is not None:
                through_norm(work.d_queries, unit_AD, queries)
            ctx.grads = (work.d_query, work.d_passage, work.d_queries)  # type: ignore[attr-defined]
            ctx.world = strips.ranks.world  # type: ignore[attr-defined]
        values = [torch.as_tensor(strips.sums[name], dtype=torch.float64, device=query.device) for name in SUMS]
        sums = strips.ranks.reduce(torch.stack(values))
        ctx.d_temperature = None  # type: ignore[attr-defined]
        if temperature is not None:
            found = sums[SUMS.index("d_log_temperature")] / strips.temperature
            ctx.d_temperature = found.to(temperature.dtype)  # type: ignore[attr-defined]
        loss = sums[0] / strips.queries
        if strips.two_way:
            loss = (loss + sums[1] / strips.queries) / 2
        ctx.mark_non_differentiable(sums)
        return loss.to(query.dtype), sums

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Hand over the held gradient, times world."""
        scale = grads[0] * ctx.world  # type: ignore[attr-defined]
        held = ctx.grads  # type: ignore[attr-defined]
        del ctx.grads  # type: ignore[attr-defined]
        d_temperature = ctx.d_temperature  # type: ignore[attr-defined]
        return (
            *(None if grad is None else grad.mul_(scale) for grad in held),
            None if d_temperature is None else grads[0] * d_temperature,
            None,
        )


class _Work:
    """Buffers of one evaluation."""

    def __init__(self, query: Tensor, passage: Tensor, unit_PD: Tensor, unit_AD: Tensor | None, strips: Strips) -> None:
        self.query, self.strips = query, strips
        self.blocks = make_blocks(
            query, passage, unit_PD, unit_AD, own_Q=strips.own_Q, columns=strips.columns, keys=strips.keys,
            passage_passage=strips.passage_passage,
        )  # fmt: skip
        self.passages, self.width = len(unit_PD), sum(len(block.right_CD) for block in self.blocks)
        self.slices = strips.cut(len(query), self.width)
        self.weight = 1.0 / strips.queries / (2 if strips.two_way else 1)
        self.d_queries: Tensor | None = None
        if strips.differentiable:
            self.d_query = torch.zeros_like(query) if unit_AD is not None else torch.empty_like(query)
            self.d_passage = torch.zeros_like(unit_PD)
            self.d_queries = None if unit_AD is None else torch.zeros_like(unit_AD)

    def parts(self, scores_RC: Tensor) -> tuple[Tensor, ...]:
        """Views of the columns of each block."""
        return scores_RC.split([len(block.right_CD) for block in self.blocks], dim=1)

    def scores(self, rows: slice, count: bool = True) -> tuple[Tensor, Tensor]:
        """Scores over temperature of one strip.

        Of the positives [R], and of all columns [R, C] with -inf at the pair's own and at what is masked. `count`: add
        to the statistics.
        """
        strips = self.strips
        scores = self.query.new_empty((rows.stop - rows.start, self.width))
        positive = None
        for block, part in zip(self.blocks, self.parts(scores), strict=True):
            torch.mm(block.left(rows) / strips.temperature, block.right_CD.T, out=part)
            at = (torch.arange(len(part), device=part.device), block.own_Q[rows])
            if positive is None:
                positive = part[at]
                if count:
                    strips.add("positive", positive.sum() * strips.temperature)
            self._mask(block, part, rows, at, positive, count)
            part[at] = -torch.inf
        assert positive is not None
        return positive, scores

    def _mask(
        self, block: Block, part: Tensor, rows: slice, at: tuple[Tensor, Tensor], positive: Tensor, count: bool
    ) -> None:
        """Put -inf where a rule says so, in place; the pair's own columns are left alone."""
        strips = self.strips
        masked: Tensor | None = None
        hidden: Tensor | int = 0
        limit = None if strips.margin is None else positive + strips.margin / strips.temperature
        for name, found in block.false_negatives(rows, part, limit):
            masked = found if masked is None else masked.logical_or_(found)
            masked[at] = False
            if count:
                before, hidden = hidden, masked.count_nonzero()
                strips.add(name, hidden - before)
        if count:
            if masked is not None:
                part.masked_fill_(masked, 0.0)
            left = len(part) * (part.shape[1] - 1) - hidden
            strips.add("negatives", left)
            if block.term == "passages":
                strips.add("scored", left)
                strips.add("negative", (part.sum() - positive.sum()) * strips.temperature)
        if masked is not None:
            part.masked_fill_(masked, -torch.inf)

    def pull_back(self, d_scores: Tensor, d_positive: Tensor, rows: slice) -> None:
        """From the gradient of one strip's scores (over temperature) to that of its rows and of all columns."""
        strips, at = self.strips, torch.arange(len(d_scores), device=d_scores.device)
        d_scores[at, strips.own_Q[rows]] = d_positive
        for block, d_part in zip(self.blocks, self.parts(d_scores), strict=True):
            left = block.left(rows)
            d_left = (d_part @ block.right_CD).div_(strips.temperature)
            strips.add("d_log_temperature", -(d_left * left).sum(dtype=torch.float64))
            if block.term == "passage_passage":  # its rows are columns too, and pass the norm with them
                own = slice(int(strips.own_Q[rows.start]), int(strips.own_Q[rows.stop - 1]) + 1)
                self.d_passage[own] += d_left
            d_left.sub_(left * (d_left * left).sum(1, keepdim=True)).div_(block.norm(rows))
            strips.add(f"squares_{block.term}", d_left.square().sum(dtype=torch.float64))
            if block.term == "passages" and self.d_queries is None:
                self.d_query[rows] = d_left
            elif block.term != "passage_passage":
                self.d_query[rows] += d_left
            into = self.d_queries if block.term == "query_query" else self.d_passage
            assert into is not None
            into.addmm_(d_part.T, left, alpha=1 / strips.temperature)


def _one_way(work: _Work) -> None:
    """Loss of each query over all columns, and the gradient, in one pass.

    With gap = logsumexp(negatives) - positive, the loss is softplus(gap), and the positive's own derivative is
    -sigmoid(gap): nothing cancels where a query is nearly solved, as `probability - 1` does.
    """
    strips = work.strips
    for rows in work.slices:
        positive, scores = work.scores(rows)
        highest = _highest(work, positive, scores)
        gap = scores.sub_(highest[:, None]).exp_().sum(1).log_() + highest - positive
        loss = softplus(gap)
        strips.add("row_loss", loss.sum(dtype=torch.float64))
        if strips.differentiable:
            d_scores = scores.mul_(((highest - positive - loss).exp_() * work.weight)[:, None])
            work.pull_back(d_scores, -gap.sigmoid_() * work.weight, rows)


def _highest(work: _Work, positive: Tensor, scores: Tensor) -> Tensor:
    """Highest negative of each row; counts the rows whose positive is above all passages, and those with nothing."""
    highest = [part.amax(1) for part in work.parts(scores)]
    work.strips.add("correct", (positive > highest[0]).sum())
    top = highest[0] if len(highest) == 1 else torch.stack(highest).amax(0)
    work.strips.add("alone", top.isneginf().sum())
    return top.clamp_(min=_LOWEST)


def _two_way(work: _Work) -> None:
    """Both directions: one pass for the normalisers of rows and columns, a second for the gradient.

    The extra terms of a pair are in the normalisers of its row and of its positive's column alike.
    """
    strips, columns = work.strips, work.strips.columns
    row_gap, own = (work.query.new_empty(len(work.query)) for _ in range(2))
    highest_P = work.query.new_full((work.passages,), _LOWEST)
    sum_P, positive_P = torch.zeros_like(highest_P), torch.zeros_like(highest_P)
    kept = None
    for rows in work.slices:
        positive, scores = work.scores(rows)
        highest = _highest(work, positive, scores)
        own[rows], row_gap[rows] = positive, (scores - highest[:, None]).exp_().sum(1).log_() + highest - positive
        passages = scores[:, : work.passages]
        _join(highest_P, sum_P, slice(None), passages.amax(0), passages.T)
        if len(work.blocks) > 1:
            extra = scores[:, work.passages :]
            _join(highest_P, sum_P, strips.own_Q[rows], extra.amax(1), extra)
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
        mirrored = torch.empty_like(scores)
        torch.sub(scores[:, : work.passages], lse_P, out=mirrored[:, : work.passages])
        torch.sub(scores[:, work.passages :], lse_P[strips.own_Q[rows], None], out=mirrored[:, work.passages :])
        d_scores = mirrored.exp_()
        d_scores.add_(scores.sub_(row_lse[rows, None]).exp_()).mul_(work.weight)
        both = row_gap[rows].sigmoid() + gap_P[strips.own_Q[rows]].sigmoid()
        work.pull_back(d_scores, -both * work.weight, rows)


def _join(highest_P: Tensor, sum_P: Tensor, at: slice | Tensor, new: Tensor, scores_PN: Tensor) -> None:
    """Add scores [P', N] to the running log-sum-exp of the columns `at`, in place; `new` are their highest."""
    higher = torch.maximum(highest_P[at], new)
    fresh = (scores_PN - higher[:, None]).exp_().sum(1)
    sum_P[at] = sum_P[at] * (highest_P[at] - higher).exp_() + fresh
    highest_P[at] = higher


def _combine(highest_P: Tensor, sum_P: Tensor, ranks: Ranks) -> Tensor:
    """Log-sum-exp of each column over the rows of every rank, from each rank's maximum and sum."""
    highest = ranks.reduce(highest_P.clone(), dist.ReduceOp.MAX)
    total = ranks.reduce(sum_P * (highest_P - highest).exp(), dist.ReduceOp.SUM)
    return highest + total.log()
