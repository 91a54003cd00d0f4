"""Whatever happens to a run, it goes on exactly, or ends with the cause: never a wrong run, never a silent wait."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_trials import CLEAR, EXACT, SIGNALS, Trials, wait_for
from fault_worker import train_with
from ranks import run_ranks, start_ranks
from training_runs import recipe, train_all

from lbr_dist.errors import EXIT_RUN_AGAIN
from lbr_dist.logs import read_rows
from lbr_dist.recipes import parse_recipe, save_recipe
from lbr_dist.training.audit import audit
from lbr_dist.training.checkpoint.listing import list_checkpoints
from lbr_dist.training.checkpoint.weights import iterate_weights

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]) -> Trials:
    return Trials(tmp_path_factory.mktemp("faults"), tiny_model_dir("llama"), workers=1)


@pytest.fixture(scope="module")
def place(trials: Trials) -> tuple[Path, Path, Path]:
    return trials.folder, trials.model, trials.data


@pytest.fixture(scope="module")
def calm(trials: Trials) -> dict[str, Any]:
    """The recipe of a run that nothing happened to, on two ranks."""
    return trials.calm


def ranks(folder: Path, world: int, function: Callable[..., Any], *args: Any) -> list[dict[str, Any]]:
    results = run_ranks(function, world, fresh(folder), *args, timeout=900)
    return results[0]


def fresh(folder: Path) -> Path:
    here = folder / f"ranks-{len(list(folder.glob('ranks-*')))}"
    here.mkdir()
    return here


def rows(raw: dict[str, Any]) -> list[dict[str, Any]]:
    file = Path(raw["output"]) / "metrics.jsonl"
    return read_rows(file) if file.is_file() else []


def assert_same_run(raw: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit the run that would have been."""
    assert [row["loss"] for row in rows(raw)] == [row["loss"] for row in rows(expected)]
    weights = dict(iterate_weights(expected["output"]))
    for name, weight in iterate_weights(raw["output"]):
        assert torch.equal(weight, weights[name]), name
    assert audit(raw["output"]).problems == []


@pytest.mark.parametrize("number", SIGNALS)
def test_stop_signals_save_and_ask_to_run_again(trials: Trials, number: signal.Signals) -> None:
    assert trials.stopped(f"stopped-{number}", number) == EXACT


def test_a_full_disk_during_a_save_is_named_and_the_run_goes_on(trials: Trials) -> None:
    try:
        with trials.disk("probe", 1):
            pass
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs root to mount a small tmpfs")
    assert trials.full_disk("disk") == CLEAR


def test_a_save_that_failed_in_the_background_is_made_up_for(
    place: tuple[Path, Path, Path], calm: dict[str, Any]
) -> None:
    """Not at the next save, but after the step that is under way when it is known."""
    every = (len(rows(calm)) - 1) // 2
    checkpoint = {"every_steps": every, "keep_last": 9}
    raw = {**calm, "output": str(place[0] / "unwritten"), "checkpoint": checkpoint}
    (result,) = ranks(place[0], 2, train_with, "unwritten", [raw])
    assert result.get("code") == 0, result
    log = (Path(raw["output"]) / "log.txt").read_text()
    told = re.findall(
        r"step-(\d+) was not written: rank 1: weights: No space left .*; trying once more, with step (\d+)", log
    )
    ((failed, again),) = [tuple(map(int, steps)) for steps in told]
    assert failed == every < again < 2 * every
    assert f"step-{again:06d}" in [path.name for path, _ in list_checkpoints(raw["output"])]
    assert_same_run(raw, calm)


def damage_truncated(checkpoint: Path) -> None:
    file = next(checkpoint.glob("weights-00001-*"))
    os.truncate(file, file.stat().st_size - 1)


