"""Optimizer state and weights in host memory, or on a disk: the same training, and checkpoints that go anywhere.

With SGD the run must be that without offload to float32 rounding (AdamW would turn a rounding of a gradient near zero
into a step of full size); with AdamW it resumes bit for bit and reshards. Offload to disk compiles DeepSpeed's
operator (two minutes, once per machine) and needs libaio.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from ranks import run_ranks
from training_runs import cut_off, losses, make_set, recipe, train_all

from lbr_dist.errors import UserError
from lbr_dist.recipes import parse_recipe
from lbr_dist.training.checkpoint.weights import iterate_weights
from lbr_dist.training.ds_config import FOLDER, load_regime
from lbr_dist.training.preflight import check_nvme

pytestmark = pytest.mark.timeout(1800)
STEPS = {"epochs": None, "steps": 6}
KEEP = {"every_steps": 4, "keep_last": 9}
CONSTANT = {"schedule": "constant", "warmup": 0}  # so that a step's rate does not depend on the run's length
SGD = {**CONSTANT, "name": "sgd", "lr": 0.1, "z_lr": 0.1, "weight_decay": 0}


def train(folder: Path, world: int, recipes: list[dict[str, Any]]) -> None:
    here = folder / f"ranks-{len(list(folder.glob('ranks-*')))}"
    here.mkdir()
    for raw, result in zip(recipes, run_ranks(train_all, world, here, recipes, timeout=900)[0], strict=True):
        assert result.get("code") == 0, (raw["output"], result)


def check(folder: Path, model: Path, data: Path, offload: str) -> None:
    """Equal steps, exact resume, and another stage and world size in between."""
    common = {"duration": STEPS, "checkpoint": KEEP}
    plain = recipe(folder / "plain", model, data, deepspeed="zero3", optim=SGD, **common)
    same = {**plain, "output": str(folder / "same"), "deepspeed": offload}
    adamw = recipe(folder / "adamw", model, data, deepspeed=offload, optim=CONSTANT, **common)
    train(folder, 2, [plain, same, adamw])
    assert losses(same["output"]) == pytest.approx(losses(plain["output"]), rel=1e-5)
    expected = dict(iterate_weights(plain["output"]))
    for name, weight in iterate_weights(same["output"]):
        assert (weight - expected[name]).norm() <= 1e-5 * expected[name].norm(), name

    resumed = {**adamw, "output": cut_off(adamw["output"], folder / "resumed")}
    moved = {**adamw, "output": cut_off(adamw["output"], folder / "moved")}
    train(folder, 1, [{**moved, "deepspeed": "zero2", "duration": {"steps": 5}}])
    train(folder, 2, [resumed, moved])
    assert losses(resumed["output"]) == losses(adamw["output"])
    assert losses(moved["output"]) == pytest.approx(losses(adamw["output"]), rel=1e-4)
    weights = dict(iterate_weights(adamw["output"]))
    for name, weight in iterate_weights(resumed["output"]):
        assert torch.equal(weight, weights[name]), name


def test_offload_to_host_memory(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    model = tiny_model_dir("llama")
    check(tmp_path, model, make_set(tmp_path / "data", model), "zero3_offload")


def nvme(folder: Path) -> str:
    """The shipped file with a folder of this machine, and buffers for a small model."""
    settings = json.loads((FOLDER / "zero3_nvme.json").read_text())
    zero = settings["zero_optimization"]
    zero["sub_group_size"] = 700_000
    for part in ("offload_optimizer", "offload_param"):
        zero[part]["nvme_path"] = str(folder)
    zero["offload_param"]["buffer_size"] = 3_000_000
    (folder / "nvme.json").write_text(json.dumps(settings))
    return str(folder / "nvme.json")


def test_offload_to_a_disk(tmp_path: Path) -> None:
    """A model whose matrices reach DeepSpeed's smallest swappable size (1 MiB a rank), so that files are written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    offload = nvme(disk)
    model = make_model(tmp_path / "model", "llama", hidden=512)
    raw = recipe(tmp_path / "unused", model, tmp_path, deepspeed=offload)
    try:
        check_nvme(parse_recipe(raw, "test"), load_regime(parse_recipe(raw, "test"), world=2, cuda=False))
    except UserError as error:
        pytest.skip(str(error))
    check(tmp_path, model, make_set(tmp_path / "data", model), offload)
    for kind in ("optimizer", "float32params"):
        assert len(list(disk.glob(f"zero_stage_3/{kind}/rank*/*.swp"))) >= 8


def test_a_disk_that_is_not_there_and_a_missing_library_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_it(**model: Any) -> None:
        raw = recipe(tmp_path / "unused", tmp_path, tmp_path, deepspeed=str(tmp_path / "nvme.json"), model=model)
        parsed = parse_recipe(raw, "test")
        check_nvme(parsed, load_regime(parsed, world=1, cuda=False))

    nvme(tmp_path)
    for name in ("CC", "CXX", "CFLAGS", "LDFLAGS", "CPATH", "LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler
    with pytest.raises(UserError, match=r"libaio.*or offload to cpu"):
        check_it()
    with pytest.raises(UserError, match=r"frozen weights of model\.lora .* offload_param to cpu"):
        check_it(lora={"r": 2})
    shutil.copy(FOLDER / "zero3_nvme.json", tmp_path / "nvme.json")
    if not os.access("/local_nvme", os.W_OK):
        with pytest.raises(UserError, match=r"offload_optimizer\.nvme_path is /local_nvme, which is not a folder"):
            check_it()


def test_a_lock_that_a_killed_compiler_left_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would wait for it for ever."""
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda *_, **__: True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    parsed = parse_recipe(recipe(tmp_path / "unused", tmp_path, tmp_path, deepspeed=nvme(tmp_path)), "test")
    regime = load_regime(parsed, world=1, cuda=False)
    lock = tmp_path / "built" / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    check_nvme(parsed, regime)  # another start may be compiling
    os.utime(lock, (time.time() - 3600,) * 2)
    with pytest.raises(UserError, match=f"{lock}: is 60 minutes old, .* remove it"):
        check_nvme(parsed, regime)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/none")
    with pytest.raises(
        UserError, match=r"/proc/none.*: DeepSpeed cannot compile async_io there .*TORCH_EXTENSIONS_DIR"
    ):
        check_nvme(parsed, regime)
