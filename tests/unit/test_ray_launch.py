"""What the Ray drivers decide, without a cluster."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lbr_dist.config import Recipe
from lbr_dist.errors import EXIT_RUN_AGAIN, UserError
from lbr_dist.launch import ray_pipeline, ray_stage, ray_train, slurm
from lbr_dist.launch.ray_cluster import Bundle, Node, check_room, make_token, parse_nodes
from lbr_dist.launch.ray_train import Request, Stop, Training
from lbr_dist.launch.ray_worker import RESUME, Gauges, resume_from
from lbr_dist.recipes import load_recipe, parse_recipe
from lbr_dist.training import preflight, run_folder
from lbr_dist.training.signals import stop_signals

RAW: dict[str, Any] = {
    "stage": "generative",
    "output": "runs/a",
    "model": {"path": "org/model"},
    "data": {"sets": [{"path": "data/a"}, {"path": "https://host/b"}]},
    "batch": {"global_batch": 1},
    "duration": {"steps": 1},
}
GPU_NODES = [Node("10.0.0.1", 32, 4), Node("10.0.0.2", 32, 4)]
CPU_NODES = [Node("10.0.0.1", 2, 0), Node("10.0.0.2", 3, 0)]


def options(*arguments: str) -> argparse.Namespace:
    return ray_stage.parser("generative").parse_intermixed_args(["recipe.yaml", *arguments])


class TestRequest:
    def test_a_fixed_number(self) -> None:
        request = ray_stage.requested(options("--num-workers", "4", "optim.lr=1e-4", "--cpus-per-worker", "2"))(
            CPU_NODES
        )
        assert request == Request(4, 4, Bundle(2, 0))
        assert not request.elastic

    def test_overrides_may_stand_anywhere(self) -> None:
        parsed = options("optim.lr=1e-4", "--num-workers", "1:4", "seed=3")
        assert parsed.overrides == ["optim.lr=1e-4", "seed=3"]
        assert parsed.num_workers == (1, 4)

    def test_without_a_number_every_gpu_gets_a_rank(self) -> None:
        assert ray_stage.requested(options())(GPU_NODES) == Request(8, 8, Bundle(1, 1))

    def test_without_gpus_every_node_gets_one(self) -> None:
        assert ray_stage.requested(options())(CPU_NODES) == Request(2, 2, Bundle(1, 0))

    @pytest.mark.parametrize("text", ["0", "4:2", "two", "1:", ":3", "-1"])
    def test_a_wrong_number_is_refused(self, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            options(f"--num-workers={text}")
        assert ended.value.code == 2
        assert "--num-workers" in capsys.readouterr().err


class TestRoom:
    def test_bundles_are_counted_node_by_node(self) -> None:
        check_room(CPU_NODES, Bundle(2, 0), 2, "here")
        with pytest.raises(UserError, match=r"--num-workers 3 of 2 CPUs each: here has room for 2 \(10.0.0.1: 2 CPUs"):
            check_room(CPU_NODES, Bundle(2, 0), 3, "here")

    def test_gpus_count_too(self) -> None:
        check_room(GPU_NODES, Bundle(8, 1), 8, "here")
        with pytest.raises(UserError, match="room for 6"):
            check_room(GPU_NODES, Bundle(10, 1), 8, "here")
        with pytest.raises(UserError, match="1 CPU and 1 GPU each: here has room for 0"):
            check_room(CPU_NODES, Bundle(1, 1), 1, "here")

    def test_dead_nodes_and_those_without_cpus_have_none(self) -> None:
        rows = [
            {"NodeManagerAddress": "a", "Alive": True, "Resources": {"memory": 1.0}},
            {"NodeManagerAddress": "b", "Alive": False, "Resources": {"CPU": 8.0}},
            {"NodeManagerAddress": "c", "Alive": True, "Resources": {"CPU": 3.0, "GPU": 1.0}},
        ]
        assert parse_nodes(rows) == [Node("a", 0, 0), Node("c", 3, 1)]


class TestRecipe:
    def test_paths_mean_the_same_from_any_folder(self, tmp_path: Path) -> None:
        (tmp_path / "data" / "a").mkdir(parents=True)
        recipe = ray_stage.absolute(parse_recipe(RAW, "test"), tmp_path)
        assert recipe.output == str(tmp_path / "runs/a")
        assert [data_set.path for data_set in recipe.data.sets] == [str(tmp_path / "data/a"), "https://host/b"]
        assert recipe.model.path == "org/model"

    def test_every_path_of_a_recipe_is_one_of_them(self, tmp_path: Path) -> None:
        names = ["cpu", "model", "run", "small", "set", "ds.json"]
        for name in names:
            (tmp_path / name).mkdir()
        raw = {
            **RAW,
            "model": {"path": "model", "start_from": "run"},
            "data": {"sets": [{"path": "set"}], "cache_dir": "cache"},
            "bottleneck": {"surprisal": {"model": "small", "bits": 1}},
        }
        recipe = ray_stage.absolute(parse_recipe({**raw, "deepspeed": "ds.json"}, "test"), tmp_path)
        surprisal, data = recipe.bottleneck.surprisal, recipe.data
        assert surprisal is not None
        found = [recipe.model.path, recipe.model.start_from, surprisal.model, data.sets[0].path, recipe.deepspeed]
        assert found == [str(tmp_path / name) for name in names[1:]]
        assert data.cache_dir == str(tmp_path / "cache"), "which is made where it is not there"
        named = ray_stage.absolute(parse_recipe({**raw, "deepspeed": "cpu"}, "test"), tmp_path)
        assert named.deepspeed == "cpu", "a name in ds_configs/, whatever there is here"

    def test_a_tilde_behind_an_option_is_the_home_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/me")
        given = options("--resume=~/run", "--then=~/two.yaml")
        assert (given.resume, given.then) == ("/home/me/run", "/home/me/two.yaml")

    def test_an_output_in_rays_copy_of_the_working_directory_is_refused(self) -> None:
        copy = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1")
        with pytest.raises(UserError, match="absolute path on storage that all nodes share"):
            ray_stage.absolute(parse_recipe(RAW, "test"), copy)
        assert ray_stage.absolute(parse_recipe({**RAW, "output": "/shared/a"}, "test"), copy).output == "/shared/a"

    def test_readmes_job_runs_where_its_relative_paths_are(self, tmp_path: Path) -> None:
        """Ray would run it in a copy of the working directory, or in a folder of its own."""
        shared, copy, commands = tmp_path / "shared", tmp_path / ray_stage.UNPACKED / "a", tmp_path / "bin"
        for folder in (shared / "data" / "domain", copy, commands):
            folder.mkdir(parents=True)
        submit = 'while [ "$1" != -- ]; do shift; done\nshift\ncd "$COPY"\nexec "$@"\n'
        for name, body in (("ray", submit), ("python", 'printf "%s\\n" "$PWD" "$@"\n')):
            (commands / name).write_text(f"#!/bin/sh\n{body}")
            (commands / name).chmod(0o755)
        text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
        (line,) = [line for line in text.splitlines() if line.startswith("ray job submit")]
        environ = {"PATH": f"{commands}:/usr/bin:/bin", "COPY": str(copy)}
        done = subprocess.run(["bash", "-c", line], cwd=shared, env=environ, capture_output=True, text=True, check=True)
        here, script, *arguments = done.stdout.splitlines()
        given = ray_stage.parser("generative").parse_intermixed_args(arguments)
        assert (script, given.recipe, given.num_workers) == ("ray_jobs/stage1.py", "stage1.yaml", (8, 16))
        recipe = ray_stage.absolute(load_recipe("stage1", given.overrides), Path(here))
        assert recipe.output == str(shared / "runs/stage1")
        assert recipe.data.sets[0].path == str(shared / "data/domain")

    def test_the_other_stages_recipe_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert ray_stage.main("contrastive", ["stage1", f"output={tmp_path}/run"]) == 2
        assert "use stage1.py" in capsys.readouterr().err


class TestPipeline:
    @pytest.fixture
    def files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(tmp_path)
        two = {**RAW, "stage": "contrastive", "output": "runs/b", "bottleneck": {"tokens": 1}}
        (tmp_path / "one.yaml").write_text(yaml.safe_dump({**RAW, "bottleneck": {"tokens": 1}}))
        (tmp_path / "two.yaml").write_text(yaml.safe_dump(two))
        (tmp_path / "ratio.yaml").write_text(yaml.safe_dump({**two, "bottleneck": {}}))
        (tmp_path / "more.yaml").write_text(yaml.safe_dump({**two, "bottleneck": {"tokens": 2}}))
        (tmp_path / "same.yaml").write_text(yaml.safe_dump({**two, "output": "runs/a"}))
        return tmp_path

    def test_stage_2_starts_from_stage_1(self, files: Path) -> None:
        one, two, _ = ray_pipeline.parts(str(files / "one.yaml"), str(files / "two.yaml"), files)
        assert two.model.start_from == one.output == str(files / "runs/a")

    def test_a_folder_whose_name_yaml_would_read_otherwise(self, files: Path) -> None:
        (files / "one.yaml").write_text(yaml.safe_dump({**RAW, "output": "runs/a #1: x", "bottleneck": {"tokens": 1}}))
        one, two, _ = ray_pipeline.parts(str(files / "one.yaml"), str(files / "two.yaml"), files)
        assert two.model.start_from == one.output == str(files / "runs/a #1: x")

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            ("one", "stage is generative: the second of the two has to be contrastive"),
            ("same", "its output is also that of"),
            ("more", r"one\.yaml: other bottleneck settings \(bottleneck\.tokens is 2 here and 1 there"),
        ],
    )
    def test_mistakes_are_found_before_anything_starts(self, files: Path, second: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            ray_pipeline.parts(str(files / "one.yaml"), str(files / f"{second}.yaml"), files)

    def test_where_the_number_of_bottleneck_tokens_varies_the_export_is_told_how_many(self, files: Path) -> None:
        one, two = str(files / "varies.yaml"), str(files / "ratio.yaml")
        Path(one).write_text(yaml.safe_dump(RAW))
        assert ray_pipeline.parts(one, two, files, tokens=2)[1].bottleneck.effective_ratio
        with pytest.raises(UserError, match="pass --tokens"):
            ray_pipeline.parts(one, two, files)
        with pytest.raises(UserError, match="--tokens 9: this run's texts have 1 to 3 bottleneck tokens"):
            ray_pipeline.parts(one, two, files, tokens=9)

    def test_an_export_that_could_not_be_made_or_kept_is_told_first(self, files: Path) -> None:
        one, two = str(files / "one.yaml"), str(files / "two.yaml")
        with pytest.raises(UserError, match=r"OUT one\.yaml: is a file"):
            ray_pipeline.parts(one, two, Path(), "one.yaml")
        with pytest.raises(UserError, match=r"OUT duration\.steps=4: looks like an override, and"):
            ray_pipeline.parts(one, two, files, "duration.steps=4")
        for name in ("model", "./a=b", f"{files}/a=b"):
            assert ray_pipeline.parts(one, two, files, name)[2] == files / name
        for name in (one, two):
            Path(name).write_text(Path(name).read_text().replace("runs/", f"{files}/runs/"))
        copy = files / ray_stage.UNPACKED / "a"
        with pytest.raises(UserError, match="OUT model: is relative to the job's working directory"):
            ray_pipeline.parts(one, two, copy, "model")
        assert ray_pipeline.parts(one, two, copy)[2] == files / "runs/b/model"

    def test_a_set_without_questions_to_evaluate_on_is_told_first(self, files: Path) -> None:
        (files / "data" / "a").mkdir(parents=True)
        none = {"format": 1, "fingerprint": "", "splits": {"eval": {"records": 0, "texts": 0}}}
        (files / "data" / "a" / "manifest.json").write_text(json.dumps(none))
        with pytest.raises(UserError, match=r"data/a: the first of data\.sets is what the run is evaluated on"):
            ray_pipeline.parts(str(files / "one.yaml"), str(files / "two.yaml"), files)

    @pytest.mark.parametrize("when", ["as stage 1 ends", "before stage 2 begins"])
    def test_a_signal_between_the_stages_is_heard(
        self, files: Path, when: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun = list[str]()

        def complete(recipe: Recipe, _: tuple[str, ...]) -> bool:
            if when.startswith("before") and recipe.stage == "contrastive":
                os.kill(os.getpid(), signal.SIGUSR1)
            return False

        def attempt(training: Training, _: Request, stop: Stop, *__: Any) -> int:
            if stop.asked:
                return EXIT_RUN_AGAIN
            begun.append(training.recipe.stage)
            if when.startswith("as"):
                os.kill(os.getpid(), signal.SIGUSR1)  # with its last step under way, which is finished
            return 0

        for module in (ray_pipeline, ray_train):
            monkeypatch.setattr(module, "cluster", lambda: contextlib.nullcontext("here"))
        monkeypatch.setattr(ray_train, "living_nodes", lambda: CPU_NODES)
        monkeypatch.setattr(ray_train, "_attempt", attempt)
        monkeypatch.setattr(preflight, "complete", complete)
        monkeypatch.setattr(ray_pipeline, "finish", lambda *_: pytest.fail("evaluated"))
        before = {number: signal.getsignal(number) for number in stop_signals()}
        try:
            code = ray_pipeline.main([str(files / "one.yaml"), str(files / "two.yaml")])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        assert (code, begun) == (EXIT_RUN_AGAIN, ["generative"])

    @pytest.mark.parametrize("there", ["nothing", "an empty folder", "an export"])
    def test_only_an_export_that_is_there_is_left(
        self, tmp_path: Path, there: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An empty folder, made beforehand, stayed empty, and the job was a success."""
        out, exported = tmp_path / "out", list[tuple[str, int]]()
        if there != "nothing":
            out.mkdir()
        if there == "an export":
            (out / "modules.json").touch()
        monkeypatch.setattr("lbr_dist.evaluation.evaluate.evaluate", lambda *_, **__: None)
        monkeypatch.setattr("lbr_dist.export.export.export", lambda _, out, tokens: exported.append((out, tokens)))
        written = ray_pipeline.deliver(str(tmp_path / "run"), "set", str(out), 0, 2)
        assert exported == ([] if there == "an export" else [(str(out), 2)])
        assert ("nothing is exported" in written) == (there == "an export")


