"""GradCache and accumulation under a real DeepSpeed engine: fp32 and SGD, where an error of scale cannot hide."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lbr_dist.objectives.infonce import info_nce
from lbr_dist.training.accumulate import accumulate
from lbr_dist.training.gradcache import prepare

WIDTH, MICROS = 12, 3
PAIRS = {1: (11,), 2: (7, 4), 3: (5, 3, 4), 4: (4, 3, 1, 5)}
NEGATIVES = {1: (5,), 2: (0, 5), 3: (3, 0, 1), 4: (1, 0, 4, 2)}
STAGES = {
    1: [(2, "once"), (3, "each")],
    2: [(0, "auto"), (2, "once"), (3, "once"), (3, "each")],
    3: [(2, "each"), (3, "once")],
    4: [(2, "once"), (3, "once")],
}
TARGETS = torch.randn(18, WIDTH, generator=torch.Generator().manual_seed(3))


class Embedder(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 32), nn.LayerNorm(32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 8)
        )

    def forward(self, rows):
        return self.layers(rows)


def texts(world, rank, step):
    """Query, positive and hard-negative features of one rank; of the whole batch where rank is None."""
    generator = torch.Generator().manual_seed(1000 + step)
    draw = lambda rows: torch.randn(rows, WIDTH, generator=generator)  # noqa: E731
    query, negative = draw(sum(PAIRS[world])), draw(sum(NEGATIVES[world]))
    positive = query + draw(len(query))
    if rank is None:
        return query, positive, negative
    first, last = sum(PAIRS[world][:rank]), sum(PAIRS[world][: rank + 1])
    low, high = sum(NEGATIVES[world][:rank]), sum(NEGATIVES[world][: rank + 1])
    return query[first:last], positive[first:last], negative[low:high]


def loss_of(rows, pairs, two_way):
    return info_nce(
        rows[:pairs], rows[pairs : 2 * pairs], negatives_ND=rows[2 * pairs :], temperature=0.2, two_way=two_way
    )


def engine_of(stage, module, lr=0.1, bf16=False):
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or init_distributed compiles for minutes
    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # left out, it is 1.0
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
    }
    return deepspeed.initialize(model=module, optimizer=torch.optim.SGD(module.parameters(), lr=lr), config=config)[0]


def full(engine, gradient=False):
    """All parameters, or their gradients after a backward, as one vector."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    parts = []
    for parameter in engine.module.parameters():
        if gradient:
            parts.append(parameter.grad if parameter.grad is not None else safe_get_full_grad(parameter))
        else:
            with deepspeed.zero.GatheredParameters([parameter]):
                parts.append(parameter.detach().clone())
    return flat(parts)


def flat(parts):
    return torch.cat([part.flatten().clone() for part in parts])


def cached_step(engine, micro_batches, embed, loss_of, *, reduce="auto", cache=None):
    """Leaves the gradient in the engine, as `steps.Contrastive` does; the loss and what else `loss_of` returned."""
    closures, result = prepare(micro_batches, embed, loss_of, cache=cache)
    accumulate(engine, closures, reduce=reduce)
    return result()


def step_of(engine, world, rank, step, two_way, **settings):
    query, positive, negative = texts(world, rank, step)
    rows = torch.cat([query, positive, negative])
    micros = [rows[part] for part in torch.arange(len(rows)).tensor_split(MICROS)]
    return cached_step(
        engine, micros, engine, lambda parts: loss_of(torch.cat(list(parts)), len(query), two_way), **settings
    )


def both_ways(world, step):
    """The losses take turns; the first gradient is of the one-way loss at odd numbers of ranks."""
    return (world + step) % 2 == 0


def train(rank, world, stage, reduce, steps=20):
    """First gradient and last parameters."""
    engine = engine_of(stage, Embedder())
    gradient, losses = None, []
    for step in range(steps):
        loss, _ = step_of(engine, world, rank, step, both_ways(world, step), reduce=reduce)
        losses.append(loss.item())
        if step == 0 and stage:
            gradient = full(engine, gradient=True)
        engine.step()
    return gradient, full(engine), losses


def trained(rank, world, stages):
    return {(stage, reduce): train(rank, world, stage, reduce) for stage, reduce in stages}


def dropout(rank, world):
    """Parameters, and the next random number, after 3 steps with dropout: cached, and all at once."""
    results = []
    for cache in (True, False):
        engine = engine_of(3, Embedder(dropout=0.3))
        torch.manual_seed(17 + rank)
        for step in range(3):
            step_of(engine, world, rank, step, False, cache=cache)
            engine.step()
        results.append((full(engine), torch.rand(1)))
    return results


