"""Under ZeRO-3 no rank ever holds the whole model while it is loaded: what is whole at a time.

A sharded model becomes whole in three places only: a module's own parameters between their creation and their
partitioning, what is gathered to be filled, and the bottleneck vectors' mean of the embedding. All are seen here by
counting, at every one of them, the elements of all parameters that are there. (Resident memory says less: at a size
that a test can load, what the allocator keeps is as large as the weights.)
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import deepspeed.ops
import pytest
import torch
from conftest import make_model
from deepspeed.runtime.zero import partition_parameters
from ranks import run_ranks
from transformers.integrations import HfDeepSpeedConfig

from lbr_dist.model.bottleneck import LbrModel
from lbr_dist.recipes import parse_recipe

WORLD = 4
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class Whole:
    """Counts the elements of all parameters that are not cut into partitions, where they can be most."""

    def __init__(self) -> None:
        self.most, self._made = 0, dict[int, weakref.ref[torch.nn.Parameter]]()

    def add(self, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            self._made[id(parameter)] = weakref.ref(parameter)

    def look(self) -> None:
        living = [p for p in (made() for made in self._made.values()) if p is not None]
        self.most = max(self.most, sum(p.data.numel() for p in living if p.data.numel() > 1))

    @contextmanager
    def watching(self) -> Iterator[None]:
        gather, create = partition_parameters.GatheredParameters.__enter__, partition_parameters.Init._post_init_method
        register = torch.nn.Module.register_parameter

        def counted_gather(context: Any) -> Any:
            result = gather(context)
            self.look()
            return result

        def counted_create(init: Any, module: torch.nn.Module) -> Any:
            self.look()
            return create(init, module)

        def counted_register(module: torch.nn.Module, name: str, parameter: Any) -> None:
            register(module, name, parameter)
            self.add(parameter)

        with (
            mock.patch.object(partition_parameters.GatheredParameters, "__enter__", counted_gather),
            mock.patch.object(partition_parameters.Init, "_post_init_method", counted_create),
            mock.patch.object(torch.nn.Module, "register_parameter", counted_register),
        ):
            yield


def load(rank: int, world: int, raws: list[dict[str, Any]]) -> dict[str, int]:
    """What is whole at a time while the last recipe's model is loaded; the others' warm up."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile for two minutes
    deepspeed.init_distributed("gloo", verbose=False)
    found: dict[str, int] = {}
    for raw in raws:
        alive, whole = HfDeepSpeedConfig(SETTINGS), Whole()
        with whole.watching():
            model = LbrModel.build(parse_recipe(raw, "test"), for_zero3=True)
        del alive
        sizes = [p.ds_numel for p in model.backbone.parameters()]
        assert all(p.ds_tensor.numel() == -(-p.ds_numel // world) for p in model.backbone.parameters())
        found = {"whole": whole.most, "total": sum(sizes), "largest": max(sizes)}
    return found


@pytest.mark.timeout(300)
def test_no_rank_holds_the_whole_model_while_loading(tmp_path: Path) -> None:
    raws = [
        {
            "stage": "generative",
            "output": "unused",
            "model": {"path": str(make_model(tmp_path / f"model-{hidden}", "llama", hidden=hidden, layers=layers))},
            "data": {"sets": [{"path": "unused"}], "max_x_tokens": 100, "max_y_tokens": 100},
            "bottleneck": {"tokens": 2},
            "batch": {"global_batch": 1},
            "duration": {"steps": 1},
        }
        for hidden, layers in ((32, 2), (512, 10))
    ]
    for found in run_ranks(load, WORLD, tmp_path, raws, timeout=240):
        assert found["total"] > 20e6
        assert found["whole"] == found["largest"]  # one matrix at a time
