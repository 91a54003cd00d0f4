"""InfoNCE's options (extra terms, nested dimensions, learned temperature) against definitions on whole matrices."""

from __future__ import annotations

import math

import pytest
import torch
from test_infonce import batch, gradients, relative
from torch.nn.functional import normalize

from lbr_dist.objectives.infonce import DegenerateEmbeddingError, info_nce


def oracle(query, positive, negatives, *, temperature, query_query, passage_passage, two_way, hidden=None, margin=None):
    """The definition. hidden: [Q, P] bool, pairs of a query and a passage that are no negatives."""
    size = len(query)
    unit_q, unit_p = normalize(query, dim=1), normalize(torch.cat([positive, negatives]), dim=1)
    hidden = torch.zeros(size, len(unit_p), dtype=torch.bool) if hidden is None else hidden
    own = torch.eye(size, len(unit_p), dtype=torch.bool)
    scores = unit_q @ unit_p.T
    limit = torch.inf if margin is None else scores.diagonal()[:, None] + margin

    def logits(values, mask):
        return (values / temperature).masked_fill(mask | (values > limit), -torch.inf)

    target = scores.diagonal() / temperature
    negative = logits(scores, hidden | own)
    extra = [torch.full((size, 1), -torch.inf, dtype=scores.dtype)]
    if query_query:
        extra.append(logits(unit_q @ unit_q.T, (hidden | own)[:, :size]))
    if passage_passage:
        extra.append(logits(unit_p[:size] @ unit_p.T, hidden | own))
    rows = torch.cat([target[:, None], negative, *extra], dim=1)
    loss = (rows.logsumexp(1) - target).mean()
    if two_way:
        columns = torch.cat([target[:, None], negative[:, :size].T, *extra], dim=1)
        loss = (loss + (columns.logsumexp(1) - target).mean()) / 2
    return loss


@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize("terms", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("tile", [16, 4096])
@pytest.mark.parametrize("masked", [False, True])
def test_extra_terms_equal_the_definition(two_way, terms, tile, masked):
    query, positive, negative = batch(50, 7)
    settings = {"temperature": 0.1, "query_query": terms[0], "passage_passage": terms[1], "two_way": two_way}
    keys, hidden = {}, None
    if masked:
        settings["margin"] = 0.1
        answer = torch.arange(50)
        answer[[5, 9]] = answer[[3, 8]]
        hidden = torch.zeros(50, 57, dtype=torch.bool)
        for i, j in [(3, 5), (5, 3), (8, 9), (9, 8), (7, 54)]:
            hidden[i, j] = True
        keys = {"answer_Q": answer, "negative_answer_N": torch.tensor([60, 61, 62, 63, 7, 65, 66])}
    wanted = oracle(query, positive, negative, hidden=hidden, **settings)
    found, stats = info_nce(query, positive, negatives_ND=negative, tile=tile, **keys, **settings)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    tensors = (query, positive, negative)
    assert relative(gradients(found, *tensors), gradients(wanted, *tensors)) < 1e-12
    columns = 56 + 49 * terms[0] + 56 * terms[1]
    masked_pairs = stats["masked_share"] * 50 * columns
    assert stats["effective_negatives"] * 50 == pytest.approx(50 * columns - masked_pairs)
    assert (stats["masked_same_answer"] * 50 * columns == pytest.approx(5 + 4 * terms[0] + 5 * terms[1])) == masked


def test_gradient_norms_are_those_at_the_rows():
    """One term alone, one way: the gradient at the queries is its own and nothing else's."""
    query, positive, negative = batch(20, 3)
    loss, stats = info_nce(query, positive, negatives_ND=negative)
    assert stats["gradient_norm_passages"] == pytest.approx(torch.autograd.grad(loss, query)[0].norm().item())


def test_gradient_norms_of_all_terms_are_those_at_the_rows():
    """Rows and columns as tensors of their own: embeddings are not of unit length, and each term's norm follows."""
    query, positive, negative = (4 * part.detach() for part in batch(20, 3))
    rows = {"passages": query.clone(), "query_query": query.clone(), "passage_passage": positive.clone()}
    columns = {"passages": torch.cat([positive, negative]), "query_query": query}
    columns["passage_passage"] = columns["passages"]
    scores = [normalize(rows[term].requires_grad_(), dim=1) @ normalize(columns[term], dim=1).T / 0.1 for term in rows]
    others = [part.masked_fill(torch.eye(*part.shape, dtype=torch.bool), -torch.inf) for part in scores[1:]]
    loss = torch.nn.functional.cross_entropy(torch.cat([scores[0], *others], dim=1), torch.arange(20))
    wanted = torch.autograd.grad(loss, list(rows.values()))
    tensors = [part.requires_grad_() for part in (query, positive, negative)]
    terms = {"query_query": True, "passage_passage": True}
    _, stats = info_nce(tensors[0], tensors[1], negatives_ND=tensors[2], temperature=0.1, **terms)
    for term, gradient in zip(rows, wanted, strict=True):
        assert stats[f"gradient_norm_{term}"] == pytest.approx(gradient.norm().item()), term


@pytest.mark.parametrize("two_way", [False, True])
def test_nested_dimensions_are_the_weighted_mean_of_truncated_losses(two_way):
    query, positive, negative = batch(40, 5)
    tensors, settings = (query, positive, negative), {"two_way": two_way, "temperature": 0.1}
    settings |= {"query_query": True, "margin": 0.1}
    dims = [(24, 2.0), (8, 1.0), (4, 0.5)]
    found, stats = info_nce(query, positive, negatives_ND=negative, dims=dims, **settings)
    parts = {
        dim: info_nce(query[:, :dim], positive[:, :dim], negatives_ND=negative[:, :dim], **settings) for dim, _ in dims
    }
    wanted = sum(weight * parts[dim][0] for dim, weight in dims) / 3.5
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert relative(gradients(found, *tensors), gradients(wanted, *tensors)) < 1e-12
    assert stats["accuracy"] == stats["accuracy_24"] == parts[24][1]["accuracy"]
    assert stats["loss_8"] == pytest.approx(parts[8][0].item())
    norms = [parts[4][1][f"gradient_norm_{term}"] for term in ("passages", "query_query")]
    assert stats["gradient_norm_4"] == pytest.approx(math.hypot(*norms) * 0.5 / 3.5)
    for dims in ([(25, 1.0)], [(8, 0.0)]):
        with pytest.raises(ValueError, match="dims"):
            info_nce(query, positive, dims=dims)


def test_an_embedding_that_is_zero_in_its_first_dimensions_only_is_named():
    query, positive, _ = (tensor.detach() for tensor in batch(5, 0))
    query[3, :4] = 0
    info_nce(query, positive)
    with pytest.raises(DegenerateEmbeddingError, match="query of sample 3"):
        info_nce(query, positive, dims=[(24, 1.0), (4, 1.0)])


@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize("tile", [16, 4096])
def test_gradient_of_the_temperature(two_way, tile):
    query, positive, negative = batch(50, 7)
    settings = {"query_query": True, "passage_passage": True, "two_way": two_way}
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    wanted = oracle(query, positive, negative, temperature=temperature, **settings)
    found, _ = info_nce(query, positive, negatives_ND=negative, temperature=temperature, tile=tile, **settings)
    assert torch.autograd.grad(found, temperature)[0].item() == pytest.approx(
        torch.autograd.grad(wanted, temperature)[0].item(), rel=1e-12
    )
