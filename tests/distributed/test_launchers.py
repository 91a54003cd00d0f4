"""Two processes under torchrun, then two that only have the usual variables: one run, and one wandb run.

And a rank that does not come.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import make_set, recipe

from lbr_dist.environment import Environment
from lbr_dist.launch.ports import free_port
from lbr_dist.recipes import parse_recipe, save_recipe
from lbr_dist.training import session
from lbr_dist.training.audit import audit
from lbr_dist.training.engine import start_distributed
from lbr_dist.training.faults import ContactLostError
from lbr_dist.training.run import train

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


def test_a_rank_that_does_not_come(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "TOLD_S", 0.2)
    monkeypatch.setattr(session, "start_distributed", lambda here, _: start_distributed(here, 1.5))
    model = tiny_model_dir("llama")
    raw = recipe(tmp_path / "run", model, make_set(tmp_path / "data", model))
    master = "127.0.0.1", free_port()
    here = Environment(0, 2, 0, 1, master, "test")
    said = rf"^rank 0: the 2 ranks did not meet at {here.meeting} \(.*1/2 clients joined.*\): see the others' logs$"
    with pytest.raises(ContactLostError, match=said):
        train(parse_recipe(raw, "test"), environment=here)
    with socket.create_server(("", master[1])), pytest.raises(ContactLostError, match=r"set another MASTER_PORT$"):
        train(parse_recipe(raw, "test"), environment=here)
    alone = Environment(0, 1, 0, 1, master, "test")
    said = rf"^rank 0: the one rank did not meet at {here.meeting} \(.*\): set another MASTER_PORT$"
    with socket.create_server(("", master[1])), pytest.raises(ContactLostError, match=said):
        train(parse_recipe(raw, "test"), environment=alone)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"waiting for the other ranks to come to {here.meeting}, for 2400 s in all" in log