def test_a_node_that_does_not_see_the_run_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "SEEN_AFTER_S", 0.1)
    with pytest.raises(UserError, match=rf"output /runs/a: rank 3 on {socket.gethostname()} does not see the folder"):
        resume_from(tmp_path / "ray" / "1", Path("/runs/a"), 3)
    (tmp_path / RESUME).write_text("auto")
    assert resume_from(tmp_path, Path("/runs/a"), 3) == "auto"


def test_a_recipe_of_another_user_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "one.yaml")

    for module in (ray_stage, ray_pipeline, slurm):
        monkeypatch.setattr(module, "load_recipe", denied)
    assert ray_stage.main("generative", ["one.yaml"]) == 2
    assert ray_pipeline.main(["one.yaml", "two.yaml"]) == 2
    assert slurm.main(["output", "one.yaml"]) == 2
    line = "error: one.yaml: Permission denied: see to it that this user may use it"
    assert capsys.readouterr().err.splitlines() == [line] * 3


def test_a_run_folder_of_any_name_has_metrics() -> None:
    """Ray's take ASCII alone: a run in a folder of another name failed at its first step, and at every restart's."""
    Gauges("/läufe/一")({"loss": 1.0, "skipped": False, "note": "ü"})


def test_only_the_owner_reads_a_token(tmp_path: Path) -> None:
    one, two = make_token(tmp_path / "one"), make_token(tmp_path / "two")
    assert stat.S_IMODE(one.stat().st_mode) == 0o600
    assert len(one.read_text()) == 64
    assert one.read_text() != two.read_text()


