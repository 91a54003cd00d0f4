from __future__ import annotations

import pytest

from lbr_dist.environment import Environment, detect, first_host
from lbr_dist.errors import UserError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = {
    "SLURM_JOB_ID": "40017",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "64",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def test_nothing_set_is_a_single_process() -> None:
    assert detect({}) == Environment(0, 1, 0, 1, None, "single process")


def test_torchrun() -> None:
    assert detect(TORCHRUN) == Environment(3, 8, 1, 2, ("node7", 29500), "torchrun")


def test_torchrun_wins_over_the_slurm_step_it_runs_in() -> None:
    assert detect({**SRUN, **TORCHRUN}).source == "torchrun"


def test_srun() -> None:
    assert detect(SRUN) == Environment(5, 8, 1, 4, ("gpu03", 20_017), "srun, job 40017")


def test_srun_takes_a_given_meeting_point() -> None:
    assert detect({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}).master == ("10.0.0.1", 1234)


@pytest.mark.parametrize("step", [None, str(2**32 - 5), str(2**32 - 2)])
def test_a_batch_script_is_no_step(step: str | None) -> None:
    environ = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}
    assert detect(environ | ({"SLURM_STEP_ID": step} if step else {})).source == "single process"


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_variables_are_named(missing: str) -> None:
    environ = {key: value for key, value in TORCHRUN.items() if key != missing}
    with pytest.raises(UserError, match=f"not {missing}"):
        detect(environ)


def test_nonsense_is_named() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE='many' is not a number"):
        detect({**TORCHRUN, "WORLD_SIZE": "many"})
    with pytest.raises(UserError, match=r"rank 8 is outside of 0\.\.7"):
        detect({**TORCHRUN, "RANK": "8"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu03", "gpu03"),
        ("gpu[03-07,9],login", "gpu03"),
        ("rack[1-2]n[01-04]", "rack1n01"),
        ("a,b", "a"),
        ("rack2-n[1,5]-ib,x", "rack2-n1-ib"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
