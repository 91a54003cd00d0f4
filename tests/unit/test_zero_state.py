"""DeepSpeed's private attributes: a version that is shaped otherwise is refused in one clear line, before any write."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lbr_dist.errors import UserError
from lbr_dist.training.checkpoint.engine_state import EngineShapeError, equal_run
from lbr_dist.training.checkpoint.zero_state import SUPPORTED, open_engine


def engine(kind: str, **attributes: object) -> SimpleNamespace:
    """An engine whose ZeRO optimizer is called `kind` and has just these attributes."""
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    zero = type(kind, (), {"optimizer": optimizer, **attributes})()
    return SimpleNamespace(module=module, optimizer=zero)


def test_the_supported_version_is_the_pinned_and_installed_one():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"deepspeed=={SUPPORTED}" in project["dependencies"]
    assert version("deepspeed") == SUPPORTED


@pytest.mark.parametrize("kind", ["DeepSpeedZeroOptimizer_Stage3", "DeepSpeedZeroOptimizer", "BF16_Optimizer"])
def test_a_missing_attribute_is_named(kind):
    with pytest.raises(EngineShapeError, match=rf"DeepSpeed {SUPPORTED}.*no attribute '\w+'.*adapt zero_state.py"):
        open_engine(engine(kind), 0, 1)


def test_a_partition_of_another_shape_is_named():
    made = engine(
        "DeepSpeedZeroOptimizer",
        single_partition_of_fp32_groups=[torch.zeros(4)],
        round_robin_bit16_groups=[[]],
        round_robin_bit16_offsets=[[0]],
    )
    made.optimizer.round_robin_bit16_groups = [list(made.module.parameters())]
    with pytest.raises(EngineShapeError, match="group 0 has 1 offsets"):
        open_engine(made, 0, 1)
    made.optimizer.round_robin_bit16_offsets = [[0, 6]]
    with pytest.raises(EngineShapeError, match="group 0's partitions are shorter than the group"):
        open_engine(made, 0, 1)
    made.optimizer.single_partition_of_fp32_groups = [torch.zeros(8)]
    pieces = list(open_engine(made, 0, 1).pieces(None, store=False))
    assert [(piece.name, piece.start, piece.end) for piece in pieces] == [("weight", 0, 6), ("bias", 0, 2)]


def test_an_unsupported_optimizer_is_refused():
    made = engine("DeepSpeedZeroOptimizer")
    type(made.optimizer).optimizer = torch.optim.Adagrad(made.module.parameters())
    with pytest.raises(UserError, match="optimizer Adagrad is not supported"):
        open_engine(made, 0, 1)


@pytest.mark.parametrize("numel", [0, 1, 3, 7, 8, 1000])
@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_equal_runs_tile_a_parameter(numel, world):
    runs = [equal_run(numel, rank, world) for rank in range(world)]
    assert [element for start, end in runs for element in range(start, end)] == list(range(numel))
