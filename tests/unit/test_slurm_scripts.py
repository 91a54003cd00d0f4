"""What a Slurm job decides; the scripts themselves are run by tests/cluster."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from runs import write_manifest

from lbr_dist import cli
from lbr_dist.config import Recipe
from lbr_dist.environment import SlurmStart
from lbr_dist.errors import UserError
from lbr_dist.launch import ray_stage, slurm, torchrun
from lbr_dist.launch.ports import free_ports
from lbr_dist.launch.slurm import Attempt, begin, decide, end, main
from lbr_dist.launch.slurm_nodes import Node, findings, rounds
from lbr_dist.launch.slurm_ray import start_options
from lbr_dist.launch.slurm_words import left
from lbr_dist.launch.torchrun import combined
from lbr_dist.logs import read_rows
from lbr_dist.recipes import save_recipe
from lbr_dist.training.checkpoint.listing import progress
from lbr_dist.training.run import Outcome
from lbr_dist.training.run_folder import check_folder

PROJECT = Path(__file__).parents[2]
JOB = Attempt(SlurmStart(7, 0), nodes="n[1-2]", limit=3)


def commit(recipe: Recipe, step: int, sequence: int = 0) -> None:
    folder = Path(recipe.output) / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    write_manifest(folder, [], {}, step=step, sequence=sequence or step)


@pytest.mark.parametrize(
    ("code", "asked", "requeue"),
    [(0, False, False), (0, True, False), (2, False, False), (2, True, False), (75, True, True), (75, False, True),
     (1, False, True), (137, False, True), (138, True, True)],
)  # fmt: skip
def test_what_a_restart_can_mend_is_requeued(code: int, asked: bool, requeue: bool) -> None:
    assert decide(code, asked=asked, idle=1, limit=3).requeue is requeue


@pytest.mark.parametrize("code", [1, 75])
def test_no_progress_stops_after_the_set_number_of_restarts(recipe: Recipe, code: int) -> None:
    decisions = []
    for restart in range(4):
        attempt = Attempt(SlurmStart(7, restart), "n1", limit=3)
        begin(recipe, attempt)
        decisions.append(end(recipe, attempt, code, asked=False).requeue)
    assert decisions == [True, True, True, False]


def test_a_mistake_that_srun_does_not_report_is_one(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank hung and was killed: srun says 137."""
    run = Path(recipe.output)
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def end_of_a_rank() -> None:
        with pytest.raises(UserError, match="loss nan"), left(run):
            raise UserError("loss nan")

    end_of_a_rank()
    assert not run.exists(), "no job of the scripts"
    begin(recipe, JOB)
    with pytest.raises(RuntimeError), left(run):
        raise RuntimeError
    assert end(recipe, JOB, 137, asked=False).requeue
    end_of_a_rank()
    assert not end(recipe, JOB, 137, asked=False).requeue
    assert end(recipe, Attempt(SlurmStart(7, 1), "n1", limit=3), 137, asked=False).requeue
    assert check_folder(recipe, resume="auto") == [], "the next start may go on"


