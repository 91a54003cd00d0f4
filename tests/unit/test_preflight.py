"""What ranks tell each other about their set-up before a model is loaded; real ranks: tests/distributed/test_train.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training_runs import make_set, recipe

from lbr_dist.environment import Environment
from lbr_dist.recipes import parse_recipe
from lbr_dist.training.ds_config import Regime
from lbr_dist.training.preflight import check, disagreement, same_everywhere


def test_ranks_must_agree_on_what_deepspeed_is_given(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    """A file of the same name with another content; the disk of an offload may be each machine's own."""
    raw = recipe(tmp_path / "run", tiny_model_dir(), make_set(tmp_path / "set", tiny_model_dir()))
    job = check(parse_recipe(raw, "test"), Environment(0, 2, 0, 2, None, "test"))

    def with_zero(**zero: Any) -> dict[str, str]:
        config = {**job.regime.config, "zero_optimization": {"stage": 3, **zero}}
        return same_everywhere(dataclasses.replace(job, regime=Regime("mine.json", config)))

    one, two = ({"device": "nvme", "nvme_path": path} for path in ("/disk1", "/disk2"))
    assert disagreement([with_zero(offload_param=one), with_zero(offload_param=two)]) == ""
    problem = disagreement([with_zero(overlap_comm=False), with_zero(overlap_comm=True)])
    assert "(DeepSpeed file: zero_optimization.overlap_comm is True and not False)" in problem
