"""From packed micro-batches to the loss: queries, passages and negatives find each other wherever they lie."""

from __future__ import annotations

import pytest
import torch

from lbr_dist.config import Contrastive
from lbr_dist.data.assemble import SIDES, LocalBatch
from lbr_dist.model.layout import Sample, pack
from lbr_dist.objectives.contrastive import contrastive_loss
from lbr_dist.objectives.infonce import DegenerateEmbeddingError, info_nce

TEXTS = [(side, pair) for pair in range(4) for side in ("query", "passage")] + [("negative", 2), ("negative", 0)]
HASHES = torch.tensor([5, 5, 6, 6, 5, 5, 8, 8, 9, 6])  # pairs 0 and 2 have one answer; the last negative answers pair 1


def batch_of(rows):
    packed = pack([Sample([3], 1)] * max(1, len(rows)), bottleneck_vectors=1, hide_x=False)
    if not rows:
        none = torch.tensor([-1])
        return LocalBatch(packed, [], [], none, none, none, none, none)
    pairs = torch.tensor([TEXTS[row][1] for row in rows])
    return LocalBatch(
        packed=packed,
        samples=[None] * len(rows),
        ids=[f"id-{pair}" for pair in pairs.tolist()],
        side_S=torch.tensor([SIDES[TEXTS[row][0]] for row in rows]),
        pair_S=pairs,
        global_pair_S=pairs,
        answer_hash_S=HASHES[rows],
        id_hash_S=pairs,
    )


def embeddings():
    return torch.randn(len(TEXTS), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("masked", [True, False])
def test_any_distribution_over_micro_batches_gives_the_same_loss(masked):
    settings = Contrastive(mask_same_answer=masked, two_way=True, temperature=0.3)
    rows = embeddings()
    micros = [[9, 3, 0], [], [1, 2, 8, 7], [6, 5, 4]]
    leaves = [(rows[micro] if micro else torch.ones(1, 6, dtype=torch.float64)).requires_grad_() for micro in micros]
    loss, stats = contrastive_loss(leaves, [batch_of(micro) for micro in micros], settings)
    keys = {
        "record_Q": torch.arange(4),
        "answer_Q": torch.tensor([5, 6, 5, 8]),
        "negative_answer_N": torch.tensor([6, 9]),
    }
    expected, _ = info_nce(
        rows[0:8:2],
        rows[1:8:2],
        negatives_ND=rows[[9, 8]],
        temperature=0.3,
        two_way=True,
        **(keys if masked else {}),
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (stats["masked_share"] * 4 * 5 == pytest.approx(3)) if masked else stats["masked_share"] == 0
    dummy = torch.autograd.grad(loss, leaves)[1]
    assert torch.equal(dummy, torch.zeros(1, 6, dtype=torch.float64))


def test_an_error_names_the_record():
    rows = embeddings()
    rows[8] = 0  # the first negative belongs to pair 2
    with pytest.raises(DegenerateEmbeddingError, match="hard negative of sample id-2"):
        contrastive_loss([rows], [batch_of(list(range(10)))], Contrastive())