def test_that_a_run_is_complete_is_its_own_word(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun says 0 where the job goes on without a node that it lost, and the job was a success."""
    file, later = tmp_path / "recipe.yaml", Attempt(SlurmStart(7, 1), "n1", limit=3)
    save_recipe(recipe, file)
    begin(recipe, JOB)
    assert end(recipe, JOB, 0, asked=False).requeue
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(sys, "argv", ["lbr", "train", str(file)])
    for step in (1, 2):
        ended = Outcome(Path(recipe.output), step, total_steps=2)
        monkeypatch.setattr("lbr_dist.training.run.train", lambda *_, ended=ended, **__: ended)
        with pytest.raises(SystemExit):
            cli.main()
        assert (end(recipe, JOB, 0, asked=False).verdict == "complete") is (step == 2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for code in (75, 0):
        assert end(recipe, later, 0, asked=False).verdict != "complete"
        monkeypatch.setattr(ray_stage, "run_stage", lambda *_, code=code, **__: code)
        ray_stage.main("generative", [str(file)])
    assert end(recipe, later, 0, asked=False).verdict == "complete"


def test_starts_that_had_no_end_count_too(recipe: Recipe) -> None:
    """A node that takes the job with it leaves no word."""
    for restart in range(4):
        begin(recipe, Attempt(SlurmStart(7, restart), "n1", limit=3))
    with pytest.raises(UserError, match="job 7: 4 starts without a new checkpoint"):
        begin(recipe, Attempt(SlurmStart(7, 4), "n1", limit=3))
    begin(recipe, Attempt(SlurmStart(8, 0), "n1", limit=3))  # somebody looked, and submitted it anew


def test_progress_starts_the_count_again(recipe: Recipe) -> None:
    for restart in range(12):
        attempt = Attempt(SlurmStart(7, restart), "n1", limit=3)
        begin(recipe, attempt)
        if restart % 3 == 2:
            commit(recipe, restart)
        assert end(recipe, attempt, 1, asked=False).requeue
    assert progress(recipe.output) == (11, 11)


@pytest.mark.parametrize(
    ("there", "resume", "told"),
    [(True, "/run/step-350", ["/run/step-350", "/run/step-350", "auto"]), (False, "never", ["never", "auto", "auto"]),
     (True, "never", ["never", "never", "auto"]), (True, "auto", ["auto"] * 3)],
)  # fmt: skip
def test_a_requeued_job_goes_on_from_its_own_checkpoint(
    recipe: Recipe, there: bool, resume: str, told: list[str]
) -> None:
    """Each start would begin at --resume again; `never` would refuse the run that the job itself has begun."""
    if there:
        commit(recipe, 500, sequence=4)
    begin(recipe, Attempt(SlurmStart(6, 0), "n1", limit=3))  # another job's start, which says nothing about this one's
    heard = [begin(recipe, Attempt(SlurmStart(7, restart), "n1", limit=3), resume) for restart in range(2)]
    commit(recipe, 400, sequence=5)
    assert [*heard, begin(recipe, Attempt(SlurmStart(7, 2), "n1", limit=3), resume)] == told


def test_a_run_that_went_back_makes_progress_from_there(recipe: Recipe) -> None:
    commit(recipe, 500, sequence=4)
    for restart in range(4):
        attempt = Attempt(SlurmStart(7, restart), "n1", limit=3)
        begin(recipe, attempt, "/run/step-350")
        commit(recipe, 360 + 10 * restart, sequence=5 + restart)
        assert end(recipe, attempt, 1, asked=False).requeue


def test_newest_is_what_was_committed_last_and_damage_is_passed_over(recipe: Recipe) -> None:
    assert progress(recipe.output) == (0, 0)
    commit(recipe, 500, sequence=4)
    commit(recipe, 350, sequence=5)
    commit(recipe, 900, sequence=9)
    for damage in ('{"step": 9', "[]", "{}", '{"step": null, "sequence": 9}'):
        (Path(recipe.output) / "checkpoints" / "step-000900" / "manifest.json").write_text(damage)
        assert progress(recipe.output) == (5, 350)


def test_a_row_torn_by_a_crash_is_left_behind(recipe: Recipe) -> None:
    begin(recipe, JOB)
    with (Path(recipe.output) / slurm.HISTORY).open("a") as file:
        file.write('{"event": "sta')
    end(recipe, JOB, 1, asked=False)
    assert [row["event"] for row in read_rows(Path(recipe.output) / "slurm.jsonl")] == ["start", "end"]


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(recipe: Recipe) -> None:
    Path(recipe.output).parent.joinpath("run").write_text("a file")
    with pytest.raises(UserError, match=r"slurm\.jsonl: cannot be written on"):
        begin(recipe, JOB)


def test_jobs_and_attempts_look_for_ports_at_different_places() -> None:
    ports = {(job, restart): free_ports(4, SlurmStart(job, restart)) for job in (1, 2) for restart in (0, 1)}
    assert len({port for found in ports.values() for port in found}) == 16
    assert all(20_000 <= port < 32_000 for found in ports.values() for port in found)


def test_a_taken_port_is_passed_over_and_a_wanted_one_refused() -> None:
    first = free_ports(1, JOB.start)[0]
    with socket.create_server(("", first)):
        assert free_ports(1, JOB.start)[0] != first
        with pytest.raises(UserError, match=f"MASTER_PORT={first}: taken"):
            free_ports(1, JOB.start, str(first))
    for wrong in ("0", "65536", "99999", "x", "²"):
        with pytest.raises(UserError, match=f"MASTER_PORT={wrong}: is no port"):
            free_ports(1, JOB.start, wrong)
    assert free_ports(2, JOB.start, str(first))[0] == first


def test_command_line(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    save_recipe(recipe, file)
    assert main(["begin", str(file)]) == 2
    assert "SLURM_JOB_ID is not set" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert main(["begin", "--stage", "contrastive", str(file)]) == 2
    assert "submit slurm/stage1.sh" in capsys.readouterr().err
    assert main(["begin", "--stage", "generative", "--ports", "3", str(file), "seed=1"]) == 0
    assert len(capsys.readouterr().out.split()) == 3
    with pytest.raises(SystemExit, match="2"):
        main(["begin", str(file), "--resume"])
    assert capsys.readouterr().err == "slurm: error: argument --resume: expected one argument\n"
    assert main(["begin", str(file), "seed=1", "--resume", "never"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["auto"]
    assert main(["begin", str(file), "--resume=/run/step-350"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main(["end", "--code", "75", "--asked", str(file)]) == 0
    assert capsys.readouterr().out == "requeue\n"
    assert main(["end", "--code", "2", str(file)]) == 0
    assert capsys.readouterr().out == "mistake\n"
    assert main(["end", "--code", "1", "--output", str(tmp_path / "other"), str(file)]) == 0
    assert (tmp_path / "other" / slurm.HISTORY).is_file(), "where the job began, whatever the recipe says by then"
    capsys.readouterr()
    assert main(["output", str(file), "--allow-change", "optim.lr", "output=elsewhere", "--resume=auto"]) == 0
    assert capsys.readouterr().out == "elsewhere\n"


def test_torchruns_ranks_decide_its_exit_code() -> None:
    assert combined([75, 75]) == 75
    assert combined([75, -15]) == 1
    assert combined([1, 2]) == 2
    assert combined([-9]) == 1


def test_torchruns_agent_lives_on_and_a_rank_that_only_begins_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop request while a rank imports would be lost where the signal is ignored, and there is no second one."""
    rank = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)"
    ended: list[int] = []

    def agent(arguments: list[str]) -> None:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
        ended.append(subprocess.run([sys.executable, "-c", rank], check=False).returncode)

    monkeypatch.setattr("torch.distributed.run.main", agent)
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    try:
        assert torchrun.main([]) == 0
    finally:
        for number, handler in zip((signal.SIGUSR1, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    assert ended == [-signal.SIGUSR1]


@pytest.mark.parametrize("count", range(2, 10))
def test_rounds_have_every_pair_once_and_no_node_twice(count: int) -> None:
    pairs = [pair for round_ in rounds(count) for pair in round_]
    assert sorted(pairs) == [(a, b) for a in range(count) for b in range(a + 1, count)]
    assert all(len({node for pair in round_ for node in pair}) == 2 * len(round_) for round_ in rounds(count))


def test_findings_name_the_node() -> None:
    def nodes() -> list[Node]:
        return [Node(f"n{i}", gpus=8) for i in range(4)]

    even = {pair: 10.0 for round_ in rounds(4) for pair in round_}
    assert findings(nodes(), even) == []

    late = nodes()
    late[2].skew_s = -7.2
    assert findings(late, even) == ["n2: its clock is -7.2 s from the other nodes'"]
    first = nodes()
    for node in first[1:]:
        node.skew_s = 3.0
    assert findings(first, even) == ["n0: its clock is -3.0 s from the other nodes'"]

    poor = nodes()
    poor[3].gpus = 7
    assert findings(poor, even) == ["n3: 7 GPUs, others have 8"]

    for count in (3, 4, 9):
        slow = {pair: (2.0 if 1 in pair else 10.0) for round_ in rounds(count) for pair in round_}
        expected = ["n1: all-reduce with every other node is bad, as 2.00 GB/s, usual are 10.00"]
        assert findings([Node(f"n{i}") for i in range(count)], slow) == expected
    cut = {**even, (0, 3): "timed out"}
    assert findings(nodes(), cut) == ["n0 and n3: all-reduce is bad: timed out"]


def test_ray_takes_no_fixed_port_and_shows_its_dashboard_to_its_own_node_only() -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
               "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_CPUS_ON_NODE": "16", "LBR_GPUS": "8",
               "RAY_ADDRESS": "10.0.0.1:20112", "LBR_RAY_FOLDER": "/scratch/ray-7-0"}  # fmt: skip
    head = start_options(environ, "10.0.0.1", [20112, 20113, 20114, 20115])
    assert {"--head", "--port=20112", "--dashboard-host=127.0.0.1", "--dashboard-port=20113", "--num-gpus=8",
            "--ray-client-server-port=20114", "--node-ip-address=10.0.0.1"} <= set(head)  # fmt: skip
    assert "--temp-dir=/scratch/ray-7-0/r" in head
    worker = start_options({**environ, "SLURM_PROCID": "1"}, "10.0.0.2", [20112, 20113, 20114, 20115])
    assert {"--address=10.0.0.1:20112", "--min-worker-port=0", "--dashboard-agent-listen-port=20115"} <= set(worker)
    assert "--head" not in worker


def test_scripts_pass_shellcheck() -> None:
    scripts = sorted([*PROJECT.glob("slurm/*.sh"), PROJECT / "slurm/site.env", *PROJECT.glob("tests/cluster/*.sh")])
    assert len(scripts) >= 9
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["stage1.sh", "stage2.sh", "eval.sh", "prepare.sh"])
def test_a_script_by_itself_says_what_to_do(script: str, tmp_path: Path) -> None:
    here = {"PATH": "/usr/bin:/bin"}
    for submitted in ({"SLURM_SUBMIT_DIR": str(PROJECT)}, {}):
        assert "error: not in a Slurm job: submit this script with sbatch" in run(script, here | submitted)
    lost = run(script, {**here, "SLURM_SUBMIT_DIR": str(tmp_path)})
    assert f"error: no slurm/lib.sh in {tmp_path}: set LBR_HOME" in lost


