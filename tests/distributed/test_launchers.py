"""Two processes under torchrun, then two that only have the usual variables: one run, and one wandb run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import make_set, recipe

from lbr_dist.launch.ports import free_port
from lbr_dist.recipes import parse_recipe, save_recipe
from lbr_dist.training.audit import audit

pytestmark = pytest.mark.timeout(900)


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "WANDB_"))}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def test_torchrun_then_env_variables(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    model = tiny_model_dir("llama")
    raw = recipe(
        tmp_path / "run",
        model,
        make_set(tmp_path / "data", model),
        duration={"epochs": None, "steps": 2},
        tracking={"wandb_project": "lbr"},
    )
    save_recipe(parse_recipe(raw, "test"), tmp_path / "recipe.yaml")
    train = ["-m", "lbr_dist", "train", str(tmp_path / "recipe.yaml")]
    port = str(free_port())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    done = subprocess.run(
        [*launcher, *train], env=environment(), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, *train, "duration.steps=4"],
            env=environment(
                **{"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                OMPI_COMM_WORLD_LOCAL_RANK="7",  # left by an mpirun that started the shell
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        error = process.communicate(timeout=400)[1]
        assert process.returncode == 0, error[-3000:]

    log = (tmp_path / "run" / "log.txt").read_text()
    assert "2 ranks (torchrun), meeting at " in log
    assert f"2 ranks (env://), meeting at 127.0.0.1:{port}" in log
    assert "step-000002" in log.split("resuming from ")[1]
    found = audit(tmp_path / "run")
    assert (found.problems, found.steps, found.attempts) == ([], 4, 2)
    names = [path.name.rsplit("-", 1)[1] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(names) == 2
    assert len(set(names)) == 1, "the resumed run is another wandb run"
