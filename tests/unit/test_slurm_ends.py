"""How the job scripts end a job, and what they hand to their steps; Slurm's commands and the ranks are stand-ins."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lbr_dist.launch.slurm_answers import ANSWER_S, CONNECT_S

PROJECT = Path(__file__).parents[2]
STANDINS = {
    "scontrol": """
case "$1 $2" in
  "show hostnames") printf 'n1\\nn2\\n' ;;
  "show job")
    form=%H:%M # as `relative` has a time of today
    [ "${SLURM_TIME_FORMAT:-}" != standard ] || form=%FT%T
    echo "JobId=7 EndTime=$([ -e "$PLACE/limit" ] && date -d '13 seconds' "+$form" || echo Unknown)"
    ;;
  requeue*) echo "requeue $2" >>"$PLACE/calls"; [ ! -e "$PLACE/refuse" ] ;;
esac
""",
    "squeue": """
echo "squeue $*" >>"$PLACE/calls"
read -r away <"$PLACE/away"
[ "$away" = 0 ] || { echo $((away - 1)) >"$PLACE/away"; echo "slurm_load_jobs error" >&2; exit 1; }
cat "$PLACE/state"
""",
    "srun": """
echo "srun $*" >>"$PLACE/calls"
env | grep -oE '^(SLURM_|SRUN_|SQUEUE_|RANK|WORLD)[A-Z_]*' | sort | tr '\\n' ' ' >"$PLACE/environment"
while [[ $1 == --* ]]; do shift; done
exec "$@"
""",
    "python": """
case "$*" in
  *"slurm begin"*) echo 20000 20001 20002 20003; cat "$PLACE/resume" 2>/dev/null || true ;;
  *"slurm output"*) echo "$PLACE" ;;
  *"slurm end"*) echo "end $*" >>"$PLACE/calls"; cat "$PLACE/verdict" 2>/dev/null || echo requeue ;;
  *"lbr_dist train"*)
    if [ -e "$PLACE/wait" ]; then sleep 30 & fi
    trap 'kill %1; exit 75' TERM USR1
    touch "$PLACE/started"
    wait
    exit "$(cat "$PLACE/code" 2>/dev/null || echo 75)"
    ;;
  *"slurm check"*) [ ! -e "$PLACE/check" ] || { touch "$PLACE/started"; sleep 1; echo "done" >"$PLACE/check"; } ;;
  *"slurm_ray node"*) echo "error: no room" >&2; exit 2 ;;
  *"slurm_ray wait"*) cd "$PLACE/ray"; until [ -s nodes-7.code ]; do sleep 0.05; done; exit "$(cat nodes-7.code)" ;;
  *"lbr_dist prepare"* | *"lbr_dist eval"*) touch "$PLACE/started"; sleep 1 ;;
esac
""",
}


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a script in a job of two nodes; the ranks end with 75."""
    (tmp_path / "bin").mkdir()
    for name, body in STANDINS.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/usr/bin/env bash\n{body}")
        file.chmod(0o755)
    (tmp_path / "state").write_text("RUNNING\n")
    (tmp_path / "away").write_text("0\n")

    def start(script: str = "stage1.sh", *more: str, **environ: str) -> subprocess.Popen[str]:
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "8",
                 "SLURM_JOB_CPUS_PER_NODE": "8,6"}  # fmt: skip
        own = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PLACE": str(tmp_path), "LBR_HOME": str(PROJECT),
               "LBR_PYTHON": "python", "LAUNCHER": "srun", "LBR_REQUEUE_S": "0.01"}  # fmt: skip
        command = ["bash", str(PROJECT / "slurm" / script), "recipe.yaml", *more]
        return subprocess.Popen(command, env=slurm | own | environ, stderr=subprocess.PIPE, text=True)

    return start


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def calls(place: Path) -> list[str]:
    return (place / "calls").read_text().splitlines()