class WorkersFailedError(Exception):
    def __init__(self, **worker_failures: Exception) -> None:
        super().__init__("failed")
        self.worker_failures = worker_failures


class TestRestarts:
    @pytest.fixture
    def attempts(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """Attempts end as `plan` says, each (result, checkpoint that there is then)."""
        state: dict[str, Any] = {"plan": [], "resumed": [], "checkpoint": None}

        def attempt(training: Any, request: Any, stop: Any, resume: str) -> Any:
            state["resumed"].append(resume)
            result, state["checkpoint"] = state["plan"].pop(0)
            return result

        monkeypatch.setattr(ray_train, "_attempt", attempt)
        monkeypatch.setattr(ray_train, "progress", lambda run_dir: state["checkpoint"])
        monkeypatch.setattr(ray_train, "living_nodes", lambda: GPU_NODES)
        return state

    def run(self, max_failures: int = 2, resume: str = "auto", stop: Stop | None = None) -> int:
        request = Request(1, 2, Bundle(1, 1), max_failures)
        training = Training(parse_recipe(RAW, "test"), (), None)
        return ray_train._attempts(training, request, "here", stop or Stop(), resume)

    def test_a_failure_is_followed_by_another_attempt(self, attempts: dict[str, Any]) -> None:
        attempts["plan"] = [(WorkersFailedError(), None), (0, None)]
        assert self.run() == 0

    def test_a_mistake_is_not(self, attempts: dict[str, Any]) -> None:
        attempts["plan"] = [(WorkersFailedError(a=RuntimeError("gone"), b=UserError("step 3: loss nan")), None)]
        with pytest.raises(UserError, match="loss nan"):
            self.run()

    def test_a_crash_loop_ends(self, attempts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
        attempts["plan"] = [(WorkersFailedError(), None)] * 3
        assert self.run(max_failures=2) == 1
        assert "3 failures without a new checkpoint" in capsys.readouterr().err

    def test_progress_starts_the_count_again(self, attempts: dict[str, Any]) -> None:
        attempts["plan"] = [(WorkersFailedError(), ("step", number)) for number in range(9)] + [(0, None)]
        assert self.run(max_failures=1) == 0

    def test_a_stop_meanwhile_means_run_again(self, attempts: dict[str, Any]) -> None:
        stop = Stop()
        stop.asked = "SIGTERM"
        attempts["plan"] = [(WorkersFailedError(), None)]
        assert self.run(stop=stop) == EXIT_RUN_AGAIN

    def test_restarts_go_on_from_this_runs_newest_checkpoint(self, attempts: dict[str, Any]) -> None:
        attempts["plan"] = [(WorkersFailedError(), None), (WorkersFailedError(), ("step", 1)), (0, None)]
        self.run(resume="/elsewhere/step-5")
        assert attempts["resumed"] == ["/elsewhere/step-5", "/elsewhere/step-5", "auto"]
        attempts.update(plan=[(WorkersFailedError(), None), (0, None)], resumed=[], checkpoint=None)
        self.run(resume="never")
        assert attempts["resumed"] == ["never", "auto"]

    def test_nodes_that_stay_away_end_the_wait(
        self, attempts: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(ray_train, "living_nodes", lambda: [])
        monkeypatch.setattr(ray_train, "NODE_WAIT_S", 0.1)
        attempts["plan"] = [(WorkersFailedError(), None)]
        assert self.run() == 1, "a fault, not a mistake: a job is started again"
        assert "error: waited 0.1 s for nodes: --num-workers 1 of " in capsys.readouterr().err