def reductions_of(engine, count):
    """Gradient-reducing collective calls of a step of `count` micro-batches."""
    rows = torch.randn(4, WIDTH)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        accumulate(engine, [lambda: engine(rows).square().sum()] * count, reduce="once")
    engine.step()
    return sum(event.count for event in recorded.key_averages() if "gloo:" in event.key and "reduce" in event.key)


def reductions(rank, world):
    engines = {stage: engine_of(stage, Embedder()) for stage in (2, 3)}
    return {(stage, count): reductions_of(engine, count) for stage, engine in engines.items() for count in (1, 6)}


def generative(rank, world):
    """Stage 1's use: a mean over all targets of the global batch, uneven over ranks and micro-batches."""
    engine = engine_of(3, Embedder())
    sizes = ((5, 1, 3), (2, 7, 0))[rank]
    start = 9 * rank
    closures = []
    for low, high in pairwise(torch.tensor((0, *sizes)).cumsum(0).tolist()):
        part = TARGETS[start + low : start + high]
        closures.append(lambda part=part: engine(part).square().sum() * world / len(TARGETS))
    accumulate(engine, closures)
    return full(engine, gradient=True)


def refused(rank, world):
    engine = engine_of(3, Embedder())
    messages = []
    for closures, accumulation in (([], 1), ([lambda: engine(TARGETS).sum()], 2)):
        engine.set_train_batch_size(world * accumulation)
        try:
            accumulate(engine, closures)
        except ValueError as error:
            messages.append(str(error))
    return messages


def on_two(rank, world):
    """All that needs two ranks, in one start of them."""
    return {
        "trained": trained(rank, world, STAGES[2]),
        "dropout": dropout(rank, world),
        "reductions": reductions(rank, world),
        "generative": generative(rank, world),
        "refused": refused(rank, world),
    }


def training_alone(rank, world):
    return {"trained": trained(rank, world, STAGES[world])}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks(on_two, 2, tmp_path_factory.mktemp("two"), timeout=280)


@pytest.fixture(scope="module")
def one():
    """First gradient, last parameters and losses of one process on the whole batch."""

    def run(world):
        module = Embedder()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        gradient, losses = None, []
        for step in range(20):
            query, positive, negative = texts(world, None, step)
            loss, _ = loss_of(module(torch.cat([query, positive, negative])), len(query), both_ways(world, step))
            loss.backward()
            losses.append(loss.item())
            if step == 0:
                gradient = flat(p.grad for p in module.parameters())
            optimizer.step()
            optimizer.zero_grad()
        return gradient, flat(p.detach() for p in module.parameters()), losses

    return run


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_cached_step_equals_one_process(world, one, request, tmp_path):
    gradient, wanted, losses = one(world)
    first = flat(p.detach() for p in Embedder().parameters())
    assert (wanted - first).norm() > 0.1 * first.norm()
    ranks = run_ranks(training_alone, world, tmp_path, timeout=280) if world != 2 else request.getfixturevalue("two")
    for results in ranks:
        for setting, (found, parameters, values) in results["trained"].items():
            if found is not None:
                assert (found - gradient).norm() <= 1e-6 * gradient.norm(), setting
            assert (parameters - wanted).norm() <= 1e-5 * wanted.norm(), setting
            assert values == pytest.approx(losses, rel=1e-5), setting


def test_dropout_is_replayed(two):
    for results in two:
        (cached, after_cached), (direct, after_direct) = results["dropout"]
        assert (cached - direct).norm() <= 1e-6 * direct.norm()
        assert after_cached == after_direct
        assert (cached - flat(p.detach() for p in Embedder().parameters())).norm() > 1e-3


def test_one_reduction_per_step(two):
    for results in two:
        for stage in (2, 3):
            assert 0 < results["reductions"][stage, 6] == results["reductions"][stage, 1]


def test_accumulated_mean_is_the_global_mean(two):
    module = Embedder()
    (module(TARGETS).square().sum() / len(TARGETS)).backward()
    wanted = flat(p.grad for p in module.parameters())
    for results in two:
        assert (results["generative"] - wanted).norm() <= 1e-6 * wanted.norm()


def test_wrong_use_is_refused(two):
    for results in two:
        empty, accumulating = results["refused"]
        assert "no micro-batch" in empty
        assert "gradient_accumulation_steps: 1" in accumulating


def failing(rank, world, note):
    engine = engine_of(3, Embedder())

    def closure():
        if rank == 1:
            note.write_text(str(time.time()))
            raise ValueError("sample 42 is broken")
        return engine(TARGETS).sum()

    accumulate(engine, [lambda: engine(TARGETS).sum(), closure, closure], reduce="once")


def test_a_failing_rank_says_so_at_once(tmp_path):
    note = tmp_path / "failed-at"
    with pytest.raises(RuntimeError, match="sample 42 is broken"):
        run_ranks(failing, 2, tmp_path, note)
    assert time.time() - float(note.read_text()) < 45