def test_a_controller_that_is_away_is_waited_for(job: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    (tmp_path / "away").write_text("3\n")
    running = job()
    running.communicate(timeout=60)
    assert running.returncode == 0
    assert "requeue 7" in calls(tmp_path)


@pytest.mark.parametrize("reason", ["refuse", "away"])
def test_a_requeue_that_fails_is_said_and_the_code_is_the_runs(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path, reason: str
) -> None:
    (tmp_path / reason).write_text("99\n")
    running = job()
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 75
    assert "Slurm did not requeue the job: submit the same line again" in errors


@pytest.mark.parametrize(("state", "code"), [("RUNNING", 0), ("COMPLETING", 143)])
def test_term_is_slurms_only_where_the_job_is_ending(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path, state: str, code: int
) -> None:
    """A node that shuts down sends it too, and then the job has to go on elsewhere."""
    (tmp_path / "wait").touch()
    running = job()
    wait_for(tmp_path / "started")
    (tmp_path / "state").write_text(f"{state}\n")
    running.send_signal(signal.SIGTERM)  # Slurm, or init, tells the ranks too
    subprocess.run(["pkill", "-TERM", "-P", str(running.pid)], check=False)
    running.communicate(timeout=60)
    assert running.returncode == code
    assert ("requeue 7" in calls(tmp_path)) is (code == 0)


def test_a_request_is_written_down_for_ranks_that_are_still_to_be_started(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """srun passes no signal on before it has started them, and torchrun's agent none at all."""
    (tmp_path / "wait").touch()
    running = job(SLURM_RESTART_COUNT="2")
    wait_for(tmp_path / "started")
    running.send_signal(signal.SIGUSR1)
    running.communicate(timeout=60)
    assert running.returncode == 0
    assert [file.name for file in (tmp_path / "asked").iterdir()] == ["7-2"]


def test_how_rays_nodes_ended_is_left_for_who_waits_for_them(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "nodes-7.code").write_text("")  # of an earlier start
    running = job(LAUNCHER="ray", SLURM_JOB_NODELIST="n1")
    running.communicate(timeout=60)
    assert (tmp_path / "ray" / "nodes-7.log").read_text() == "error: no room\n"
    assert any("end" in line and "--code 2" in line for line in calls(tmp_path))


def test_what_a_requeued_job_resumes_from_is_the_last_word(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "resume").write_text("auto\n")
    running = job()
    running.communicate(timeout=60)
    assert calls(tmp_path)[1].endswith("-m lbr_dist train recipe.yaml --resume auto")


def test_a_task_of_an_array_asks_for_itself(job: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    running = job(SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    running.communicate(timeout=60)
    assert "requeue 7_3" in calls(tmp_path)
    assert "requeue 7" not in calls(tmp_path)


def test_a_job_that_a_task_of_an_array_submitted_is_not_that_task(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """sbatch hands it the task's variables, and the task, another job, was requeued instead."""
    running = job(SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="3")
    running.communicate(timeout=60)
    assert "requeue 7" in calls(tmp_path)
    assert not [line for line in calls(tmp_path) if "5_3" in line]


def test_the_time_limit_is_read_however_the_user_has_times_shown(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "limit").touch()
    script = tmp_path / "script.sh"
    script.write_text('. "$LBR_HOME/slurm/lib.sh"\nrequeue_before_the_limit\n')
    began = time.monotonic()
    running = job(str(script), SLURM_TIME_FORMAT="relative", TZ="Asia/Tokyo")
    assert "not stopped in time" in running.communicate(timeout=60)[1]
    assert time.monotonic() - began > 2, "10 s before it, not at once"


@pytest.mark.parametrize(("said", "verdict", "code"), [(0, "complete", 0), (0, "stop", 1), (137, "mistake", 2)])
def test_how_a_run_ended_is_not_sruns_to_say(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path, said: int, verdict: str, code: int
) -> None:
    (tmp_path / "code").write_text(f"{said}\n")
    (tmp_path / "verdict").write_text(f"{verdict}\n")
    running = job()
    running.communicate(timeout=60)
    assert running.returncode == code
    assert f" --code {said} --output {tmp_path} recipe.yaml" in calls(tmp_path)[-1], "whatever the recipe says by now"


def test_a_python_that_talks_is_named(job: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    talking = tmp_path / "bin" / "talking"
    talking.write_text('#!/bin/sh\necho Activating\nexec python "$@"\n')
    talking.chmod(0o755)
    running = job(LBR_PYTHON=str(talking))
    said = running.communicate(timeout=60)[1]
    assert f"error: LBR_PYTHON={talking} prints more than it is asked for ('Activating')" in said
    assert running.returncode == 2


def test_a_site_file_may_end_with_what_is_false(job: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    (tmp_path / "mine.env").touch()
    (tmp_path / "site.env").write_text(
        f'. {PROJECT}/slurm/site.env\n. {tmp_path}/mine.env\n[ -f "{tmp_path}/none" ] && . "{tmp_path}/none"\n'
    )
    running = job(LBR_SITE=str(tmp_path / "site.env"))
    running.communicate(timeout=60)
    assert running.returncode == 0


def test_a_site_file_and_its_modules_may_ask_for_what_is_not_set(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Profiles, conda's and vendors' scripts do; the job scripts themselves may not."""
    own = 'export CACHE=$NOT_SET/cache LBR_MODULES=gcc\nmodule() { [ -z "$NOT_SET_EITHER" ]; }\n'
    (tmp_path / "site.env").write_text(f"{own}. {PROJECT}/slurm/site.env\n")
    script = tmp_path / "script.sh"
    script.write_text('. "$LBR_HOME/slurm/lib.sh"\n[[ $- == *e*u* ]] || exit 9\n')
    running = job(str(script), LBR_SITE=str(tmp_path / "site.env"))
    assert running.communicate(timeout=60)[1] == ""
    assert running.returncode == 0


def test_steps_have_what_they_say_and_not_what_the_job_asked_for(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """srun would take these for options of its own, and without the export pass nothing on."""
    asked = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS": "4", "SLURM_GPUS_PER_TASK": "1",
             "SLURM_EXPORT_ENV": "NONE", "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "4"}  # fmt: skip
    left = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "SLURM_MEM_PER_CPU": "100",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
        "SLURM_CPU_BIND_LIST": "0x1",
        "SLURM_MEM_BIND_TYPE": "local",
        "SLURM_GPU_BIND": "map:0",
        "SLURM_TRES_BIND": "gres/gpu:map:0",
        "SLURM_DISTRIBUTION": "cyclic",
        "SRUN_EXPORT_ENV": "NONE",
        "SRUN_CPUS_PER_TASK": "9",
        "SLURM_GPUS_PER_NODE": "9",
        "SLURM_NTASKS_PER_GPU": "9",
        "SLURM_THREADS_PER_CORE": "1",
        "SLURM_EXCLUSIVE": "user",
        "SLURM_CONSTRAINT": "none",
        "SLURM_TIMELIMIT": "1",
        "SLURM_LABELIO": "1",
        "SQUEUE_STATES": "PENDING",
    }  # of the shell that submitted, in a step of its own
    (tmp_path / "site.env").write_text(f"export SLURM_MEM_BIND=local\n. {PROJECT}/slurm/site.env\n")
    running = job(**asked, **left, SLURM_MEM_PER_NODE="8000", LBR_SITE=str(tmp_path / "site.env"))
    running.communicate(timeout=60)
    seen = set((tmp_path / "environment").read_text().split())
    assert seen & {*asked, *left, "SLURM_MEM_BIND"} == {"SLURM_GPUS_ON_NODE", "SLURM_MEM_BIND"}
    check, ranks = (line for line in calls(tmp_path) if line.startswith("srun"))
    assert "--gpus-per-node=2 --wait=300 --nodes=2 --ntasks=2 --ntasks-per-node=1 python" in check
    assert "--gpus-per-node=2 --wait=60 --nodes=2 --ntasks=4 --ntasks-per-node=2 --cpus-per-task=3 python" in ranks


def test_a_request_to_stop_does_not_end_the_check_of_the_nodes(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """The first node would call the others bad, and the job would not be requeued."""
    (tmp_path / "check").touch()
    running = job()
    wait_for(tmp_path / "started")
    running.send_signal(signal.SIGUSR1)
    running.communicate(timeout=60)
    assert any("end --code 75 --asked" in line for line in calls(tmp_path))
    assert (tmp_path / "check").read_text() == "done\n"


def test_a_node_that_hangs_in_the_check_does_not_hold_the_job(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """srun by itself waits for ever; but the first node must have its time to name another that ended at once."""
    running = job()
    running.communicate(timeout=60)
    waits = re.findall(r"--wait=(\d+) .*slurm check", (tmp_path / "calls").read_text())
    assert len(waits) == 1
    assert CONNECT_S + 2 * ANSWER_S < int(waits[0]) <= 600


@pytest.mark.parametrize("script", ["eval.sh", "prepare.sh"])
def test_what_cannot_stop_half_way_uses_the_time_it_has(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path, script: str
) -> None:
    """SBATCH_SIGNAL, meant for training, reaches every script."""
    running = job(script)
    wait_for(tmp_path / "started")
    running.send_signal(signal.SIGUSR1)
    running.communicate(timeout=60)
    assert running.returncode == 0


@pytest.mark.parametrize("there", [True, False])
def test_an_evaluation_that_is_repeated_leaves_its_export(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path, there: bool
) -> None:
    """The export would refuse the folder, after the whole evaluation."""
    out = tmp_path / "model"
    out.mkdir()
    if there:
        (out / "config.json").touch()
    running = job("eval.sh", "--data", "set", "--", str(out), "--tokens", "1")
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 0
    evaluation, *export = calls(tmp_path)
    assert evaluation.endswith("-m lbr_dist eval recipe.yaml --data set")
    assert [line.rpartition(" -m ")[2] for line in export] == (
        [] if there else [f"lbr_dist export recipe.yaml {out} --tokens 1"]
    )
    assert (f"lbr: {out} is there already: nothing is exported" in said) is there


@pytest.mark.parametrize("script", ["stage1.sh", "eval.sh"])
def test_a_python_without_the_package_is_named(job: Callable[..., subprocess.Popen[str]], script: str) -> None:
    """Nobody activated the environment; every other failure keeps its own code and words."""
    running = job(script, LBR_PYTHON="false")
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 2
    assert "error: LBR_PYTHON=false cannot run lbr_dist on n1, as said above: activate the environment" in errors


@pytest.mark.parametrize("option", ["--num-workers", "--output=x.log", "--res"])
def test_an_option_that_the_scripts_do_not_have_is_named(
    job: Callable[..., subprocess.Popen[str]], tmp_path: Path, option: str
) -> None:
    running = job("stage1.sh", "--resume=never", option, "2")
    said = running.communicate(timeout=60)[1]
    assert said.startswith(f"error: {option}: not an option of the job scripts: they take RECIPE [key=value ...]")
    assert said.count("\n") == 1
    assert running.returncode == 2
    assert not (tmp_path / "calls").exists()


def test_a_launcher_that_is_none_is_named_before_the_nodes_are_asked(job: Callable[..., subprocess.Popen[str]]) -> None:
    running = job(LAUNCHER="mpirun")
    said = running.communicate(timeout=60)[1]
    assert "error: LAUNCHER=mpirun: expected srun, torchrun or ray" in said
    assert "start 1" not in said
    assert running.returncode == 2


def test_a_number_of_ranks_that_is_none_is_named(job: Callable[..., subprocess.Popen[str]]) -> None:
    for number in ("two", "0"):
        running = job(LBR_RANKS_PER_NODE=number)
        assert f"error: LBR_RANKS_PER_NODE={number}: expected a whole number" in running.communicate(timeout=60)[1]
        assert running.returncode == 2
    running = job(LBR_RANKS_PER_NODE="7")  # srun would refuse the step, each time the job is requeued
    assert (
        "error: 7 ranks on each node, of which the job has 6 CPUs: ask for more" in running.communicate(timeout=60)[1]
    )
    assert running.returncode == 2
