"""From the embeddings of a rank's packed micro-batches to the contrastive loss of the step (paper section 3.3).

Micro-batches are packed for speed, so a query, its passage and its hard negatives may lie anywhere in them; here they
find each other again by their side and pair index.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lbr_dist.config import Contrastive
from lbr_dist.data.assemble import SIDES, LocalBatch
from lbr_dist.objectives.infonce import NO_KEY, info_nce


def contrastive_loss(
    embeddings: Sequence[Tensor],
    batches: Sequence[LocalBatch],
    settings: Contrastive,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """InfoNCE of the global batch from this rank's texts; see `info_nce` for what it returns and raises.

    Args:
        embeddings: [S, D] of each micro-batch, not normalised.
        batches: the micro-batches, on the embeddings' device; dummy ones take part with a gradient of zero.
        settings: the recipe's section.
        group: the ranks that share the batch.
    """
    rows_SD = torch.cat(list(embeddings))
    side_S = torch.cat([batch.side_S for batch in batches])
    pair_S = torch.cat([batch.pair_S for batch in batches])
    query_Q, passage_Q, negative_N = (_of_side(side, side_S, pair_S) for side in ("query", "passage", "negative"))
    keys: dict[str, Tensor] = {}
    if settings.mask_same_answer:
        answer_S = torch.cat([batch.answer_hash_S for batch in batches])
        record_S = torch.cat([batch.id_hash_S for batch in batches])
        keys["record_Q"], keys["answer_Q"] = record_S[query_Q], answer_S[passage_Q]
        keys["negative_answer_N"] = answer_S[negative_N]
        keys["known_QK"] = _known(torch.cat([batch.known_M2 for batch in batches]), len(query_Q))
    ids = [name for batch in batches for name in ([""] if batch.is_dummy else batch.ids)]
    return info_nce(
        rows_SD[query_Q],
        rows_SD[passage_Q],
        negatives_ND=rows_SD[negative_N],
        negative_owner_N=pair_S[negative_N],
        temperature=settings.temperature,
        margin=settings.margin,
        two_way=settings.two_way,
        tile=settings.tile,
        names=[ids[row] for row in query_Q.tolist()],
        group=group,
        **keys,
    )


def _known(known_M2: Tensor, queries: int) -> Tensor:
    """(pair, hash) rows as one padded row of hashes per pair [Q, K]."""
    known_M2 = known_M2[torch.argsort(known_M2[:, 0], stable=True)]
    pair_M, count_Q = known_M2[:, 0], torch.bincount(known_M2[:, 0], minlength=queries)
    place_M = torch.arange(len(pair_M), device=pair_M.device) - (count_Q.cumsum(0) - count_Q)[pair_M]
    width = int(count_Q.max()) if queries else 0
    known_QK = torch.full((queries, width), NO_KEY, device=known_M2.device)
    known_QK[pair_M, place_M] = known_M2[:, 1]
    return known_QK


def _of_side(side: str, side_S: Tensor, pair_S: Tensor) -> Tensor:
    """Rows of one side, ordered by pair."""
    rows = (side_S == SIDES[side]).nonzero()[:, 0]
    return rows[torch.argsort(pair_S[rows], stable=True)]