def damage_flipped(checkpoint: Path) -> None:
    file = next(checkpoint.glob("optimizer-00000-*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damage_missing(checkpoint: Path) -> None:
    next(checkpoint.glob("rank-00001-*")).unlink()


def damage_config(checkpoint: Path) -> None:
    file = checkpoint / "model" / "config.json"
    file.write_text(file.read_text().replace('"hidden_size": ', '"hidden_size": 1'))


@pytest.mark.parametrize("damage", [damage_truncated, damage_flipped, damage_missing, damage_config])
def test_damaged_checkpoint_is_passed_over(
    place: tuple[Path, Path, Path], calm: dict[str, Any], damage: Callable[[Path], None]
) -> None:
    folder = place[0]
    raw = {**calm, "output": str(folder / damage.__name__)}
    shutil.copytree(calm["output"], raw["output"])
    newest = list_checkpoints(raw["output"])[0][0]
    damage(newest)
    (result,) = ranks(folder, 2, train_all, [raw])
    assert result.get("code") == 0, result
    assert f"passed over {newest}/" in (Path(raw["output"]) / "log.txt").read_text()
    assert_same_run(raw, calm)


def test_a_run_does_not_start_over_by_itself(place: tuple[Path, Path, Path], calm: dict[str, Any]) -> None:
    folder = place[0]
    raw = {**calm, "output": str(folder / "damaged")}
    shutil.copytree(calm["output"], raw["output"])
    found = [path for path, _ in list_checkpoints(raw["output"])]
    for path in found:
        damage_truncated(path)
    (result,) = ranks(folder, 2, train_all, [raw])
    assert "none of its checkpoints can be used" in result["error"]
    assert "move the folder checkpoints/ away" in result["error"]
    assert [path for path, _ in list_checkpoints(raw["output"])] == found


def test_nan_stops_with_the_samples_or_skips(place: tuple[Path, Path, Path]) -> None:
    folder, *inputs = place
    stop = recipe(folder / "stop", *inputs, checkpoint={"every_steps": 2}, deepspeed="zero2")
    skip = {**stop, "output": str(folder / "skip"), "on_nan": "skip", "deepspeed": "zero3"}
    never = {**skip, "output": str(folder / "never"), "max_skips": 1, "optim": {"lr": 1e30, "clip": 0}}
    stopped, skipped, gave_up = ranks(folder, 2, train_with, "nan 3", [stop, skip, never])

    assert "step 3: loss inf" in stopped["error"] or "step 3: loss nan" in stopped["error"]
    assert "on_nan=skip" in stopped["error"]
    assert [path.name for path, _ in list_checkpoints(stop["output"])] == ["step-000002"]
    dumps = [json.loads((folder / "stop" / f"bad-step-3-rank-{rank}.json").read_text()) for rank in (0, 1)]
    logged = [json.loads(line) for line in (folder / "skip" / "audit" / "rank-1.jsonl").read_text().splitlines()]
    assert dumps[1]["ids"] == next(row["ids"] for row in logged if row.get("step") == 2)
    assert dumps[0]["ids"]

    assert skipped["code"] == 0
    assert [row["step"] for row in rows(skip) if row.get("skipped")] == [3]
    assert all(row["loss"] < 10 for row in rows(skip) if row["step"] != 3)
    assert "more than max_skips=1" in gave_up["error"]
    assert list_checkpoints(never["output"]) == []  # step 2 was to be saved, and its weights give nothing but nan


def test_a_hung_rank_shows_every_stack(place: tuple[Path, Path, Path]) -> None:
    folder, *inputs = place
    raw = recipe(folder / "hung", *inputs, step_timeout=20)
    processes = start_ranks(train_with, 2, fresh(folder), "hang 3", [raw])
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [1, 1]
    stacks = [(folder / "hung" / "stacks" / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert all("no progress for 20 s, while running step 3" in text for text in stacks)
    assert "in faulty" in stacks[1]
    assert "in faulty" not in stacks[0]


def test_a_shard_that_vanishes_is_named(trials: Trials) -> None:
    assert trials.vanish("vanish") == CLEAR


def launch(raw: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    file = folder / "launched.yaml"
    save_recipe(parse_recipe(raw, "test"), file)
    return subprocess.Popen(
        [sys.executable, "-c", "from lbr_dist.cli import main; main()", "train", str(file), "--nproc", "2"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank to process id of a launcher's children."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environ = dict(part.split("=", 1) for part in (folder / "environ").read_text().split("\0") if "=" in part)
        except OSError:
            continue
        if parent == launcher and "RANK" in environ:
            found[int(environ["RANK"])] = int(folder.name)
    return found


def test_launcher_ends_all_stops_on_request_and_goes_on(place: tuple[Path, Path, Path], calm: dict[str, Any]) -> None:
    folder = place[0]
    raw = {**calm, "output": str(folder / "launched")}

    process = launch(raw, folder)
    wait_for(lambda: len(rows(raw)) >= 3 or process.poll() is not None)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    killed = time.monotonic()
    assert process.wait(120) == 1
    assert time.monotonic() - killed < 20
    assert process.stderr is not None
    assert "rank 1 failed (killed by SIGKILL)" in process.stderr.read()

    before = len(rows(raw))
    process = launch(raw, folder)
    wait_for(lambda: len(rows(raw)) >= before + 1 or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == EXIT_RUN_AGAIN
    done = len(rows(raw))
    assert list_checkpoints(raw["output"])[0][0].name == f"step-{done:06d}"

    process = launch(raw, folder)
    assert process.wait(600) == 0
    assert_same_run(raw, calm)
