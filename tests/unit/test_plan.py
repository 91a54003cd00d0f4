"""The plan: every sample once per epoch, the same steps at any world size, and nothing but its inputs decides."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lbr_dist.config import Bottleneck, Duration, Recipe
from lbr_dist.data.plan import ContrastivePlan, GenerativePlan, Plan, PlannedSample, SampleRef, Source
from lbr_dist.data.plan.base import SIDES
from lbr_dist.data.plan.contrastive import ContrastiveStep, spread
from lbr_dist.data.plan.lengths import bottleneck_lengths
from lbr_dist.data.plan.order import Stream, shuffled
from lbr_dist.data.split_index import Ragged, SplitIndex
from lbr_dist.errors import UserError

WORLDS = (1, 2, 3, 4, 8)


def make_index(
    rows: int, seed: int = 0, *, shard: int = 37, kind: str = "qa", answers: int | None = None
) -> SplitIndex:
    """Index of random rows; `answers`: number of different answers."""
    rng = np.random.default_rng(seed)
    none = np.full(rows, -1, dtype=np.int32)
    tokens = rng.integers(1, 30, (2, rows)).astype(np.int32)
    index = SplitIndex(
        shard=(np.arange(rows) // shard).astype(np.int32),
        offset=np.arange(rows, dtype=np.int64),
        size=np.ones(rows, dtype=np.int32),
        question_tokens=tokens[0] if kind == "qa" else none,
        answer_tokens=tokens[1] if kind == "qa" else none,
        text_tokens=tokens[0] + tokens[1] if kind == "text" else none,
        answer_hash=rng.integers(0, answers, rows) if answers else np.arange(rows, dtype=np.int64),
        tables=(),
    )
    counts = rng.integers(0, 4, rows)
    negatives = Ragged(rng.integers(1, 30, counts.sum()).astype(np.int32), np.append(0, np.cumsum(counts)))
    index.__dict__["negative_tokens"] = negatives
    return index


def make_recipe(stage: str, global_batch: int = 4, sets: int = 1, **other: Any) -> Recipe:
    data = {"sets": [{"path": f"set{i}"} for i in range(sets)], "max_x_tokens": 32, "max_y_tokens": 32}
    data |= {"bin_tokens": 80, "window": 64, "block": 8} | other.pop("data", {})
    raw: dict[str, Any] = {"stage": stage, "output": "out", "model": {"path": "m"}, "duration": {"epochs": 1}}
    batch = {"global_batch": global_batch} | other.pop("batch", {})
    return Recipe.model_validate(raw | {"data": data, "batch": batch} | other)


def make_plan(
    recipe: Recipe, indexes: list[SplitIndex], weights: list[float] | None = None, target: str = "sft"
) -> Plan:
    weights = weights or [1.0] * len(indexes)
    sources = [
        Source(f"set{i}", f"print{i}", index, weight, target)
        for i, (index, weight) in enumerate(zip(indexes, weights, strict=True))
    ]
    if recipe.stage == "generative":
        return GenerativePlan(recipe, sources, bos=1, eos=1)
    return ContrastivePlan(recipe, sources, query_extra=3, passage_extra=1)


def epoch_refs(plan: Plan, epoch: int) -> list[SampleRef]:
    first = sum(plan.steps_per_epoch(e) for e in range(epoch))
    return [ref for step in range(first, first + plan.steps_per_epoch(epoch)) for ref in plan.step(step).refs()]


def texts_of(step: ContrastiveStep) -> list[list[PlannedSample]]:
    """Query, passage and hard negatives of each pair."""
    texts: list[list[PlannedSample]] = [[] for _ in range(step.samples)]
    for text in sorted((s for micro in step.micro_batches(0, 1) for s in micro.samples), key=lambda s: SIDES[s.side]):
        texts[text.pair].append(text)
    return texts


def all_rows(*indexes: SplitIndex) -> Counter[SampleRef]:
    return Counter(SampleRef(i, row) for i, index in enumerate(indexes) for row in range(len(index)))


cases = given(
    stage=st.sampled_from(["generative", "contrastive"]),
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=3),
    global_batch=st.integers(1, 40),
    window=st.integers(1, 300),
    block=st.integers(1, 20),
    shard=st.integers(1, 100),
    seed=st.integers(0, 5),
)


@settings(max_examples=40, deadline=None)
@cases
def test_every_sample_exactly_once_per_epoch_at_every_world_size(
    stage: str, sizes: list[int], global_batch: int, window: int, block: int, shard: int, seed: int
) -> None:
    indexes = [make_index(size, seed + i, shard=shard) for i, size in enumerate(sizes)]
    recipe = make_recipe(stage, global_batch, len(sizes), seed=seed, data={"window": window, "block": block})
    plan = make_plan(recipe, indexes)
    for epoch in (0, 1):
        assert Counter(epoch_refs(plan, epoch)) == all_rows(*indexes)
    for number in range(plan.steps_per_epoch(0)):
        step = plan.step(number)
        last = number == plan.steps_per_epoch(0) - 1
        if stage == "contrastive" and not last:
            assert step.samples == global_batch
        for world in WORLDS:
            ranks = [step.micro_batches(rank, world) for rank in range(world)]
            assert len({len(micros) for micros in ranks}) == 1, "a rank with fewer module calls hangs ZeRO-3"
            assert all(micro.tokens <= 80 for micros in ranks for micro in micros)
            samples = [s for micros in ranks for micro in micros for s in micro.samples if s.side in ("x", "query")]
            assert Counter(s.ref for s in samples) == Counter(step.refs())
            assert len(samples) == step.samples
            pairs = [pair for rank in range(world) for pair in step.pairs(rank, world)]
            assert pairs == (list(range(step.samples)) if stage == "contrastive" else [])
        tokens = sum(micro.tokens for micro in step.micro_batches(0, 1))
        assert tokens == step.input_tokens


@pytest.mark.parametrize("stage", ["generative", "contrastive"])
def test_a_step_is_a_pure_function(stage: str) -> None:
    indexes = [make_index(300), make_index(150, 1)]
    recipe = make_recipe(stage, sets=2)
    in_order, out_of_order = make_plan(recipe, indexes), make_plan(recipe, indexes)
    assert in_order.fingerprint == out_of_order.fingerprint
    steps = range(2 * in_order.steps_per_epoch(0) + 3)
    forward = {g: in_order.step(g).micro_batches(1, 2) for g in steps}
    assert forward == {g: out_of_order.step(g).micro_batches(1, 2) for g in reversed(steps)}


def test_the_order_is_the_same_in_another_process() -> None:
    """No hash randomisation, no dependence on a random generator's version: the order is pinned to these numbers."""
    code = "from lbr_dist.data.plan.order import shuffled; print(shuffled(8, 7, 'blocks', 0).tolist())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(shuffled(8, 7, "blocks", 0).tolist()) == "[4, 2, 0, 6, 1, 5, 3, 7]"


