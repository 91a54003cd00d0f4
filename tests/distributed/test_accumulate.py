"""What a step's micro-batches add up to: in bfloat16, whose running sum of 400 ones ends at 256; after an error."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from lbr_dist.recipes import parse_recipe
from lbr_dist.training.ds_config import FOLDER

COUNT = 400


def engine_of(world: int, regime: str, dtype: str) -> Any:
    """Eight weights of 0, for SGD with learning rate 1."""
    import deepspeed
    import deepspeed.ops

    from lbr_dist.training.ds_config import load_regime

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile for two minutes
    raw: dict[str, Any] = {"stage": "generative", "output": "out", "deepspeed": regime}
    raw |= {"model": {"path": "m", "dtype": dtype}, "data": {"sets": [{"path": "d"}]}, "duration": {"steps": 1}}
    recipe = parse_recipe({**raw, "optim": {"lr": 1.0, "clip": 0.0}, "batch": {"global_batch": COUNT * world}}, "test")
    config = load_regime(recipe, world=world, cuda=False).config
    model = torch.nn.Linear(8, 1, bias=False).to(getattr(torch, dtype))
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def weights(engine: Any, rank: int, world: int) -> list[float]:
    """This rank's share of the master weights."""
    from lbr_dist.training.checkpoint.zero_state import open_engine

    return [
        value
        for piece in open_engine(engine, rank, world).pieces(None, store=False)
        for value in piece.tensors["weight"].tolist()
    ]


def summed(rank: int, world: int, regime: str) -> list[float]:
    """What one step leaves in this rank's weights."""
    from lbr_dist.training.accumulate import accumulate

    engine = engine_of(world, regime, "bfloat16")
    ones_1D = torch.ones(1, 8, dtype=torch.bfloat16)
    accumulate(engine, [lambda: engine(ones_1D).sum().float() for _ in range(COUNT)])
    engine.step()
    return weights(engine, rank, world)


@pytest.mark.parametrize("regime", ["zero2", "zero3"])
@pytest.mark.parametrize("world", [1, 2])
def test_bfloat16_gradients_are_added_up_in_float32(regime: str, world: int, tmp_path: Path) -> None:
    found = [value for rank in run_ranks(summed, world, tmp_path, regime) for value in rank]
    assert found == [-float(COUNT)] * 8


def after_errors(rank: int, world: int, regime: str, dtype: str) -> list[float]:
    """What three steps leave in this rank's weights, with a step after each of them that fails on every rank."""
    from lbr_dist.training.accumulate import accumulate

    engine = engine_of(world, regime, dtype)

    def closure(gradient: int) -> torch.Tensor:
        if not gradient:
            raise ArithmeticError
        return engine(torch.full((1, 8), gradient, dtype=getattr(torch, dtype))).sum().float()

    for good, failing in (((1, 2), (0, 7)), ((3, 4), (5, 0)), ((10, 20), (0, 7))):
        accumulate(engine, [partial(closure, gradient) for gradient in good])
        engine.step()
        with contextlib.suppress(ArithmeticError):
            accumulate(engine, [partial(closure, gradient) for gradient in failing])
    return weights(engine, rank, world)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("regime", ["zero1", "zero2", "zero3", "offload"])
def test_an_error_leaves_nothing_to_the_next_step(regime: str, dtype: str, tmp_path: Path) -> None:
    if regime == "offload":
        config = json.loads((FOLDER / "zero2.json").read_text())
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        regime = str(tmp_path / "offload.json")
        Path(regime).write_text(json.dumps(config))
    found = [value for rank in run_ranks(after_errors, 2, tmp_path, regime, dtype) for value in rank]
    assert found == [-40.0] * 8
