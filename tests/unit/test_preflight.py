"""What is checked before a model is loaded; with real ranks: tests/distributed/test_train.py."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import make_set, recipe

from lbr_dist.environment import Environment
from lbr_dist.errors import UserError
from lbr_dist.recipes import parse_recipe
from lbr_dist.training.ds_config import Regime
from lbr_dist.training.position import choose
from lbr_dist.training.preflight import check, disagreement, same_everywhere
from lbr_dist.training.run_folder import claim

ENVIRONMENT = Environment(0, 2, 0, 2, None, "test")


@pytest.fixture
def raw(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> dict[str, Any]:
    return recipe(tmp_path / "run", tiny_model_dir(), make_set(tmp_path / "set", tiny_model_dir()))


def test_ranks_must_agree_on_what_deepspeed_is_given(raw: dict[str, Any]) -> None:
    """A file of the same name with another content; the disk of an offload may be each machine's own."""
    job = check(parse_recipe(raw, "test"), ENVIRONMENT)

    def with_zero(**zero: Any) -> dict[str, str]:
        config = {**job.regime.config, "zero_optimization": {"stage": 3, **zero}}
        return same_everywhere(dataclasses.replace(job, regime=Regime("mine.json", config)))

    one, two = ({"device": "nvme", "nvme_path": path} for path in ("/disk1", "/disk2"))
    assert disagreement([with_zero(offload_param=one), with_zero(offload_param=two)]) == ""
    problem = disagreement([with_zero(overlap_comm=False), with_zero(overlap_comm=True)])
    assert "(DeepSpeed file: zero_optimization.overlap_comm is True and not False)" in problem


def test_a_folder_that_another_start_took_since_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    """Two starts look into the same new folder; the second one gets the lock when the first one is done."""
    late = check(parse_recipe(raw, "test"), ENVIRONMENT)
    claim(parse_recipe({**raw, "optim": {"lr": 1.0}}, "test"))
    assert check(parse_recipe(raw, "test"), ENVIRONMENT)  # a start that made no step leaves nothing to lose
    (tmp_path / "run" / "audit").mkdir()
    (tmp_path / "run" / "audit" / "rank-1.jsonl").write_text('{"start":0}\n{"step":0,"epoch":0,"ids":[]}\n')
    with pytest.raises(UserError, match=r"holds another run \(optim\.lr was 1\.0 and is 0\.003"):
        choose(late, "auto")


def test_a_model_folder_that_lies_about_is_not_resumed_from(
    raw: dict[str, Any], tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new run, started beside a folder model/ of another model."""
    shutil.copytree(tiny_model_dir("qwen2"), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    check(parse_recipe(raw, "test"), ENVIRONMENT)