@pytest.mark.parametrize("script", ["stage1.sh", "stage2.sh", "eval.sh", "prepare.sh", "pipeline.sh"])
def test_help_is_a_scripts_own_first_lines(script: str) -> None:
    command = ["bash", f"slurm/{script}", "recipe.yaml", "--help"]
    env = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=env, cwd=PROJECT, capture_output=True, text=True, check=True)
    first, *_, last = done.stdout.splitlines()
    assert f"slurm/{script} " in first
    assert last.endswith(".")
    assert "#" not in done.stdout


def run(script: str, env: dict[str, str], *arguments: str) -> str:
    bash = shutil.which("bash")
    assert bash
    command = [bash, str(PROJECT / "slurm" / script), *arguments]
    done = subprocess.run(command, env=env, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    return done.stderr


SITE = PROJECT / "slurm" / "site.env"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read: mend LBR_SITE"),
        ("export LAUNCHER=srun\r\n", "has the line ends of Windows"),
        ("export LAUNCHER=srun\n", "does not set LBR_RANKS_PER_NODE: begin with a copy of slurm/site.env"),
        ("true\nfalse\n", "a command in it failed: mend it"),
        ("exit 0\n", "ends the script that reads it: mend what is said above, or write return"),
        ("export LBR_MODULES=gcc\n", "LBR_MODULES=gcc: no command 'module' here"),
        ("export LBR_MODULES=gcc\nmodule() { return 3; }\n", "LBR_MODULES=gcc: module load failed with 3"),
    ],
)
@pytest.mark.parametrize("script", ["eval.sh", "pipeline.sh"])
def test_a_mistake_in_the_site_file_is_told(tmp_path: Path, content: str | None, told: str, script: str) -> None:
    copy = tmp_path / "site.env"
    if content is not None:
        copy.write_bytes((content + (SITE.read_text() if "MODULES" in content else "")).encode())
    env = {"PATH": "/usr/bin:/bin", "LBR_SITE": str(copy), "LBR_HOME": str(PROJECT), "SLURM_JOB_ID": "7"}
    error = run(script, env, "one.yaml", "two.yaml")
    assert error.startswith("error: ")
    assert told in error


