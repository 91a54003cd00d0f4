"""The gradient of a global batch is that of one process, whatever the ranks, the ZeRO stage and the micro-batches.

One SGD step in float32 with a huge learning rate, so that the update is as large as the weights and its rounding is not
hidden: AdamW would hide a constant factor, and bfloat16 anything below a percent.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training_runs import make_set, recipe, train_all

from lbr_dist.training.checkpoint.weights import iterate_weights

pytestmark = pytest.mark.timeout(900)
STAGES = {0: "zero0", 2: "zero2", 3: "zero3"}
CASES = {
    "generative": {"batch": {"global_batch": 5}},  # 2 and 4 ranks: uneven, and with empty micro-batches
    "plain": {"batch": {"global_batch": 5}, "bottleneck": {"enabled": False, "tokens": None}},
    "contrastive": {},
    "direct": {"batch": {"global_batch": 11, "micro_tokens": 100_000}},  # one micro-batch: no gradient cache
    "recomputed": {"model": {"activation_checkpointing": True}},
    "recomputed-contrastive": {"model": {"activation_checkpointing": True}},
}
SAME_AS = {"recomputed": "generative", "recomputed-contrastive": "contrastive"}
"""Cases that must make the update of another case."""


def recipes_of(folder: Path, model: Path, data: Path) -> dict[tuple[str, int], dict[str, Any]]:
    return {
        (case, stage): recipe(
            folder / f"{case}-{stage}",
            model,
            data,
            "contrastive" if case == "direct" or case.endswith("contrastive") else "generative",
            deepspeed=name,
            optim={"name": "sgd", "lr": 20.0, "z_lr": 20.0, "clip": 0, "weight_decay": 0, "schedule": "constant"}
            | {"warmup": 0},
            duration={"epochs": None, "steps": 1},
            **sections,
        )
        for case, sections in CASES.items()
        for stage, name in STAGES.items()
    }


@pytest.fixture(scope="module")
def updates(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]
) -> dict[tuple[str, int, int], dict[str, torch.Tensor]]:
    """(case, stage, world) to the update of every parameter."""
    from lbr_dist.model.bottleneck import LbrModel
    from lbr_dist.recipes import parse_recipe

    folder, model = tmp_path_factory.mktemp("equality"), tiny_model_dir("qwen3")
    data = make_set(folder / "data", model)
    found = {}
    for world in (1, 2, 4):
        place = folder / f"world-{world}"
        place.mkdir()
        recipes = recipes_of(place, model, data)
        results = run_ranks(train_all, world, place, list(recipes.values()), timeout=600)
        for (case, stage), raw, ended in zip(recipes, recipes.values(), results[0], strict=True):
            assert ended == {"step": 1, "code": 0}, ended
            before = dict(LbrModel.build(parse_recipe(raw, "test")).named_parameters())
            found[case, stage, world] = {
                name: weight - before[name].detach() for name, weight in iterate_weights(raw["output"])
            }
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize("case", list(CASES))
def test_update_equals_one_process(
    updates: dict[tuple[str, int, int], dict[str, torch.Tensor]], case: str, stage: int, world: int
) -> None:
    expected, found = updates[SAME_AS.get(case, case), 0, 1], updates[case, stage, world]
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        assert update.norm() > 1e-3, f"{name} did not move"
        error = (found[name] - update).norm() / update.norm()
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
