"""A run whose ranks are killed goes on bit for bit as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fault_trials import EXACT, Trials

from lbr_dist.training.audit import audit

pytestmark = pytest.mark.timeout(1800)
KILLS = 5
"""Of each of the four kinds; benchmarks/resume.py does more."""


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]) -> Trials:
    return Trials(tmp_path_factory.mktemp("faults"), tiny_model_dir("llama"), workers=1)


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("everybody", [False, True])
def test_killed_at_random_moments(trials: Trials, everybody: bool, saving: bool) -> None:
    """Twenty in all: one rank or all, at any moment from the start on or in the middle of a save."""
    name = f"killed-{everybody}-{saving}"
    assert trials.kill(name, KILLS, everybody=everybody, saving=saving) == EXACT
    assert audit(trials.folder / name).attempts > 1