def site(command: str, **environ: str) -> str:
    env = {"PATH": "/usr/bin:/bin", "SITE": str(SITE), **environ}
    return subprocess.run(["bash", "-euc", command], env=env, capture_output=True, text=True, check=True).stdout.strip()


def test_a_set_variable_wins_over_the_site_file() -> None:
    show = 'lbr_script=1; . "$SITE"; echo "$LAUNCHER $LBR_MAX_RESTARTS $LBR_PYTHON"'
    assert site(show).split()[1:] == ["3", "python3"]
    assert site(show, LAUNCHER="torchrun", LBR_MAX_RESTARTS="9") == "torchrun 9 python3"


def test_a_login_shell_gets_what_sbatch_reads_and_nothing_else(tmp_path: Path) -> None:
    """What is set there would hold for every job, whatever the file says by then: its scratch folder, its launcher."""
    copy = tmp_path / "site.env"
    copy.write_text("export SBATCH_ACCOUNT=${SBATCH_ACCOUNT-mine}\n" + SITE.read_text())
    new = f'env | sort >{tmp_path}/before; . "$SITE"; env | sort | comm -13 {tmp_path}/before -'
    assert site(new, SITE=str(copy), TMPDIR="/run/user/7", LBR_HOME="/project") == "SBATCH_ACCOUNT=mine"