@pytest.mark.parametrize("stage", ["generative", "contrastive"])
@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"data": {"window": 50}}, {"data": {"block": 4}}, {"batch": {"global_batch": 5}}],
    ids=["seed", "window", "block", "global_batch"],
)
def test_settings_that_change_the_order_change_the_fingerprint(stage: str, change: dict[str, Any]) -> None:
    index = [make_index(300)]
    plan, other = make_plan(make_recipe(stage), index), make_plan(make_recipe(stage, **change), index)
    assert plan.fingerprint != other.fingerprint
    assert epoch_refs(plan, 0)[:40] != epoch_refs(other, 0)[:40] or "global_batch" in str(change)
    differing = [key for key in plan.identity if plan.identity[key] != other.identity[key]]
    assert len(differing) == 1


@pytest.mark.parametrize("stage", ["generative", "contrastive"])
def test_settings_that_change_nothing_keep_the_fingerprint(stage: str) -> None:
    index = [make_index(50)]
    plan = make_plan(make_recipe(stage), index)
    other = make_plan(make_recipe(stage, data={"workers": 3, "prefetch": 9}, batch={"micro_tokens": 160}), index)
    assert plan.fingerprint == other.fingerprint


def test_epochs_are_shuffled_and_differ() -> None:
    plan = make_plan(make_recipe("contrastive", data={"window": 1000}), [make_index(1000)])
    first, second = ([ref.row for ref in epoch_refs(plan, epoch)] for epoch in (0, 1))
    assert first != second
    for rows in (first, second):
        assert abs(np.corrcoef(rows, np.arange(1000))[0, 1]) < 0.15


