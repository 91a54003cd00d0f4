"""From the embeddings of a rank's packed micro-batches to the contrastive loss of the step (paper section 3.3).

Micro-batches are packed for speed, so a query, its passage and its hard negatives may lie anywhere in them; here they
find each other again by their side and pair index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lbr_dist.config import Contrastive
from lbr_dist.data.assemble import LocalBatch
from lbr_dist.data.plan.base import SIDES, Side
from lbr_dist.objectives.infonce import NO_KEY, info_nce


def contrastive_loss(
    embeddings: Sequence[Tensor],
    batches: Sequence[LocalBatch],
    settings: Contrastive,
    temperature: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """InfoNCE of the global batch from this rank's texts; see `info_nce` for what it returns and raises.

    Args:
        embeddings: [S, D] of each micro-batch, not normalised; with `settings.learn_temperature` [S, D + 1], the last
            column being the model's `temperature` parameter (task `embed_with_temperature`).
        batches: the micro-batches, on the embeddings' device; dummy ones take part with a gradient of zero.
        settings: the recipe's section.
        temperature: of this step; default: the recipe's.

    Returns:
        See `info_nce`; the figures have `temperature` where it can change.
    """
    rows_SD = torch.cat(list(embeddings))
    tau: float | Tensor = settings.temperature if temperature is None else temperature
    if settings.learn_temperature is not None:
        tau = learned_temperature(rows_SD[0, -1], settings)
        rows_SD = rows_SD[:, :-1]
    side_S = torch.cat([batch.side_S for batch in batches])
    pair_S = torch.cat([batch.pair_S for batch in batches])
    query_Q, passage_Q, negative_N = (_of_side(side, side_S, pair_S) for side in ("query", "passage", "negative"))
    keys: dict[str, Tensor] = {}
    if settings.mask_same_answer:
        answer_S = torch.cat([batch.answer_hash_S for batch in batches])
        question_S = torch.cat([batch.question_hash_S for batch in batches])
        keys["question_Q"], keys["answer_Q"] = question_S[query_Q], answer_S[passage_Q]
        keys["negative_answer_N"] = answer_S[negative_N]
        keys["known_QK"] = _known(torch.cat([batch.known_M2 for batch in batches]), len(query_Q))
    ids = [name for batch in batches for name in ([""] if batch.is_dummy else batch.ids)]
    loss, figures = info_nce(
        rows_SD[query_Q],
        rows_SD[passage_Q],
        negatives_ND=rows_SD[negative_N],
        negative_owner_N=pair_S[negative_N],
        temperature=tau,
        margin=settings.margin,
        two_way=settings.two_way,
        query_query=settings.query_query,
        passage_passage=settings.passage_passage,
        dims=settings.matryoshka.pairs if settings.matryoshka else None,
        tile=settings.tile,
        names=[ids[row] for row in query_Q.tolist()],
        **keys,
    )
    if temperature is not None or settings.learn_temperature is not None:
        figures["temperature"] = float(tau.detach()) if isinstance(tau, Tensor) else tau
    return loss, figures


def learned_temperature(offset: Tensor, settings: Contrastive) -> Tensor:
    """tau = `temperature` * exp(offset), kept between the bounds of `learn_temperature`.

    The parameter is the offset and not tau, so that it stays near 0, where bfloat16 is finest.
    """
    learned = settings.learn_temperature
    assert learned is not None
    low, high = (math.log(bound / settings.temperature) for bound in (learned.lowest, learned.highest))
    return settings.temperature * _Bounded.apply(offset, low, high).exp()


class _Bounded(torch.autograd.Function):
    """Clamp that passes the gradient on, unless its descent would lead further out: so the parameter can come back."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor, low: float, high: float) -> Tensor:
        ctx.at_low, ctx.at_high = value <= low, value >= high  # type: ignore[attr-defined]
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        out = (ctx.at_low & (grad > 0)) | (ctx.at_high & (grad < 0))  # type: ignore[attr-defined]
        return grad.masked_fill(out, 0.0), None, None


def _known(known_M2: Tensor, queries: int) -> Tensor:
    """(pair, hash) rows as one padded row of hashes per pair [Q, K]."""
    known_M2 = known_M2[torch.argsort(known_M2[:, 0], stable=True)]
    pair_M, count_Q = known_M2[:, 0], torch.bincount(known_M2[:, 0], minlength=queries)
    place_M = torch.arange(len(pair_M), device=pair_M.device) - (count_Q.cumsum(0) - count_Q)[pair_M]
    width = int(count_Q.max()) if queries else 0
    known_QK = torch.full((queries, width), NO_KEY, device=known_M2.device)
    known_QK[pair_M, place_M] = known_M2[:, 1]
    return known_QK


def _of_side(side: Side, side_S: Tensor, pair_S: Tensor) -> Tensor:
    """Rows of one side, ordered by pair."""
    rows = (side_S == SIDES[side]).nonzero()[:, 0]
    return rows[torch.argsort(pair_S[rows], stable=True)]
