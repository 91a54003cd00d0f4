"""Fifty steps in one go on one rank, and in four starts on 1, 2, 4 and 1 ranks under changing ZeRO stages: one curve.

Each start is stopped by SIGTERM and the next takes up its checkpoint. Float32; with SGD every step's loss is within
1e-5 of the uninterrupted run's, with AdamW within 1e-4; full and LoRA, the optimizer's state included.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_worker import train_with
from ranks import run_ranks
from training_runs import losses, make_set, recipe, train_all

from lbr_dist.errors import EXIT_RUN_AGAIN
from lbr_dist.logs import read_rows
from lbr_dist.training.audit import audit

pytestmark = pytest.mark.timeout(1800)
STEPS = 50
STARTS = [(1, "cpu", 12), (2, "zero2", 25), (4, "zero3", 37), (1, "zero2", STEPS)]
"""(ranks, DeepSpeed file, last step) of each start: 1 -> 2 -> 4 -> 1, and ZeRO-3 -> 2 -> 3 -> 2."""
SGD = {"name": "sgd", "lr": 0.3, "z_lr": 0.3, "weight_decay": 0}
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "sgd": ({"optim": SGD}, 1e-5),
    "adamw": ({}, 1e-4),
    "sgd-lora": ({"optim": SGD, "model": {"lora": {"r": 4}}}, 1e-5),
    "adamw-lora": ({"model": {"lora": {"r": 4}}}, 1e-4),
}


@pytest.fixture(scope="module")
def curves(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Each case's uninterrupted run, and the one that moved."""
    folder, model = tmp_path_factory.mktemp("curves"), tiny_model_dir("llama")
    data = make_set(folder / "data", model)
    common: dict[str, Any] = {"duration": {"epochs": None, "steps": STEPS}, "deepspeed": "zero0"}
    whole = {case: recipe(folder / case, model, data, **common, **extra) for case, (extra, _) in CASES.items()}
    moved = {case: {**raw, "output": str(folder / f"{case}-moved")} for case, raw in whole.items()}

    def start(world: int, function: Callable[..., Any], *arguments: Any) -> list[dict[str, Any]]:
        place = folder / f"ranks-{len(list(folder.glob('ranks-*')))}"
        place.mkdir()
        return run_ranks(function, world, place, *arguments, timeout=900)[0]

    assert start(1, train_all, list(whole.values())) == [{"step": STEPS, "code": 0}] * len(CASES)
    for world, stage, last in STARTS:
        recipes = [{**raw, "deepspeed": stage} for raw in moved.values()]
        fault = "none" if last == STEPS else f"signal {last} {int(signal.SIGTERM)}"
        code = 0 if last == STEPS else EXIT_RUN_AGAIN
        assert start(world, train_with, fault, recipes) == [{"step": last, "code": code}] * len(CASES)
    return {case: (whole[case], moved[case]) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_the_curve_goes_on_at_other_world_sizes_and_stages(
    curves: dict[str, tuple[dict[str, Any], dict[str, Any]]], case: str
) -> None:
    whole, moved = (losses(raw["output"]) for raw in curves[case])
    rates = [[row["lr"] for row in read_rows(Path(raw["output"]) / "metrics.jsonl")] for raw in curves[case]]
    assert rates[0] == rates[1] != rates[0][:1] * STEPS
    assert len(whole) == len(moved) == STEPS
    assert sum(whole[-5:]) < 0.95 * sum(whole[:5]), "nothing was learned"
    for step, (expected, found) in enumerate(zip(whole, moved, strict=True), start=1):
        assert abs(found - expected) <= CASES[case][1] * expected, f"step {step}: {found} instead of {expected}"
    history = audit(curves[case][1]["output"])
    assert (history.problems, history.steps, history.attempts) == ([], STEPS, len(STARTS))