def test_steps_are_not_sorted_by_length() -> None:
    """Best-fit-decreasing opens the bins of long samples first; the steps must not show it."""
    plan = make_plan(make_recipe("generative", 8, data={"window": 4096}), [make_index(4096)])
    steps = [plan.step(g) for g in range(plan.steps_per_epoch(0) - 1)]
    mean_length = np.array([step.input_tokens / step.samples for step in steps])
    assert abs(np.corrcoef(mean_length, np.arange(len(steps)))[0, 1]) < 0.2


def test_a_window_reads_few_shards() -> None:
    """So that a bounded cache of remote shards is enough: blocks are shuffled within a span, not over the whole set."""
    shard_N = np.repeat(np.arange(100), 50)
    stream = Stream(None, shard_N, block=5, span=500, key=3)
    row_N, _ = stream.take(1000, 1200)
    assert len(set(shard_N[row_N])) <= 11
    everything, _ = stream.take(0, 5000)
    assert sorted(everything) == list(range(5000))


def test_weights_are_passes_per_epoch() -> None:
    indexes = [make_index(101), make_index(50, 1), make_index(33, 2)]
    plan = make_plan(make_recipe("contrastive", sets=3), indexes, [0.5, 2.0, 1.0])
    epochs = [Counter(epoch_refs(plan, epoch)) for epoch in range(4)]
    for first in (0, 2):  # two epochs cover the half-weight set exactly once
        both = epochs[first] + epochs[first + 1]
        assert [both[SampleRef(0, row)] for row in range(101)] == [1] * 101
    for counts in epochs:
        assert [counts[SampleRef(1, row)] for row in range(50)] == [2] * 50
        assert [counts[SampleRef(2, row)] for row in range(33)] == [1] * 33
    assert epochs == [Counter(epoch_refs(plan, epoch)) for epoch in range(4)]


def test_fractional_weights_are_exact() -> None:
    """0.3 is less than three tenths in binary: ten epochs must be three passes all the same."""
    plan = make_plan(make_recipe("generative"), [make_index(97)], [0.3])
    seen = sum((Counter(epoch_refs(plan, epoch)) for epoch in range(10)), Counter())
    assert [seen[SampleRef(0, row)] for row in range(97)] == [3] * 97


def test_sets_are_interleaved_over_the_epoch() -> None:
    indexes = [make_index(3000), make_index(1000, 1)]
    plan = make_plan(make_recipe("contrastive", 100, sets=2, data={"window": 400}), indexes)
    small = [sum(ref.set == 1 for ref in plan.step(g).refs()) for g in range(40)]
    assert min(small) > 8
    assert max(small) < 45


def test_lengths_are_those_of_the_layout() -> None:
    index = make_index(200)
    recipe = make_recipe("generative", bottleneck={"ratio": 10}, data={"max_x_tokens": 20})
    for micro in make_plan(recipe, [index]).step(0).micro_batches(0, 1):
        for sample in micro.samples:
            x = min(20, 1 + index.question_tokens[sample.ref.row])
            assert sample[1:4] == (x, recipe.bottleneck.length(x), 1 + index.answer_tokens[sample.ref.row])


@pytest.mark.parametrize("setting", [{"tokens": 3}, {"ratio": 7.5}, {"ratio": 0.3}, {"enabled": False}, {}])
def test_bottleneck_lengths_equal_the_recipe(setting: dict[str, Any]) -> None:
    bottleneck = Bottleneck(**setting)
    x_N = np.arange(0, 5000)
    assert bottleneck_lengths(bottleneck, x_N).tolist() == [bottleneck.length(int(x)) for x in x_N]


@settings(max_examples=60, deadline=None)
@given(low=st.floats(0, 1), high=st.floats(0, 1), most=st.integers(4, 40), epoch=st.integers(0, 2))
def test_prefix_cuts_inside_and_within_the_limits(low: float, high: float, most: int, epoch: int) -> None:
    index = make_index(60, kind="text")
    prefix = {"target": "prefix", "prefix_min": min(low, high), "prefix_max": max(low, high)}
    data = {"max_x_tokens": most, "max_y_tokens": 38}
    plan = make_plan(make_recipe("generative", 100, generative=prefix, data=data), [index], target="prefix")
    for sample in plan.step(epoch).micro_batches(0, 1)[0].samples:
        document = int(index.text_tokens[sample.ref.row])
        assert 1 < sample.x_len <= most
        assert 1 < sample.y_len <= 38
        left_out = document + 2 - sample.x_len - sample.y_len
        assert left_out == max(0, document + 2 - most - 38), "a document that can be split within the limits is whole"


