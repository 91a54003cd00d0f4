"""The model under ZeRO-3 on two gloo ranks: one SGD step equals plain torch on the whole batch in one process.

Everything is sharded (persistence threshold 0), so a weight that is used outside the module that owns it would be
empty. Each rank's second micro-batch is real on one rank and a dummy on the other.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks

from lbr_dist.model.bottleneck import LbrModel
from lbr_dist.model.layout import Sample, pack
from lbr_dist.objectives.generative import generative_loss
from lbr_dist.recipes import parse_recipe

WORLD = 2
RATE = 0.5
DUMMY = [Sample([3], 1)]
MICROS = [
    [[Sample([5, 6, 7], 1, [8, 9]), Sample([], 2, [3])], [Sample([9] * 9, 2, [10] * 5), Sample([4], 1, [4])]],
    [[Sample([40, 41], 2, [42] * 7)], DUMMY],
]
JOBS = [
    {"family": "llama", "tied": True, "task": "generate"},
    {"family": "llama", "tied": True, "task": "embed"},
    {"family": "mistral", "tied": False, "task": "generate"},
    {"family": "qwen3", "tied": False, "task": "generate"},
    {"family": "qwen2", "tied": False, "task": "embed"},
    {"family": "qwen2", "tied": True, "task": "generate", "model": {"activation_checkpointing": True}},
    {"family": "llama", "tied": False, "task": "generate", "model": {"lora": {"r": 4}}},
]


def recipe_of(job: dict[str, Any]) -> Any:
    return parse_recipe(
        {
            "stage": "generative",
            "output": "unused",
            "model": {"path": job["path"], **job.get("model", {})},
            "data": {"sets": [{"path": "unused"}], "max_x_tokens": 100, "max_y_tokens": 100},
            "bottleneck": {"tokens": 2},
            "batch": {"global_batch": 1},
            "duration": {"steps": 1},
        },
        "test",
    )


def micro_loss(model: torch.nn.Module, samples: list[Sample], task: str) -> torch.Tensor:
    """Loss whose gradients, summed over micro-batches and averaged over ranks, are the step's."""
    batch = pack(samples, bottleneck_vectors=2, hide_x=True)
    if task == "generate":
        tokens = sum(len(s.y) for rank in MICROS for micro in rank for s in micro)
        return generative_loss(model, batch, target_tokens=tokens, world_size=WORLD).backward
    vectors_SD = model(batch, "embed")
    weight_D = torch.linspace(-1, 1, vectors_SD.shape[1])
    return (vectors_SD * weight_D).sum() * (0.0 if samples is DUMMY else WORLD / 10)


def single_process(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    model = LbrModel.build(recipe_of(job)).train()
    for rank in MICROS:
        for micro in rank:
            (micro_loss(model, micro, job["task"]) / WORLD).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE).step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def ranked(rank: int, world: int, jobs: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    import deepspeed
    import deepspeed.ops
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile for two minutes
    deepspeed.init_distributed("gloo", verbose=False)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # the default is 1.0
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    results = []
    for job in jobs:
        alive = HfDeepSpeedConfig(settings)
        model = LbrModel.build(recipe_of(job), for_zero3=True).train()
        del alive
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        assert all(p.ds_tensor.numel() < p.ds_numel for p in model.parameters())
        for i, micro in enumerate(MICROS[rank]):
            engine.set_gradient_accumulation_boundary(i == len(MICROS[rank]) - 1)
            engine.backward(micro_loss(engine, micro, job["task"]))
        engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            results.append({name: p.detach().clone() for name, p in model.named_parameters()})
        engine.destroy()
    return results


@pytest.mark.timeout(300)
def test_one_step_under_zero3_equals_one_process(tmp_path, tiny_model_dir):
    jobs = [{**job, "path": str(tiny_model_dir(job["family"], job["tied"]))} for job in JOBS]
    results = run_ranks(ranked, WORLD, tmp_path, jobs, timeout=240)
    for number, job in enumerate(jobs):
        before = dict(LbrModel.build(recipe_of(job)).named_parameters())
        expected = single_process(job)
        moved = 0.0
        for rank in range(WORLD):
            got = results[rank][number]
            assert got.keys() == expected.keys()
            for name, parameter in expected.items():
                difference = float((got[name] - parameter).abs().max())
                assert difference < 1e-5, f"{job}: {name} is off by {difference}"
                moved = max(moved, float((before[name] - parameter).abs().max()))
        assert moved > 0.01
