"""Batches of one domain or set, and positives that change with the epoch: still every sample once, and pure."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import WORLDS, all_rows, epoch_refs, make_index, make_plan, make_recipe, texts_of

from lbr_dist.data.plan import ContrastivePlan, Source
from lbr_dist.data.split_index import Ragged, SplitIndex
from lbr_dist.errors import UserError


def with_domains(index: SplitIndex, domains: int, seed: int = 0) -> SplitIndex:
    index.__dict__["domains"] = np.random.default_rng(seed).integers(0, domains, len(index)).astype(str).astype(object)
    return index


def with_positives(index: SplitIndex, longest: int = 20) -> SplitIndex:
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 4, len(index))
    tokens = rng.integers(1, longest, counts.sum()).astype(np.int32)
    index.__dict__["positive_tokens"] = Ragged(tokens, np.append(0, np.cumsum(counts)))
    index.__dict__["ids"] = np.array([f"r{row}" for row in range(len(index))], dtype=object)
    return index


def group_of(indexes: list[SplitIndex], kind: str, ref: Any) -> Any:
    return ref.set if kind == "set" else indexes[ref.set].domains[ref.row]  # type: ignore[index]


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(["set", "domain"]),
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=3),
    global_batch=st.integers(1, 40),
    window=st.integers(1, 200),
    domains=st.integers(1, 6),
)
def test_every_sample_once_and_every_batch_of_one_group(
    kind: str, sizes: list[int], global_batch: int, window: int, domains: int
) -> None:
    indexes = [with_domains(make_index(size, i), domains, i) for i, size in enumerate(sizes)]
    recipe = make_recipe(
        "contrastive", global_batch, sets=len(sizes), data={"window": window}, contrastive={"homogeneous": kind}
    )
    plan = make_plan(recipe, indexes)
    for epoch in (0, 1):
        assert Counter(epoch_refs(plan, epoch)) == all_rows(*indexes)
    batches: dict[Any, list[int]] = {}
    for number in range(plan.steps_per_epoch(0)):
        step = plan.step(number)
        (group,) = {group_of(indexes, kind, ref) for ref in step.refs()}
        batches.setdefault(group, []).append(step.samples)
        assert step.refs() == make_plan(recipe, indexes).step(number).refs()  # needs no step before it
    for found in batches.values():  # equal parts: no tiny rest
        assert max(found) <= global_batch
        assert max(found) - min(found) <= 1
        assert len(found) == -(-sum(found) // global_batch)


def test_groups_take_turns_over_the_epoch() -> None:
    indexes = [make_index(2000), make_index(1000, 1)]
    plan = make_plan(make_recipe("contrastive", 20, sets=2, contrastive={"homogeneous": "set"}), indexes)
    turns = [plan.step(number).refs()[0].set for number in range(150)]
    assert 10 < sum(turns[:75]) < 40
    assert turns != [plan.step(number).refs()[0].set for number in range(150, 300)]
    assert plan.notes == ["batches of one set: 2 groups, the smallest batch has 20 pairs"]


@pytest.mark.parametrize(
    ("kind", "domain", "why"),
    [("set", "d", ""), ("domain", "d", ""), ("domain", "", ", since no record names a domain")],
)
def test_one_group_keeps_nothing_apart_and_is_noted(kind: str, domain: str, why: str) -> None:
    index = make_index(50)
    index.__dict__["domains"] = np.full(50, domain, dtype=object)
    plan = make_plan(make_recipe("contrastive", 20, contrastive={"homogeneous": kind}), [index])
    apart = f"contrastive.homogeneous={kind} keeps no pairs apart{why}"
    assert plan.notes == [f"batches of one {kind}: 1 group, the smallest batch has 16 pairs; {apart}"]


def test_positives_that_no_record_has_are_noted() -> None:
    index, other = make_index(50), with_positives(make_index(50))
    index.__dict__["positive_tokens"] = Ragged(np.zeros(0, dtype=np.int32), np.zeros(51, dtype=np.int64))
    recipe = make_recipe("contrastive", sets=2, contrastive={"positives": "draw"})
    note = "contrastive.positives=draw has no effect: no record of set0, set1 has `positives`"
    assert make_plan(recipe, [index, index]).notes == [note]
    assert make_plan(recipe, [index, other]).notes == []


@pytest.mark.parametrize(("weight", "period"), [(0.5, 2), (0.3, 10), (0.9, 10), (1.5, 2), (0.25, 4)])
def test_the_weight_is_that_of_the_set_and_not_of_each_domain(weight: float, period: int) -> None:
    """A domain of 3 pairs gave 1 and 2 in turn at 0.5, as did all others, in the same epochs; at 0.3 none."""
    indexes = [make_index(300), with_domains(make_index(90, 1), 7)]
    indexes[0].__dict__["domains"] = np.array([f"{row // 3}" for row in range(300)], dtype=object)
    recipe = make_recipe("contrastive", sets=2, contrastive={"homogeneous": "domain"})
    plan = make_plan(recipe, indexes, [weight, 1.0])
    epochs = [Counter(epoch_refs(plan, epoch)) for epoch in range(period)]
    for number, epoch in enumerate(epochs):
        assert sum(count for ref, count in epoch.items() if ref.set == 0) == round(300 * weight)
        most = math.ceil((number + 1) * Fraction(str(weight))) - math.floor(number * Fraction(str(weight)))
        assert max(epoch.values()) <= most  # as the audit wants it
        assert plan.summary(number).samples == sum(epoch.values())
    whole = Counter({ref: round(period * (1.0 if ref.set else weight)) for ref in all_rows(*indexes)})
    assert sum(epochs, Counter()) == whole


def test_a_plan_says_where_parts_of_pairs_are_carried_over() -> None:
    """Runs begun before they were had other pairs; those of other weights go on."""
    index = with_domains(make_index(50), 3)
    recipe = make_recipe("contrastive", contrastive={"homogeneous": "domain"})
    found = [make_plan(recipe, [index], [weight]).identity["contrastive.homogeneous"] for weight in (2.0, 0.5)]
    assert found == ["domain", "domain, parts of pairs carried over"]


@pytest.mark.parametrize("world", WORLDS)
def test_pairs_are_cut_alike_at_any_world_size(world: int) -> None:
    indexes = [with_domains(make_index(200), 3)]
    plan = make_plan(make_recipe("contrastive", 30, contrastive={"homogeneous": "domain"}), indexes)
    for number in range(plan.steps_per_epoch(0)):
        step = plan.step(number)
        micros = [step.micro_batches(rank, world) for rank in range(world)]
        assert len({len(of_rank) for of_rank in micros}) == 1
        queries = [s.pair for of_rank in micros for micro in of_rank for s in micro.samples if s.side == "query"]
        assert sorted(queries) == list(range(step.samples))


@pytest.mark.parametrize("change", [{"homogeneous": "set"}, {"homogeneous": "domain"}, {"positives": "draw"}])
def test_they_are_part_of_the_fingerprint(change: dict[str, Any]) -> None:
    index = with_positives(with_domains(make_index(100), 2))
    plain, changed = (make_plan(make_recipe("contrastive", contrastive=c), [index]) for c in ({}, change))
    assert plain.fingerprint != changed.fingerprint
    assert [key for key in changed.identity if key not in plain.identity] == [f"contrastive.{next(iter(change))}"]


def test_a_set_without_the_columns_is_refused() -> None:
    index = make_index(50)
    index.__dict__.update(domains=None, positive_tokens=None)
    with pytest.raises(UserError, match=r"homogeneous=domain.*prepare the set again"):
        make_plan(make_recipe("contrastive", contrastive={"homogeneous": "domain"}), [index])
    with pytest.raises(UserError, match=r"positives=draw.*prepare the set again"):
        make_plan(make_recipe("contrastive", contrastive={"positives": "draw"}), [index])


def choices(plan: ContrastivePlan, epoch: int) -> dict[int, tuple[int, int]]:
    first = sum(plan.steps_per_epoch(e) for e in range(epoch))
    texts = [pair for g in range(first, first + plan.steps_per_epoch(epoch)) for pair in texts_of(plan.step(g))]
    return {passage.ref.row: (passage.choice, passage.x_len) for _, passage in texts}


def test_positives_are_drawn_by_seed_epoch_and_id() -> None:
    index = with_positives(make_index(400))
    recipe = make_recipe("contrastive", contrastive={"positives": "draw"})
    plan = make_plan(recipe, [index])
    found = [choices(plan, epoch) for epoch in range(8)]
    counts = index.positive_tokens.lengths  # type: ignore[union-attr]
    for row in range(400):
        seen = {of_epoch[row][0] for of_epoch in found}
        assert seen <= set(range(-1, counts[row]))
        for choice, length in (of_epoch[row] for of_epoch in found):
            tokens = index.answer_tokens[row] if choice < 0 else index.positive_tokens[row][choice]  # type: ignore[index]
            assert length == min(32, tokens + 1)
    drawn = Counter(of_epoch[row][0] for of_epoch in found for row in np.flatnonzero(counts == 3))
    assert max(drawn.values()) < 1.6 * min(drawn.values())  # each of the four as often
    steps = [plan.step(g) for g in range(plan.steps_per_epoch(0))]
    assert plan.summary(0).input_tokens == sum(step.input_tokens for step in steps)
    other_order = make_plan(make_recipe("contrastive", 7, contrastive={"positives": "draw"}), [index])
    assert choices(other_order, 1) == found[1]
    other_seed = make_plan(make_recipe("contrastive", contrastive={"positives": "draw"}, seed=1), [index])
    assert choices(other_seed, 1) != found[1]


def test_too_long_positives_are_cut_or_never_drawn() -> None:
    index = with_positives(make_index(300), longest=60)
    for action in ("cut", "drop"):
        recipe = make_recipe("contrastive", contrastive={"positives": "draw"}, data={"too_long": action})
        plan = make_plan(recipe, [index])
        (entry,) = [entry for entry in plan.too_long if entry.part == "further positive"]
        assert entry.count == int((index.positive_tokens.values + 1 > 32).sum())  # type: ignore[union-attr]
        drawn = [(row, choice) for row, (choice, _) in choices(plan, 0).items() if choice >= 0]
        long = [pair for pair in drawn if index.positive_tokens[pair[0]][pair[1]] + 1 > 32]  # type: ignore[index]
        assert drawn
        assert bool(long) == (action == "cut")


def test_missing_hard_negatives_are_counted_or_refused() -> None:
    index = make_index(100)
    plan = make_plan(make_recipe("contrastive", contrastive={"hard_negatives": 2}), [index])
    counts = index.negative_tokens.lengths
    (note,) = plan.notes
    assert f"{(counts < 2).sum()} of 100 records have fewer" in note
    assert f"({(counts == 0).sum()} have none)" in note
    index.__dict__["negative_tokens"] = Ragged(np.zeros(0, dtype=np.int32), np.zeros(101, dtype=np.int64))
    with pytest.raises(UserError, match=r"hard_negatives=2, but no record of set0 has `negatives`: mine some"):
        make_plan(make_recipe("contrastive", contrastive={"hard_negatives": 2}), [index])


def test_hard_negatives_that_are_dropped_are_missing() -> None:
    index = make_index(100)
    data = {"max_x_tokens": 20, "too_long": "drop"}
    recipe = make_recipe("contrastive", contrastive={"hard_negatives": 2}, data=data)
    plan = make_plan(recipe, [index])
    rows = [row for row in range(100) if max(index.question_tokens[row] + 3, index.answer_tokens[row] + 1) <= 20]
    counts = np.array([(index.negative_tokens[row] + 1 <= 20).sum() for row in rows])
    few = f"{(counts < 2).sum()} of {len(rows)} records have fewer than contrastive.hard_negatives=2"
    assert plan.notes == [f"set0: {few} ({(counts == 0).sum()} have none); they are used with what they have"]
    index.negative_tokens.values[:] = 25
    dropped = rf"`negatives` that are used \(.*{len(index.negative_tokens.values)} samples whose negative exceeds 20"
    with pytest.raises(UserError, match=dropped + r" .*: raise data.max_x_tokens"):
        make_plan(recipe, [index])


def test_empty_texts_of_a_record_are_never_read_without_bottleneck() -> None:
    """Such a hard negative ended the run in its middle."""
    index = with_positives(make_index(60))
    index.negative_tokens.values[::3] = index.positive_tokens.values[::3] = 0  # type: ignore[union-attr]
    options = {"pooling": "last", "hard_negatives": 3, "positives": "draw"}
    recipe = make_recipe("contrastive", bottleneck={"enabled": False}, contrastive=options)
    plan = ContrastivePlan(recipe, [Source("set0", "print", index, 1.0, "pairs")], query_extra=0, passage_extra=0)
    texts = [text for g in range(plan.steps_per_epoch(0)) for pair in texts_of(plan.step(g)) for text in pair]
    assert min(text.tokens for text in texts) == 1
    negatives = index.negative_tokens.values
    assert sum(text.side == "negative" for text in texts) == (negatives > 0).sum()
    assert f"set0: {(negatives == 0).sum()} samples with an empty negative dropped" in map(str, plan.too_long)
    assert "with an empty further positive dropped" in str(plan.too_long[-1])
