"""DeepSpeed's JSON against the recipe: what is filled in, what is refused."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.config import Recipe
from lbr_dist.errors import UserError
from lbr_dist.recipes import parse_recipe
from lbr_dist.training.ds_config import FOLDER, decided, load_regime, resolve


def make(**sections: Any) -> Recipe:
    raw: dict[str, Any] = {
        "stage": "generative",
        "output": "run",
        "model": {"path": "model"},
        "data": {"sets": [{"path": "set"}]},
        "batch": {"global_batch": 32},
        "duration": {"steps": 1},
    }
    return parse_recipe(raw | sections, "test")


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.json")))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shipped_files_have_no_auto_left(name: str, dtype: str) -> None:
    recipe = make(deepspeed=name, model={"path": "m", "dtype": dtype}, optim={"clip": 0.7})
    if (name, dtype) == ("zero0", "bfloat16"):
        with pytest.raises(UserError, match=r"zero0\.json: .*stage is 0, .*dtype = bfloat16 .*use stage 1"):
            load_regime(recipe, world=2, cuda=True)
        return
    regime = load_regime(recipe, world=2, cuda=True)
    assert "auto" not in json.dumps(regime.config)
    assert regime.config["gradient_clipping"] == 0.7
    assert regime.config["bf16"]["enabled"] is (dtype == "bfloat16")
    assert regime.config["train_micro_batch_size_per_gpu"] == regime.config["gradient_accumulation_steps"] == 1


def test_auto_chooses_by_machine() -> None:
    def chosen(world: int, cuda: bool, dtype: str = "float32") -> str:
        return load_regime(make(model={"path": "m", "dtype": dtype}), world=world, cuda=cuda).name

    assert chosen(8, True) == "zero3"
    assert chosen(2, False) == "cpu"
    for cuda in (True, False):  # one process has nothing to partition, and stage 3's hooks on every module cost time
        assert chosen(1, cuda) == "zero0"
        assert chosen(1, cuda, "bfloat16") == "zero2"


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"gradient_clipping": 0.5}, ["gradient_clipping is 0.5", "optim.clip = 1.0"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled is true", "model.dtype = float32"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "model.dtype"]),
        ({"train_batch_size": 64}, ["train_batch_size is 64", "batch.global_batch = 32"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["train_micro_batch_size_per_gpu is 4", "batch.micro_tokens"]),
        ({"gradient_accumulation_steps": 8}, ["gradient_accumulation_steps is 8", "batch.global_batch"]),
        ({"optimizer": {"type": "SGD"}}, ["optimizer.type", "optim.name = adamw"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, ["optimizer.params.lr is 0.1", "optim.lr = 0.0001"]),
        ({"gradient_allreduce_op": "sum"}, ['gradient_allreduce_op is "sum"', "averaged over ranks"]),
        ({"prescale_gradients": True}, ["prescale_gradients is true", "averaged after they are summed"]),
        ({"hybrid_engine": {"enabled": True}}, ["hybrid_engine.enabled is true", "training alone"]),
        ({"communication_data_type": "fp16"}, ['communication_data_type is "fp16"', "model.dtype = float32"]),
        ({"zero_optimization": {"zenflow": {}}}, ["zero_optimization.zenflow is {}", "optim.name = adamw"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler.type", "optim.schedule = cosine"]),
    ],
)
def test_a_contradiction_names_both(given: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(UserError) as error:
        resolve(given, make(), "mine.json", cuda=True)
    for name in ["mine.json", *names]:
        assert name in str(error.value)


def nested(path: str, value: Any) -> dict[str, Any]:
    """`a.b` and a value as {"a": {"b": value}}."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("path", sorted(decided(make())))
def test_every_setting_that_the_recipe_owns_is_compared(path: str) -> None:
    """The same value or "auto" passes; any other is refused: file, setting, value and recipe's setting are named."""
    value, setting = decided(make())[path]
    for same in (value, "auto"):
        resolve(nested(path, same), make(), "mine.json", cuda=True)
    other = not value if isinstance(value, bool) else [0.5, 0.5] if isinstance(value, list) else 77
    with pytest.raises(UserError) as error:
        resolve(nested(path, other), make(), "mine.json", cuda=True)
    assert str(error.value).startswith(f"mine.json: {path} is {json.dumps(other)}, but the recipe has {setting}")


def test_the_documentation_says_when_to_use_each_file() -> None:
    guide = (FOLDER.parents[1] / "docs" / "training.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| \d \| (.+) \|$", guide, re.M))
    assert rows.keys() == {path.stem for path in FOLDER.glob("*.json")}