def test_prefix_cut_points_change_with_the_epoch_and_cover_the_range() -> None:
    index = make_index(400, kind="text")
    plan = make_plan(make_recipe("generative", 10_000), [index], target="prefix")
    cuts = []
    for epoch in (0, 1):
        samples = [s for micro in plan.step(epoch).micro_batches(0, 1) for s in micro.samples]
        cuts.append({s.ref.row: (s.x_len - 1) / index.text_tokens[s.ref.row] for s in samples})
    assert sum(cuts[0][row] != cuts[1][row] for row in cuts[0]) > 300
    assert np.mean(list(cuts[0].values())) == pytest.approx(0.5, abs=0.04)


def test_too_long_is_cut_and_counted() -> None:
    index = make_index(300)
    plan = make_plan(make_recipe("generative", data={"max_x_tokens": 10}), [index])
    (found,) = plan.too_long
    assert (found.part, found.action) == ("question", "cut")
    assert found.count == int((index.question_tokens + 1 > 10).sum())
    assert found.longest == int(index.question_tokens.max()) + 1
    assert Counter(epoch_refs(plan, 0)) == all_rows(index)


def test_too_long_is_dropped_and_counted() -> None:
    index = make_index(300)
    plan = make_plan(make_recipe("generative", data={"max_y_tokens": 10, "too_long": "drop"}), [index])
    kept = [row for row in range(300) if index.answer_tokens[row] + 1 <= 10]
    assert Counter(epoch_refs(plan, 0)) == Counter(SampleRef(0, row) for row in kept)
    assert plan.too_long[0].count == 300 - len(kept)
    assert f"{300 - len(kept)} samples whose answer exceeds 10 tokens dropped" in str(plan.too_long[0])


def test_empty_texts_without_bottleneck_are_dropped_and_counted() -> None:
    index = make_index(20)
    index.question_tokens[4] = 0
    recipe = make_recipe("generative", bottleneck={"enabled": False})
    plan = GenerativePlan(recipe, [Source("set0", "print", index, 1.0, "sft")], bos=0, eos=1)
    assert SampleRef(0, 4) not in epoch_refs(plan, 0)
    assert [str(t) for t in plan.too_long] == ["set0: 1 samples with an empty text dropped"]


