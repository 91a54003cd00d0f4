from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lbr_dist.config import Tracking
from lbr_dist.errors import UserError
from lbr_dist.logs import read_rows
from lbr_dist.recipes import parse_recipe
from lbr_dist.training.tracking import Tracker, check_wandb, duration, keep_rows, start_log


def make_tracker(folder: Path, *, done: int = 0, **tracking: Any) -> Tracker:
    recipe = parse_recipe(
        {
            "stage": "generative",
            "output": str(folder),
            "model": {"path": "model"},
            "data": {"sets": [{"path": "set"}]},
            "batch": {"global_batch": 1},
            "duration": {"steps": 6},
            "tracking": tracking,
        },
        "test",
    )
    return Tracker(recipe, total_steps=6, done=done, wandb_id=None)


def row(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "lr": 1e-4, "grad_norm": 0.5, "tokens_per_s": 10.0}


def test_every_nth_step_and_the_last_are_written(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path, every_steps=4)
    assert [step for step in range(1, 7) if tracker.row(row(step))] == [4, 6]
    tracker.close()
    assert [found["step"] for found in read_rows(tmp_path / "metrics.jsonl")] == [4, 6]


def test_what_is_left_counts_no_start_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lbr_dist.training.tracking.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("lbr_dist.training.tracking._start_wandb", lambda *_: now.append(now.pop() + 600))
    tracker = make_tracker(tmp_path)
    now[0] += 2
    assert tracker._eta(1) == 10
    tracker.close()


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path)
    tracker.row(row(1, math.nan))
    tracker.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None


def test_a_resumed_run_takes_back_later_rows_and_a_torn_one(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path)
    for step in range(1, 6):
        tracker.row(row(step, loss=step))
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    tracker = make_tracker(tmp_path, done=3)
    tracker.row(row(4, loss=40.0))
    tracker.close()
    assert [found["loss"] for found in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 40]


def test_an_output_that_cannot_be_made_is_the_users_and_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "run" / "log.txt").mkdir(parents=True)
    for output in ("file/run", "link", "long" * 100, "run"):
        with pytest.raises(UserError, match=rf"output .*/{output}: cannot be written \(.*choose another output"):
            start_log(tmp_path / output, 0)


@pytest.mark.parametrize("harm", ["link", "folder"])
def test_metrics_that_cannot_be_written_are_named(tmp_path: Path, harm: str) -> None:
    file = tmp_path / "metrics.jsonl"
    if harm == "folder":
        file.mkdir()
    else:
        file.symlink_to("/nowhere/metrics.jsonl")
    with pytest.raises(UserError, match=f"^{file}: a log has to be written there"):
        make_tracker(tmp_path)


def test_keep_rows_without_a_file_makes_none(tmp_path: Path) -> None:
    keep_rows(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_wandb_offline_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    first = make_tracker(tmp_path, wandb_project="lbr")
    first.row(row(1))
    first.close()
    assert first.wandb_id
    recipe = first._recipe
    again = Tracker(recipe, total_steps=6, done=1, wandb_id=first.wandb_id)
    again.close()
    assert again.wandb_id == first.wandb_id
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{first.wandb_id}"))) >= 1


def test_wandb_without_a_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb
    from wandb.errors import UsageError

    def login(verify: bool) -> None:
        assert not verify
        raise UsageError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(wandb, "login", login)
    with pytest.raises(UserError, match=r"wandb_project lbr: .*No API key.*wandb_mode=offline"):
        check_wandb(Tracking(wandb_project="lbr", wandb_mode="online"))
    check_wandb(Tracking(wandb_project="lbr", wandb_mode="offline"))
    check_wandb(Tracking(wandb_mode="online"))


def test_wandb_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """No key is a mistake; a server that is away must not cost the run."""
    import wandb
    from wandb.errors import CommError, UsageError

    real = wandb.init

    def online_fails(error: Exception):
        def init(mode: str, **options: object):
            if mode == "online":
                raise error
            return real(mode=mode, **options)

        return init

    settings = {"wandb_project": "lbr", "wandb_mode": "online"}
    monkeypatch.setattr(wandb, "init", online_fails(UsageError("No API key configured.\nUse `wandb login`")))
    with pytest.raises(UserError, match=r"wandb_project lbr: .*No API key.*wandb_mode=offline"):
        make_tracker(tmp_path, **settings)
    monkeypatch.setattr(wandb, "init", online_fails(CommError("timed out")))
    tracker = make_tracker(tmp_path, **settings)
    tracker.close()
    assert "wandb does not answer (timed out): goes on offline" in caplog.text
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{tracker.wandb_id}"))) == 1


@pytest.mark.parametrize("call", ["log", "finish"])
def test_a_wandb_that_dies_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, call) -> None:
    """Its helper process is killed, say for memory."""
    import wandb

    def fail(*_: object, **__: object) -> None:
        raise ConnectionResetError("Connection lost")

    dying = SimpleNamespace(id="abc", **{"log": lambda *_, **__: None, "finish": lambda: None, call: fail})
    monkeypatch.setattr(wandb, "init", lambda **_: dying)
    tracker = make_tracker(tmp_path, wandb_project="lbr")
    for step in range(1, 7):
        tracker.row(row(step))
    tracker.close()
    assert [found["step"] for found in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "wandb failed (ConnectionResetError: Connection lost)" in warning
    assert "metrics.jsonl has all of them" in warning
    assert tracker.wandb_id == "abc", "a resumed run goes on with it"


@pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (75, "1 min 15 s"), (3725, "1 h 02 min")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
