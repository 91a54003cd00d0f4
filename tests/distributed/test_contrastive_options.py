"""Every contrastive option and the joint objective through the whole loop: what one process does, any ranks do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from test_train import cut_off, losses
from training_runs import make_set, recipe, train_all

from lbr_dist.logs import read_rows
from lbr_dist.training.audit import audit
from lbr_dist.training.checkpoint.weights import iterate_weights

pytestmark = pytest.mark.timeout(1200)
CUT = 2
OPTIONS = {
    "query_query": True,
    "passage_passage": True,
    "two_way": True,
    "matryoshka": {"dims": [32, 8], "weights": [2.0, 1.0]},
    "temperature": 0.2,
}
CASES: dict[str, dict[str, Any]] = {
    "learned": {"stage": "contrastive", "contrastive": OPTIONS | {"learn_temperature": {"lr": 0.05}}},
    "joint": {
        "stage": "joint",
        "joint": {"bins": 3, "weight": 0.2, "final_weight": 0.7, "schedule": "cosine"},
        "contrastive": OPTIONS | {"temperature_schedule": "linear", "final_temperature": 0.1},
    },
    "few": {"stage": "contrastive", "batch": {"global_batch": 2, "micro_tokens": 160}},  # fewer pairs than ranks
}
LAYOUTS = [(1, "zero0"), (2, "zero3"), (3, "zero2"), (4, "zero3")]
SGD = {"name": "sgd", "lr": 0.3, "z_lr": 0.3, "clip": 0, "weight_decay": 0, "schedule": "constant", "warmup": 0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]) -> dict[Any, dict[str, Any]]:
    """(case, ranks) to the recipe of a finished run of four steps."""
    folder, model = tmp_path_factory.mktemp("options"), tiny_model_dir("qwen3")
    models = {"few": tiny_model_dir("qwen3", tied=False)}  # whose head is frozen
    data = make_set(folder / "data", model)
    found: dict[Any, dict[str, Any]] = {}
    for world, regime in LAYOUTS:
        place = folder / f"world-{world}"
        place.mkdir()
        recipes = {
            name: recipe(
                place / name,
                models.get(name, model),
                data,
                deepspeed=regime,
                optim=SGD,
                duration={"epochs": None, "steps": 4},
                checkpoint={"every_steps": CUT, "keep_last": 9},
                **settings,
            )
            for name, settings in CASES.items()
        }
        for name, result in zip(recipes, run_ranks(train_all, world, place, list(recipes.values()))[0], strict=True):
            assert result == {"step": 4, "code": 0}, (name, result)
            found[name, world] = recipes[name]
    return found


def rows(raw: dict[str, Any]) -> list[dict[str, Any]]:
    return read_rows(Path(raw["output"]) / "metrics.jsonl")


@pytest.mark.parametrize("world", [world for world, _ in LAYOUTS[1:]])
@pytest.mark.parametrize("name", list(CASES))
def test_any_ranks_do_what_one_process_does(runs: dict[Any, dict[str, Any]], name: str, world: int) -> None:
    one, many = runs[name, 1], runs[name, world]
    assert losses(many["output"]) == pytest.approx(losses(one["output"]), rel=1e-5)
    expected = dict(iterate_weights(one["output"]))
    for weight_name, weight in iterate_weights(many["output"]):
        assert (weight - expected[weight_name]).norm() <= 1e-5 * (expected[weight_name].norm() + 1e-2), weight_name
    for found, wanted in zip(rows(many), rows(one), strict=True):
        same = {key for key in wanted if key.startswith(("gradient_norm", "loss", "masked", "temperature", "joint"))}
        assert {key: found[key] for key in same} == pytest.approx({key: wanted[key] for key in same}, rel=1e-4)
    assert audit(many["output"]).problems == []


def test_what_is_logged(runs: dict[Any, dict[str, Any]]) -> None:
    learned, joint = rows(runs["learned", 1]), rows(runs["joint", 1])
    terms = {f"gradient_norm_{term}" for term in ("passages", "query_query", "passage_passage", "8", "32")}
    assert terms | {"loss_8", "accuracy_32", "temperature"} <= learned[0].keys()
    assert learned[0]["temperature"] == pytest.approx(0.2)
    assert len({row["temperature"] for row in learned}) == 4
    assert [row["temperature"] for row in joint] == pytest.approx([0.2, 0.2 - 0.1 / 3, 0.1 + 0.1 / 3, 0.1])
    assert [row["joint_weight"] for row in joint] == pytest.approx([0.2, 0.325, 0.575, 0.7])
    for row in joint:
        mixed = (1 - row["joint_weight"]) * row["loss_generative"] + row["joint_weight"] * row["loss_contrastive"]
        assert row["loss"] == pytest.approx(mixed, rel=1e-5)
        assert row["gradient_norm_generative"] > 0


def test_both_plans_are_in_the_audit(runs: dict[Any, dict[str, Any]]) -> None:
    lines = (Path(runs["joint", 1]["output"]) / "audit" / "rank-0.jsonl").read_text().splitlines()
    first = next(row for row in map(json.loads, lines) if row.get("step") == 0)
    kinds = [id_.split(":")[0] for id_ in first["ids"]]
    assert kinds.count("c") == 11
    assert kinds.count("g") > 3


def test_a_resumed_run_goes_on_exactly(runs: dict[Any, dict[str, Any]], tmp_path: Path) -> None:
    """The joint run bit for bit on as many ranks, the learned temperature (a sharded parameter) on another number."""
    changed = {}
    for name in ("joint", "learned"):
        raw = runs[name, 2]
        changed[name] = {**raw, "output": cut_off(raw["output"], tmp_path / name, CUT)}
    for name, world in (("joint", 2), ("learned", 3)):
        place = tmp_path / f"ranks-{name}"
        place.mkdir()
        assert run_ranks(train_all, world, place, [changed[name]])[0][0] == {"step": 4, "code": 0}
    assert losses(changed["joint"]["output"]) == losses(runs["joint", 2]["output"])
    wanted = dict(iterate_weights(runs["joint", 2]["output"]))
    assert all(torch.equal(weight, wanted[name]) for name, weight in iterate_weights(changed["joint"]["output"]))
    temperatures = [row["temperature"] for row in rows(changed["learned"])]
    assert temperatures == pytest.approx([row["temperature"] for row in rows(runs["learned", 2])], rel=1e-5)


def with_zero_embedding(rank: int, world: int, recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last rank's first text of step 2 has a zero embedding."""
    from lbr_dist.training import steps

    real, seen = steps.contrastive_loss, [0]

    def faulty(embeddings: Any, batches: Any, *rest: Any, **more: Any) -> Any:
        seen[0] += 1
        if rank == world - 1 and seen[0] % 4 == 2:
            zeroed = torch.ones_like(embeddings[0])
            zeroed[0] = 0
            embeddings = [embeddings[0] * zeroed, *embeddings[1:]]
        return real(embeddings, batches, *rest, **more)

    with mock.patch.object(steps, "contrastive_loss", faulty):
        return train_all(rank, world, recipes)