@pytest.mark.parametrize(
    ("stage", "kind", "target", "other", "words"),
    [
        ("generative", "text", "sft", {}, ["set0", "sft", "reconstruct"]),
        ("contrastive", "text", "pairs", {}, ["set0", "stage 2", "question"]),
        ("generative", "qa", "sft", {"data": {"bin_tokens": 64}, "bottleneck": {"tokens": 30}}, ["set0", "bin_tokens"]),
        ("contrastive", "qa", "pairs", {"batch": {"micro_tokens": 32}}, ["set0", "batch.micro_tokens"]),
        ("generative", "qa", "sft", {"batch": {"micro_tokens": 32}}, ["batch.micro_tokens", "data.bin_tokens"]),
        ("generative", "qa", "sft", {"data": {"max_x_tokens": 1, "too_long": "drop"}}, ["set0", "no sample is left"]),
    ],
)
def test_unusable_settings_name_the_set_and_the_setting(
    stage: str, kind: str, target: str, other: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        make_plan(make_recipe(stage, **other), [make_index(40, kind=kind)], target=target)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("stage", ["generative", "contrastive"])
def test_weights_too_small_for_a_sample_are_refused_and_noted(stage: str) -> None:
    """Such a run had no step, or looked for its first one through as many epochs as it took."""
    indexes = [make_index(3), make_index(40)]
    with pytest.raises(UserError, match=r"set0: of 3 usable samples, weight 1e-09 takes none .*data\.sets\.N\.weight"):
        make_plan(make_recipe(stage), indexes[:1], [1e-9])
    plan = make_plan(make_recipe(stage, sets=2), indexes, [0.1, 0.5])
    assert plan.notes == ["set0: of 3 usable samples, weight 0.1 takes none in the first epoch"]


def test_hard_negatives() -> None:
    index = make_index(100)
    recipe = make_recipe("contrastive", 10, contrastive={"hard_negatives": 2})
    plan = make_plan(recipe, [index])
    chosen: list[dict[int, list[int]]] = []
    for epoch in (0, 1):
        chosen.append({})
        for number in range(10 * epoch, 10 * epoch + 10):
            step = plan.step(number)
            for world in (1, 3):
                texts = [s for r in range(world) for micro in step.micro_batches(r, world) for s in micro.samples]
                assert Counter(texts) == Counter(s for pair in texts_of(step) for s in pair)
            for pair, texts in enumerate(texts_of(step)):
                row, negatives = texts[0].ref.row, texts[2:]
                assert [s.pair for s in texts] == [pair] * len(texts)
                assert len(negatives) == min(2, len(index.negative_tokens[row]))
                assert len({s.choice for s in negatives}) == len(negatives)
                assert [s.x_len for s in negatives] == [index.negative_tokens[row][s.choice] + 1 for s in negatives]
                chosen[epoch][row] = [s.choice for s in negatives]
    assert chosen[0] != chosen[1], "another epoch uses other negatives"


def test_ranks_take_contiguous_pairs_with_their_texts() -> None:
    step = make_plan(make_recipe("contrastive", 10), [make_index(25)]).step(2)  # the last, partial step: 5 pairs
    assert step.samples == 5
    for rank in range(8):
        mine = set(step.pairs(rank, 8))
        samples = [s for micro in step.micro_batches(rank, 8) for s in micro.samples]
        assert {s.pair for s in samples} == mine
        assert len(samples) == 2 * len(mine)


def test_same_answers_fall_in_different_steps_where_that_is_possible() -> None:
    plan = make_plan(make_recipe("contrastive", 16, data={"window": 4096}), [make_index(1024, answers=300)])
    index = plan.sources[0].index
    repeats = 0
    for number in range(plan.steps_per_epoch(0)):
        hashes = [int(index.answer_hash[ref.row]) for ref in plan.step(number).refs()]
        repeats += len(hashes) - len(set(hashes))
    assert repeats == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=120), st.integers(1, 30))
def test_spread_is_a_permutation_and_never_worse(answers: list[int], group: int) -> None:
    answer_N = np.array(answers, dtype=np.int64)
    order_N = spread(answer_N, np.arange(len(answer_N)) // group, key=1)
    assert sorted(order_N) == list(range(len(answers)))

    def repeats(values: np.ndarray) -> int:
        groups = [values[i : i + group] for i in range(0, len(values), group)]
        return sum(len(g) - len(set(g.tolist())) for g in groups)

    assert repeats(answer_N[order_N]) <= repeats(answer_N)


def test_micro_tokens_joins_whole_bins() -> None:
    plan = make_plan(make_recipe("generative", 7, batch={"micro_tokens": 240}), [make_index(300)])
    bins = make_plan(make_recipe("generative", 7), [make_index(300)]).step(0).micro_batches(0, 1)
    micros = plan.step(0).micro_batches(0, 1)
    assert [len(m) for m in (bins, micros)] == [7, 3]
    assert micros[0].samples == bins[0].samples + bins[1].samples + bins[2].samples


def test_many_epochs_are_planned_once() -> None:
    plan = make_plan(make_recipe("generative"), [make_index(70)])
    assert isinstance(plan, GenerativePlan)
    steps = plan.total_steps(Duration(epochs=70))
    assert (plan.total_steps(Duration(epochs=70)), plan._table.cache_info().misses) == (steps, 70)


@pytest.mark.parametrize("stage", ["generative", "contrastive"])
@pytest.mark.parametrize("target", ["sft", "prefix"])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [2.0, 1.0], [0.3, 0.5]])
@pytest.mark.parametrize("rows", [30, 40])
def test_steps_of_an_epoch_that_is_like_another_are_those_counted(
    stage: str, target: str, weights: list[float], rows: int
) -> None:
    plan = make_plan(make_recipe(stage, 3, 2), [make_index(rows), make_index(31, 1)], weights, target)
    count = plan._count_steps if isinstance(plan, GenerativePlan) else plan._groups.steps  # type: ignore[attr-defined]
    counted = [count(epoch) for epoch in range(25)]
    assert [plan.steps_per_epoch(epoch) for epoch in range(25)] == counted