def test_agreement_and_auto_pass() -> None:
    given = {
        "train_batch_size": 32,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95]}},
        "scheduler": {"type": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    }
    config = resolve(given, make(), "mine.json", cuda=True)
    assert {"optimizer", "scheduler", "train_batch_size"}.isdisjoint(config)
    assert config["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"stage": 4}, ["zero_optimization.stage is 4", "0, 1, 2 or 3"]),
        ({"stage": "two"}, ['stage is "two"']),
        ({"stage": True}, ["stage is true", "0, 1, 2 or 3"]),
        ({"stage": 3, "offload_optimizer": "cpu"}, ['offload_optimizer is "cpu"', '{"device": "cpu"}']),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, ["offload_optimizer: DeepSpeed ignores it in stage 0"]),
        (
            {"stage": 2, "offload_param": {"device": "nvme"}},
            ["offload_param: DeepSpeed ignores it in stage 2", "stage 3"],
        ),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}, ["offload_optimizer.ratio is 0.3"]),
        ({"stage": 3, "zero_quantized_weights": True}, ["zero_quantized_weights: DeepSpeed has that on GPUs alone"]),
    ],
)
def test_values_that_do_not_work(zero: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        resolve({"zero_optimization": zero}, make(), "mine.json", cuda=False)
    for word in ["mine.json", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("given", "words"), [({"bf16": True}, "bf16 is true"), ({"data_types": "fp32"}, 'data_types is "fp32"')]
)
def test_sections_are_objects(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"^mine\.json: {words}: expected an object, or leave it out"):
        resolve(given, make(), "mine.json", cuda=True)
    assert resolve(dict.fromkeys(given, "auto"), make(), "mine.json", cuda=True)["bf16"]["enabled"] is False


def test_stage_one_adds_bfloat16_gradients_up_in_bfloat16() -> None:
    given = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
    bf16 = make(model={"path": "m", "dtype": "bfloat16"})
    with pytest.raises(UserError, match=r"mine\.json: data_types\.grad_accum_dtype is fp32.*deepspeed=zero2"):
        resolve(given, bf16, "mine.json", cuda=True)
    assert resolve(given, make(), "mine.json", cuda=True)["data_types"] == {"grad_accum_dtype": "fp32"}
    given["zero_optimization"] = {"stage": 2}
    assert resolve(given, bf16, "mine.json", cuda=True)["data_types"] == {"grad_accum_dtype": "fp32"}


def test_offload_to_none_is_none_in_every_stage() -> None:
    for stage, none in itertools.product(range(4), [{"device": "none", "ratio": 0.3}, {"pin_memory": True}]):
        zero = {"stage": stage, "offload_optimizer": none, "offload_param": none}
        assert resolve({"zero_optimization": zero}, make(), "mine.json", cuda=True)["zero_optimization"] == zero


def test_null_is_as_if_it_were_not_there() -> None:
    zero = {"stage": 2, "offload_optimizer": None, "offload_param": {}, "reduce_bucket_size": None}
    assert resolve({"zero_optimization": zero}, make(), "mine.json", cuda=False)["zero_optimization"] == {"stage": 2}


def test_no_pinned_memory_without_a_gpu() -> None:
    regime = load_regime(make(deepspeed="zero3_offload"), world=1, cuda=False)
    assert regime.config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


def test_files_that_are_not_there_or_broken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"zero33.*zero3_offload"):
        load_regime(make(deepspeed="zero33"), world=1, cuda=False)
    (tmp_path / "typo.json").write_text('{"zero_optimisation": {"stage": 3}}')
    with pytest.raises(UserError, match=r"typo\.json: expected an object with a zero_optimization section"):
        load_regime(make(deepspeed=str(tmp_path / "typo.json")), world=1, cuda=False)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken\.json: not a readable JSON"):
        load_regime(make(deepspeed=str(tmp_path / "broken.json")), world=1, cuda=False)
    (tmp_path / "twice.json").write_text('{"zero_optimization": {"stage": 3, "stage": 0}}')
    with pytest.raises(UserError, match=r"twice\.json: not a readable JSON file: stage is given twice: remove one"):
        load_regime(make(deepspeed=str(tmp_path / "twice.json")), world=1, cuda=False)
    (tmp_path / "windows.json").write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8-sig")
    assert load_regime(make(deepspeed=str(tmp_path / "windows.json")), world=1, cuda=False).stage == 2