def test_a_zero_embedding_stops_the_run_or_is_skipped(runs: dict[Any, dict[str, Any]], tmp_path: Path) -> None:
    skip = {**runs["learned", 2], "output": str(tmp_path / "skip"), "on_nan": "skip"}
    joint = {**runs["joint", 2], "output": str(tmp_path / "joint"), "on_nan": "skip"}
    stop = {**runs["learned", 2], "output": str(tmp_path / "stop"), "on_nan": "stop"}
    ranks = run_ranks(with_zero_embedding, 2, tmp_path, [skip, joint, stop])
    for skipped, also_skipped, stopped in ranks:
        assert skipped == also_skipped == {"step": 4, "code": 0}
        assert "step 2: loss nan" in stopped["error"]
        assert "1 embeddings are zero or not finite: " in stopped["error"]
        assert "(rank 1); the weights have diverged (lower optim.lr) or" in stopped["error"]
    named = ranks[0][2]["error"].split(" of sample ")[1].split(" ")[0]
    assert named in json.loads((tmp_path / "stop" / "bad-step-2-rank-1.json").read_text())["ids"]
    for raw in (skip, joint):
        assert [row["step"] for row in rows(raw) if row.get("skipped")] == [2]
        assert audit(raw["output"]).problems == []


def test_a_skipped_joint_step_leaves_no_gradient(runs: dict[Any, dict[str, Any]], tmp_path: Path) -> None:
    one_micro = {"batch": {"global_batch": 11, "micro_tokens": 4000}, "on_nan": "skip"}  # fails in the first backward
    recipes = [
        {**runs["joint", 1], **one_micro, "deepspeed": regime, "output": str(tmp_path / regime)}
        for regime in ("zero0", "zero3")
    ]
    assert run_ranks(with_zero_embedding, 1, tmp_path, recipes)[0] == [{"step": 4, "code": 0}] * 2
    plain, sharded = recipes
    assert [row.get("skipped", False) for row in rows(sharded)] == [False, True, False, False]
    for found, wanted in zip(rows(sharded)[2:], rows(plain)[2:], strict=True):
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    expected = dict(iterate_weights(plain["output"]))
    for name, weight in iterate_weights(sharded["output"]):
        assert (weight - expected[name]).norm() <= 1e-5 * (expected[name].norm() + 1e-2), name


def without_embeddings(rank: int, world: int, recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The model embeds everything as zero."""
    from lbr_dist.training import steps

    real = steps.contrastive_loss

    def zero(embeddings: Any, *rest: Any, **more: Any) -> Any:
        return real([0 * rows_SD for rows_SD in embeddings], *rest, **more)

    with mock.patch.object(steps, "contrastive_loss", zero):
        return train_all(rank, world, recipes)


def test_a_model_that_embeds_nothing_is_told_from_diverged_weights(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    model = tiny_model_dir("qwen3")
    stop = recipe(tmp_path / "stop", model, make_set(tmp_path / "data", model), "contrastive")
    skip = {**stop, "output": str(tmp_path / "skip"), "on_nan": "skip", "max_skips": 1}
    (results,) = run_ranks(without_embeddings, 1, tmp_path, [stop, skip])
    for result in results:
        assert f"before any update: model.path {model} itself gives no usable embedding)" in result["error"]
        assert "optim.lr" not in result["error"]


def test_the_first_step_without_any_negative_is_a_warning(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    model = tiny_model_dir("qwen3")
    raw = recipe(tmp_path / "run", model, make_set(tmp_path / "data", model), "contrastive")
    raw |= {"contrastive": {"margin": -2.5}, "duration": {"epochs": None, "steps": 2}}
    assert run_ranks(train_all, 2, tmp_path, [raw])[0] == [{"step": 2, "code": 0}]
    (told,) = [line for line in (tmp_path / "run/log.txt").read_text().splitlines() if "no query has" in line]
    assert "step 1: no query has a negative" in told
    assert "contrastive.margin leaves out 100% of the negatives" in told