@pytest.mark.parametrize("stage", ["generative", "contrastive"])
def test_a_million_epochs_are_counted_in_seconds(stage: str) -> None:
    plan, start = make_plan(make_recipe(stage), [make_index(30)]), time.perf_counter()
    assert plan.total_steps(Duration(epochs=1_000_000)) == 1_000_000 * plan.steps_per_epoch(0)
    assert time.perf_counter() - start < 10  # packed or shared out one by one they take half a minute and more


def test_steps_epochs_and_duration() -> None:
    plan = make_plan(make_recipe("contrastive", 10), [make_index(95)])
    assert plan.locate(9) == (0, 9)
    assert plan.locate(10) == (1, 0)
    assert plan.locate(1234) == (123, 4)
    assert plan.total_steps(Duration(epochs=2)) == 20
    assert plan.total_steps(Duration(epochs=1.25)) == 13
    assert plan.total_steps(Duration(epochs=0.1)) == 1
    assert plan.total_steps(Duration(steps=7)) == 7


@pytest.mark.parametrize("hard_negatives", [0, 2])
def test_every_rank_knows_the_fullest_one_without_packing_them_all(
    hard_negatives: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(make_recipe("contrastive", 97, contrastive={"hard_negatives": hard_negatives}), [make_index(300)])
    pack, packed = ContrastiveStep._pack, list[int]()
    monkeypatch.setattr(ContrastiveStep, "_pack", lambda *given: (packed.append(given[1]), pack(*given))[1])
    for number, capacity in itertools.product(range(plan.steps_per_epoch(0)), (60, 64, 100, 150, 333, 5000)):
        step = dataclasses.replace(plan.step(number), micro_tokens=capacity)
        for world in (1, 2, 3, 8, 40, 200):
            most = max(pack(step, rank, world)[2] for rank in range(world))
            packed.clear()
            assert len(step.micro_batches(world - 1, world)) == most
            assert most > 1 or len(packed) <= 2  # its own, and the one of most tokens


def test_a_rank_makes_the_texts_of_its_own_pairs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[PlannedSample] = []

    def noting(*given: Any, **named: Any) -> PlannedSample:
        made.append(PlannedSample(*given, **named))
        return made[-1]

    monkeypatch.setattr("lbr_dist.data.plan.contrastive.PlannedSample", noting)
    step = make_plan(make_recipe("contrastive", 97, contrastive={"hard_negatives": 2}), [make_index(300)]).step(0)
    micros = step.micro_batches(1, 8)
    assert {text.pair for text in made} == set(step.pairs(1, 8))
    assert len(made) == sum(len(micro.samples) for micro in micros)


@pytest.mark.parametrize(
    ("stage", "options"), [("generative", {}), ("contrastive", {}), ("contrastive", {"hard_negatives": 2})]
)
def test_summary_adds_up(stage: str, options: dict[str, Any]) -> None:
    plan = make_plan(make_recipe(stage, contrastive=options), [make_index(300)])
    summary = plan.summary(0)
    steps = [plan.step(g) for g in range(plan.steps_per_epoch(0))]
    assert summary.steps == len(steps)
    assert summary.samples == sum(step.samples for step in steps) == 300
    assert summary.input_tokens == sum(step.input_tokens for step in steps)
    assert summary.target_tokens == sum(step.target_tokens for step in steps)


def test_a_million_samples_are_planned_in_seconds() -> None:
    rows = 1_000_000
    index = make_index(rows, shard=8192)
    recipe = make_recipe("generative", 256, data={"window": 65536, "bin_tokens": 1024, "block": 64})
    start = time.perf_counter()
    plan = make_plan(recipe, [index])
    steps = plan.steps_per_epoch(0)
    plan.step(steps // 2)
    first = time.perf_counter() - start
    start = time.perf_counter()
    plan.step(steps // 2 + 1).micro_batches(0, 8)
    assert first < 20  # 1 s on an idle core
    assert time.perf_counter() - start < first
