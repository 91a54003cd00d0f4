"""InfoNCE against a full-matrix oracle written independently, in float64 and float32."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from lbr_dist.objectives.infonce import NO_KEY, DegenerateEmbeddingError, info_nce


def batch(queries, negatives, dim=24, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda rows: torch.randn(rows, dim, generator=generator, dtype=dtype)  # noqa: E731
    query = draw(queries)
    positive = query + draw(queries)  # a batch that is neither solved nor hopeless
    return query.requires_grad_(), positive.requires_grad_(), draw(negatives).requires_grad_()


def oracle(query, positive, negatives, *, temperature, hidden=None, margin=None, two_way=False):
    """The definition, on whole matrices. hidden: [Q, P] bool, pairs that are no negatives."""
    scores = normalize(query, dim=1) @ normalize(torch.cat([positive, negatives]), dim=1).T
    size = len(query)
    hidden = torch.zeros_like(scores, dtype=torch.bool) if hidden is None else hidden.clone()
    if margin is not None:
        hidden |= scores > scores.diagonal()[:, None] + margin
    hidden[torch.arange(size), torch.arange(size)] = False
    logits = scores.masked_fill(hidden, -torch.inf) / temperature
    target = torch.arange(size)
    loss = torch.nn.functional.cross_entropy(logits, target)
    if two_way:
        loss = (loss + torch.nn.functional.cross_entropy(logits[:, :size].T, target)) / 2
    return loss, scores.detach(), hidden


def gradients(loss, *tensors):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, tensors)])


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize("margin", [None, 0.05])
@pytest.mark.parametrize("tile", [4, 16, 4096])  # 16 rows a strip at least: 5 strips, 5 strips, whole
@pytest.mark.parametrize("negatives", [0, 7])
def test_tiled_loss_and_gradient_equal_the_full_matrix(two_way, margin, tile, negatives):
    query, positive, negative = batch(70, negatives)
    expected, _, _ = oracle(query, positive, negative, temperature=0.1, margin=margin, two_way=two_way)
    found, stats = info_nce(
        query, positive, negatives_ND=negative, temperature=0.1, margin=margin, two_way=two_way, tile=tile
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert stats["loss"] == found.item()
    wanted = gradients(expected, query, positive, negative)
    assert relative(gradients(found, query, positive, negative), wanted) < 1e-12


@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 0.1])
def test_float32_equals_the_full_matrix_to_rounding(two_way, temperature):
    single = batch(300, 40, dim=64, dtype=torch.float32)
    exact = [t.detach().double().requires_grad_() for t in single]
    settings = {"temperature": temperature, "two_way": two_way}
    reference, _, _ = oracle(*exact, **settings)
    whole, _, _ = oracle(*single, **settings)
    tiled, _ = info_nce(*single[:2], negatives_ND=single[2], tile=64, **settings)
    untiled, _ = info_nce(*single[:2], negatives_ND=single[2], **settings)
    found, full, target = gradients(tiled, *single), gradients(whole, *single), gradients(reference, *exact)
    assert relative(found, gradients(untiled, *single)) < 1e-6
    error = relative(found.double(), target)
    assert error < relative(full.double(), target)
    assert tiled.item() == pytest.approx(reference.item(), rel=1e-6)
    if temperature == 0.1:  # at 0.05 float32 scores themselves are good for 2e-6 only
        assert error < 1e-6
        assert relative(found, full) < 1e-6


def test_bfloat16_inputs_are_accumulated_in_float32():
    rounded = [t.detach().bfloat16() for t in batch(200, 30)]
    low = [t.clone().requires_grad_() for t in rounded]
    high = [t.double().requires_grad_() for t in rounded]
    found, _ = info_nce(low[0], low[1], negatives_ND=low[2], tile=32)
    expected, _, _ = oracle(*high, temperature=0.05)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative(gradients(found, *low).double(), gradients(expected, *high)) < 3e-3  # the gradient is bfloat16


def test_false_negatives_are_masked_by_the_first_rule_that_applies():
    query, positive, negative = batch(40, 10)
    question = torch.arange(40)
    question[5] = question[3]  # one question twice
    answer = 100 + torch.arange(40)
    answer[5] = answer[3]
    answer[9] = answer[8]  # two records with one answer
    negative_answer = torch.full((10,), NO_KEY)
    negative_answer[4] = 107  # a mined "negative" that is the answer of query 7
    known = torch.full((40, 2), NO_KEY)
    known[0, 1] = 111  # query 0 also has answer 11
    hidden = torch.zeros(40, 50, dtype=torch.bool)
    for i, j in [(3, 5), (5, 3), (8, 9), (9, 8), (7, 44), (0, 11)]:
        hidden[i, j] = True
    wanted, scores, _ = oracle(query, positive, negative, temperature=0.1, hidden=hidden)
    found, stats = info_nce(
        query,
        positive,
        negatives_ND=negative,
        question_Q=question,
        answer_Q=answer,
        negative_answer_N=negative_answer,
        known_QK=known,
        temperature=0.1,
        tile=8,
    )
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    tensors = (query, positive, negative)
    assert relative(gradients(found, *tensors), gradients(wanted, *tensors)) < 1e-12
    pairs = 40 * 49
    assert stats["masked_same_question"] * pairs == pytest.approx(2)
    assert stats["masked_same_answer"] * pairs == pytest.approx(3)
    assert stats["masked_known_positive"] * pairs == pytest.approx(1)
    assert stats["masked_share"] * pairs == pytest.approx(6)
    assert stats["effective_negatives"] == pytest.approx((pairs - 6) / 40)
    own = torch.eye(40, 50, dtype=torch.bool)
    assert stats["positive_score"] == pytest.approx(scores[own].mean().item())
    assert stats["negative_score"] == pytest.approx(scores[~hidden & ~own].mean().item())
    best = scores.masked_fill(hidden | own, -torch.inf).amax(1)
    assert stats["accuracy"] == pytest.approx((scores[own] > best).double().mean().item())


def test_margin_is_counted_and_spares_the_positive():
    query, positive, negative = batch(30, 5)
    _, scores, hidden = oracle(query, positive, negative, temperature=0.1, margin=-2.5)
    _, stats = info_nce(query, positive, negatives_ND=negative, margin=-2.5)  # so low that every negative is above it
    assert hidden.sum() == 30 * 34
    assert stats["masked_margin"] == 1.0
    assert stats["positive_score"] == pytest.approx(scores.diagonal().mean().item())


@pytest.mark.parametrize("two_way", [False, True])
def test_a_query_with_no_negative_left_adds_zero_and_is_counted(two_way):
    query, positive, _ = batch(6, 0)
    same = torch.zeros(6, dtype=torch.int64)
    loss, stats = info_nce(query, positive, question_Q=same, two_way=two_way)
    assert loss.item() == 0
    assert stats["queries_without_negatives"] == 6
    assert stats["effective_negatives"] == 0
    assert stats["masked_share"] == 1
    assert gradients(loss, query, positive).abs().max() < 1e-15
    alone, _ = info_nce(query[:1], positive[:1], two_way=two_way)
    assert alone.item() == 0


def test_missing_keys_match_nothing():
    query, positive, negative = batch(8, 8)
    absent = torch.full((8,), NO_KEY)
    _, stats = info_nce(
        query,
        positive,
        negatives_ND=negative,
        answer_Q=absent,
        negative_answer_N=absent,
        known_QK=torch.full((8, 3), NO_KEY),
    )
    assert stats["masked_share"] == 0


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_degenerate_embeddings_are_named(value):
    query, positive, negative = (t.detach() for t in batch(5, 4))
    query[2] = value
    positive[0, :] = value
    negative[3] = value
    with pytest.raises(DegenerateEmbeddingError) as error:
        info_nce(
            query,
            positive,
            negatives_ND=negative,
            negative_owner_N=torch.tensor([0, 1, 1, 4]),
            names=["a", "b", "c", "d", "e"],
        )
    message = str(error.value)
    assert "3 embeddings" in message
    assert "query of sample c, positive of sample a, hard negative of sample e" in message
    assert not error.value.every
    with pytest.raises(DegenerateEmbeddingError) as error:
        info_nce(torch.full_like(query, value), torch.full_like(positive, value))
    assert error.value.every


def test_wrong_arguments_are_refused():
    query, positive, _ = batch(4, 0)
    with pytest.raises(ValueError, match="do not pair"):
        info_nce(query, positive[:3])
    with pytest.raises(ValueError, match="temperature"):
        info_nce(query, positive, temperature=0.0)
    with pytest.raises(ValueError, match="no query"):
        info_nce(query[:0], positive[:0])
    with pytest.raises(ValueError, match="answer_Q"):
        info_nce(query, positive, known_QK=torch.zeros(4, 1, dtype=torch.int64))


def test_scores_never_exist_whole():
    """The largest tensor made is a strip or a batch of embeddings, forward and backward."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, torch.Tensor):
                    sizes.append(value.numel())
            return out

    query, positive, negative = batch(1000, 1000, dim=8)
    keys = torch.arange(1000)
    with Watch():
        loss, _ = info_nce(
            query,
            positive,
            negatives_ND=negative,
            question_Q=keys,
            answer_Q=keys,
            margin=0.1,
            two_way=True,
            tile=200,
        )
        loss.backward()
    assert max(sizes) == 200 * 200  # 20 rows of 2,000 scores; the whole matrix has 2,000,000


def test_no_gradient_is_computed_where_none_is_wanted():
    query, positive, _ = batch(10, 0)
    with torch.no_grad():
        loss, _ = info_nce(query, positive)
    assert not loss.requires_grad
