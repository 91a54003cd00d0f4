"""From packed micro-batches to the loss: queries, passages and negatives find each other wherever they lie."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_tokenizer

from lbr_dist.config import Contrastive, Recipe
from lbr_dist.data.assemble import LocalBatch
from lbr_dist.data.loader import Loader
from lbr_dist.data.plan import open_data
from lbr_dist.data.plan.base import SIDES
from lbr_dist.data.record import Record, normalised_hash
from lbr_dist.data.shard_writer import write_set
from lbr_dist.model.layout import Sample, pack
from lbr_dist.model.tokenizer import Tokenization
from lbr_dist.objectives.contrastive import contrastive_loss, learned_temperature
from lbr_dist.objectives.infonce import NO_KEY, DegenerateEmbeddingError, info_nce

TEXTS = [(side, pair) for pair in range(4) for side in ("query", "passage")] + [("negative", 2), ("negative", 0)]
HASHES = torch.tensor([5, 5, 6, 6, 5, 5, 8, 8, 9, 6])  # pairs 0 and 2 have one answer; the last negative answers pair 1


KNOWN = [(3, 77), (3, 5), (1, 78)]  # query 3 is also answered by the passages of pairs 0 and 2


def known_of(rows):
    return torch.tensor(rows, dtype=torch.int64).view(-1, 2)


def batch_of(rows):
    packed = pack([Sample([3], 1)] * max(1, len(rows)), bottleneck_vectors=1, hide_x=False)
    if not rows:
        none = torch.tensor([-1])
        return LocalBatch(packed, [], [], none, none, none, none, known_of([]))
    pairs = torch.tensor([TEXTS[row][1] for row in rows])
    return LocalBatch(
        packed=packed,
        samples=[None] * len(rows),
        ids=[f"id-{pair}" for pair in pairs.tolist()],
        side_S=torch.tensor([SIDES[TEXTS[row][0]] for row in rows]),
        pair_S=pairs,
        answer_hash_S=HASHES[rows],
        question_hash_S=pairs,
        known_M2=known_of([row for row in KNOWN if ("query", row[0]) in [TEXTS[r] for r in rows]]),
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
        "question_Q": torch.arange(4),
        "answer_Q": torch.tensor([5, 6, 5, 8]),
        "negative_answer_N": torch.tensor([6, 9]),
        "known_QK": torch.tensor([[NO_KEY, NO_KEY], [NO_KEY, 78], [NO_KEY, NO_KEY], [5, 77]]),
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
    assert (stats["masked_share"] * 4 * 5 == pytest.approx(5)) if masked else stats["masked_share"] == 0
    dummy = torch.autograd.grad(loss, leaves)[1]
    assert torch.equal(dummy, torch.zeros(1, 6, dtype=torch.float64))


def test_an_error_names_the_record():
    rows = embeddings()
    rows[8] = 0  # the first negative belongs to pair 2
    with pytest.raises(DegenerateEmbeddingError, match="hard negative of sample id-2"):
        contrastive_loss([rows], [batch_of(list(range(10)))], Contrastive())


def load(folder, records, **changes):
    """The recipe of a set of these records, with `changes`, and the loader of its steps."""
    make_tokenizer(folder / "tokenizer")
    tokens = Tokenization.load(str(folder / "tokenizer"))
    write_set(folder / "set", {"cl": records}, tokens, name="set", shard_records=10)
    data = {"sets": [{"path": str(folder / "set")}], "bin_tokens": 32, "max_x_tokens": 30, "workers": 0}
    settings = {
        "stage": "contrastive",
        "output": "unused",
        "model": {"path": str(folder / "tokenizer")},
        "data": data | changes.pop("data", {}),
        "bottleneck": {"tokens": 1},
        "batch": {"global_batch": len(records)},
        "duration": {"steps": 1},
    }
    recipe = Recipe.model_validate(settings | changes)
    return recipe, Loader(*open_data(recipe, tokens), tokens, recipe)


def test_known_positives_come_from_the_records(tmp_path):
    records = [
        Record(f"r{row}", question=f"question {row}", answer=f"answer {row}", positives=(f"Answer {(row + 1) % 4}. ",))
        for row in range(4)
    ]
    recipe, loader = load(tmp_path, records)
    ((_, batches),) = list(loader)
    assert len(batches) > 1
    assert {known for batch in batches for known in batch.known_M2[:, 1].tolist()} == {
        normalised_hash(f"answer {row}") for row in range(4)
    }
    leaves = [torch.randn(len(batch.ids), 6) for batch in batches]
    _, stats = contrastive_loss(leaves, batches, recipe.contrastive)
    assert stats["masked_known_positive"] == pytest.approx(4 / 12)


@pytest.mark.parametrize("term", [{}, {"query_query": True}, {"passage_passage": True}])
def test_right_answers_of_the_same_question_are_no_negatives(tmp_path, term):
    """Two records may ask the same: `lbr eval` counts both answers as right, and so does the loss."""
    records = [
        Record(f"r{row}", question=f"question {row // 2}{'?' * row}", answer=f"answer {row}") for row in range(6)
    ]
    recipe, loader = load(tmp_path, records, contrastive=term)
    ((_, batches),) = list(loader)
    leaves = [torch.randn(len(batch.ids), 6) for batch in batches]
    _, stats = contrastive_loss(leaves, batches, recipe.contrastive)
    assert stats["masked_same_question"] == stats["masked_share"] == pytest.approx(1 / 5)
    assert stats["effective_negatives"] == pytest.approx(4 * (1 + bool(term)))


@pytest.mark.parametrize(("offset", "grad", "passes"), [(5.0, -1.0, False), (5.0, 1.0, True), (-5.0, 1.0, False)])
def test_a_learned_temperature_stays_in_its_bounds_and_can_come_back(offset, grad, passes):
    settings = Contrastive(temperature=0.1, learn_temperature={"lowest": 0.05, "highest": 0.2})
    parameter = torch.tensor(offset, requires_grad=True)
    tau = learned_temperature(parameter, settings)
    assert tau.item() == pytest.approx(0.2 if offset > 0 else 0.05)
    (tau * grad).backward()
    assert (parameter.grad != 0).item() == passes


def test_a_learned_temperature_comes_as_one_more_column():
    settings = Contrastive(temperature=0.3, learn_temperature={})
    rows = embeddings()
    with_column = torch.cat([rows, torch.full((len(rows), 1), 0.1, dtype=rows.dtype)], dim=1).requires_grad_()
    batches = [batch_of(list(range(len(TEXTS))))]
    loss, stats = contrastive_loss([with_column], batches, settings)
    expected, _ = contrastive_loss([rows], batches, Contrastive(), temperature=0.3 * math.exp(0.1))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert stats["temperature"] == pytest.approx(0.3 * math.exp(0.1))
    column = torch.autograd.grad(loss, with_column)[0][:, -1]
    assert column[0] != 0
    assert not column[1:].any()


def test_drawn_positives_reach_the_loss(tmp_path):
    """The text, its hash, and the mask of what was not drawn, in two epochs."""
    texts = [(f"answer {row}", f"first other {row}", f"second other {row}") for row in range(6)]
    records = [
        Record(f"r{row}", question=f"question {row}", answer=answer, positives=tuple(others), domain=f"d{row % 2}")
        for row, (answer, *others) in enumerate(texts)
    ]
    drawn_by_domain = {"positives": "draw", "homogeneous": "domain"}
    _, loader = load(tmp_path, records, contrastive=drawn_by_domain, data={"bin_tokens": 64}, duration={"epochs": 2})
    seen = set()
    for step, batches in loader:
        assert {ref.row % 2 for ref in step.refs()} in ({0}, {1})
        known, drawn = {}, {}
        for batch in batches:
            for side, pair, name, answer in zip(
                batch.side_S, batch.pair_S, batch.ids, batch.answer_hash_S, strict=True
            ):
                if side == SIDES["passage"]:
                    drawn[int(pair)] = (int(name[1:]), int(answer))
            for pair, value in batch.known_M2.tolist():
                known.setdefault(pair, set()).add(value)
        for pair, (row, answer) in drawn.items():
            hashes = [normalised_hash(text) for text in texts[row]]
            assert known[pair] == set(hashes)
            seen.add((row, hashes.index(answer)))
    assert {choice for _, choice in seen} == {0, 1, 2}
    assert len(seen) > 6
