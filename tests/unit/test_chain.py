"""A run that is to begin with another's weights: what is wrong with it is told before the other begins."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_runs import make_set, recipe

from lbr_dist.environment import Environment
from lbr_dist.errors import UserError
from lbr_dist.recipes import load_recipe
from lbr_dist.training.chain import check_ahead, load_next
from lbr_dist.training.preflight import Job, check

ENVIRONMENT = Environment(0, 1, 0, 1, None, "test")


@pytest.fixture
def job(tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """Makes a job of stage 1, followed by a stage 2 with these sections."""
    inputs = tiny_model_dir(), make_set(tmp_path / "set", tiny_model_dir())
    monkeypatch.chdir(tmp_path)
    wider = Path(shutil.copytree(inputs[0], "wider")) / "config.json"
    wider.write_text(json.dumps({**json.loads(wider.read_text()), "hidden_size": 64}))
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(recipe(tmp_path / "one", *inputs)))

    def made(**sections: Any) -> Job:
        (tmp_path / "two.yaml").write_text(yaml.safe_dump(recipe(tmp_path / "two", *inputs, "contrastive", **sections)))
        one = load_recipe(tmp_path / "one.yaml")
        return check(one, ENVIRONMENT, then=load_next(one, "one.yaml", str(tmp_path / "two.yaml")))

    return made


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"sets": [{"path": "nowhere"}]}}, "nowhere: not a prepared set"),
        ({"model": {"path": "./nowhere"}}, "nowhere"),
        ({"deepspeed": "mine.json"}, "mine.json"),
        ({"model": {"path": "wider"}}, "hidden_size was 32 and is 64"),
        ({"data": {"max_x_tokens": 600}}, "512 positions"),
        ({"batch": {"global_batch": 1}}, "a pair alone has no negatives"),
    ],
)
def test_what_the_next_run_names_is_there_before_this_one_begins(
    job: Callable[..., Job], sections: dict[str, Any], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = job(**sections)
    told = re.escape(f"the run after this one, {tmp_path}/two, could not start: ") + ".*" + re.escape(message)
    with pytest.raises(UserError, match=told):
        check_ahead(made, resumes=False)
    assert not (tmp_path / "two").exists()
    with caplog.at_level(logging.WARNING, "lbr"):
        check_ahead(made, resumes=True)  # a run that is half done goes on
    assert re.search(told, caplog.text)


def test_weights_that_are_still_to_be_made_are_not_asked_for(job: Callable[..., Job], tmp_path: Path) -> None:
    made = job(model={"start_from": "elsewhere"})
    assert made.then is not None
    assert made.then.model.start_from == str(tmp_path / "one")
    check_ahead(made, resumes=False)
    with pytest.raises(UserError, match="one"):
        check(made.then, ENVIRONMENT)


def test_a_run_that_is_there_already_is_another_one(job: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "thesis.txt").touch()
    with pytest.raises(UserError, match="two: is not empty and holds no run"):
        check_ahead(job(), resumes=False)


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        ({"r": 4}, None, "model.lora is not set, and it is in one.yaml"),
        (None, {"r": 4}, "model.lora is set, and it is not in one.yaml"),
        ({"r": 4}, {"r": 8, "alpha": 64}, "model.lora has r 8, and r 4 in one.yaml"),
        (
            {"train_modules": ["embed_tokens"]},
            {},
            "model.lora has train_modules [], and train_modules ['embed_tokens']",
        ),
        ({"target_modules": ["q_proj"]}, {"target_modules": ["k_proj"]}, "has target_modules ['k_proj'], and"),
        ({"target_modules": ["q_proj"]}, {"target_modules": ["self_attn.q_proj", "q_proj"]}, ""),
        ({"target_modules": ["q_proj"]}, {}, ""),
    ],
)
def test_adapters_are_those_of_the_weights(
    one: dict[str, Any] | None, two: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    for stage, lora in (("generative", one), ("contrastive", two)):
        raw = recipe(tmp_path / stage, tmp_path, tmp_path, stage, model={"lora": lora})
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(raw))
    first = load_recipe(tmp_path / "generative.yaml")
    with pytest.raises(UserError, match=re.escape(message)) if message else contextlib.nullcontext():
        load_next(first, "one.yaml", str(tmp_path / "contrastive.yaml"))
