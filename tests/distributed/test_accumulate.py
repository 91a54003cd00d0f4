"""Bfloat16 gradients of many micro-batches: 400 times 1.0 is 400, where a running sum in bfloat16 ends at 256."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from lbr_dist.recipes import parse_recipe

COUNT = 400


def summed(rank: int, world: int, regime: str) -> dict[str, list[float]]:
    """What one SGD step with learning rate 1 from 0 leaves in the master weights of this rank."""
    import deepspeed
    import deepspeed.ops

    from lbr_dist.training.accumulate import accumulate
    from lbr_dist.training.checkpoint.zero_state import open_engine
    from lbr_dist.training.ds_config import load_regime

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile for two minutes
    raw: dict[str, Any] = {"stage": "generative", "output": "out", "deepspeed": regime}
    raw |= {"model": {"path": "m", "dtype": "bfloat16"}, "data": {"sets": [{"path": "d"}]}, "duration": {"steps": 1}}
    recipe = parse_recipe({**raw, "optim": {"lr": 1.0, "clip": 0.0}, "batch": {"global_batch": COUNT * world}}, "test")
    config = load_regime(recipe, world=world, cuda=False).config
    model = torch.nn.Linear(8, 1, bias=False).to(torch.bfloat16)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ones_1D = torch.ones(1, 8, dtype=torch.bfloat16)
    accumulate(engine, [lambda: engine(ones_1D).sum().float() for _ in range(COUNT)])
    engine.step()
    pieces = open_engine(engine, rank, world).pieces(None, store=False)
    return {piece.name: piece.tensors["weight"].tolist() for piece in pieces}


@pytest.mark.parametrize("regime", ["zero2", "zero3"])
@pytest.mark.parametrize("world", [1, 2])
def test_bfloat16_gradients_are_added_up_in_float32(regime: str, world: int, tmp_path: Path) -> None:
    found = [value for rank in run_ranks(summed, world, tmp_path, regime) for value in rank["weight"]]
    assert found == [-float(COUNT)] * 8
