"""Gathered InfoNCE: the parameter gradient, averaged over ranks, is that of one process on the whole batch."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from ranks import run_ranks

from lbr_dist.objectives.infonce import DegenerateEmbeddingError, info_nce


class Case(NamedTuple):
    """How a global batch lies on the ranks: pairs of each rank, hard negatives of each rank, and loss settings."""

    pairs: tuple[int, ...]
    negatives: tuple[int, ...]
    two_way: bool = False
    margin: float | None = None
    keys: bool = False
    tile: int = 4096
    extra: bool = False
    """With both extra terms and nested dimensions."""


CASES = {
    2: [
        Case((6, 6), (0, 0)),
        Case((6, 6), (4, 4), two_way=True),
        Case((9, 3), (0, 5), two_way=True, keys=True, margin=0.1),
        Case((20, 30), (40, 3), two_way=True, tile=4),
        Case((7, 0), (3, 0), two_way=True, keys=True),
        Case((7, 0), (3, 0), two_way=True, keys=True, extra=True),
    ],
    3: [
        Case((5, 4, 4), (3, 0, 8), keys=True, margin=0.2),
        Case((30, 20, 31), (0, 2, 0), two_way=True, tile=4),
        Case((30, 20, 31), (0, 2, 0), two_way=True, tile=4, extra=True),
    ],
    4: [
        Case((4, 3, 4, 3), (1, 0, 2, 7), two_way=True, keys=True),
        Case((8, 8, 0, 8), (0, 0, 0, 0), margin=0.3),
        Case((4, 3, 4, 3), (1, 0, 2, 7), keys=True, margin=0.2, extra=True),
    ],
}


def data(case, step=0):
    """Features of the global batch, and its keys."""
    generator = torch.Generator().manual_seed(step)
    draw = lambda rows: torch.randn(rows, 16, generator=generator)  # noqa: E731
    pairs, negatives = sum(case.pairs), sum(case.negatives)
    query = draw(pairs)
    keys = torch.randint(0, pairs, (2, pairs), generator=generator)
    negative_keys = torch.randint(0, pairs, (negatives,), generator=generator)
    known = torch.randint(0, pairs, (pairs, 2), generator=generator)
    return query, query + draw(pairs), draw(negatives), keys, negative_keys, known


def loss_of(case, weight, rank=None, step=0):
    """Loss of one rank's part of the batch, or (rank None) of the whole batch in one process."""
    query, positive, negative, (question, answer), negative_answer, known = data(case, step)
    pairs = slice(None) if rank is None else slice(sum(case.pairs[:rank]), sum(case.pairs[: rank + 1]))
    hard = slice(None) if rank is None else slice(sum(case.negatives[:rank]), sum(case.negatives[: rank + 1]))
    keys = {}
    if case.keys:
        keys = {"question_Q": question[pairs], "answer_Q": answer[pairs], "negative_answer_N": negative_answer[hard]}
        width = 2 if rank is None else rank % 3  # ranks differ in their number of known positives
        keys["known_QK"] = known[pairs, :width]
        if rank is None:
            keys["known_QK"] = known.clone()
            for other, start in enumerate(torch.tensor((0, *case.pairs)).cumsum(0)[:-1].tolist()):
                keys["known_QK"][start : start + case.pairs[other], other % 3 :] = torch.iinfo(torch.int64).min
    return info_nce(
        query[pairs] @ weight,
        positive[pairs] @ weight,
        negatives_ND=negative[hard] @ weight,
        temperature=0.1,
        margin=case.margin,
        two_way=case.two_way,
        tile=case.tile,
        query_query=case.extra,
        passage_passage=case.extra,
        dims=[(8, 2.0), (3, 1.0)] if case.extra else None,
        **keys,
    )


def start():
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(99)).requires_grad_()


def average(gradient, world):
    """What DeepSpeed does to the parameter gradients."""
    torch.distributed.all_reduce(gradient)
    return gradient / world


def on_rank(rank, world):
    results = []
    for case in CASES[world]:
        weight = start()
        loss, stats = loss_of(case, weight, rank)
        loss.backward()
        results.append((average(weight.grad, world), stats))
    weight = start()
    for step in range(20):
        loss, _ = loss_of(CASES[world][1], weight, rank, step)
        loss.backward()
        with torch.no_grad():
            weight -= 0.5 * average(weight.grad, world)
        weight.grad = None
    return results, weight.detach()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_gradient_and_statistics_equal_one_process(world, tmp_path):
    ranks = run_ranks(on_rank, world, tmp_path)
    for number, case in enumerate(CASES[world]):
        weight = start()
        loss, expected = loss_of(case, weight)
        loss.backward()
        for results, _ in ranks:
            gradient, stats = results[number]
            assert (gradient - weight.grad).norm() <= 1e-6 * weight.grad.norm(), case
            assert stats == pytest.approx(expected, rel=1e-5, abs=1e-7), case
    weight = start()
    for step in range(20):
        loss, _ = loss_of(CASES[world][1], weight, None, step)
        weight = (weight - 0.5 * torch.autograd.grad(loss, weight)[0]).detach().requires_grad_()
    for _, found in ranks:
        assert (found - start()).norm() > 0.1  # it went somewhere
        assert (found - weight).norm() <= 1e-5 * weight.norm()


def degenerate(rank, world):
    query = torch.randn(3, 4)
    if rank == 1:
        query[2] = float("nan")
    try:
        info_nce(query, torch.randn(3, 4), names=[f"{rank}:{row}" for row in range(3)])
    except DegenerateEmbeddingError as error:
        return str(error)


def test_a_degenerate_embedding_of_one_rank_is_the_error_of_all(tmp_path):
    messages = run_ranks(degenerate, 2, tmp_path)
    assert messages[0] == messages[1]
    assert "query of sample 1:2 (rank 1)" in messages[0]
