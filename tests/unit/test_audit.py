"""The audit finds what an exact history may not have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import write_manifest

from lbr_dist.data.plan import Plan, open_data
from lbr_dist.data.record import Record
from lbr_dist.data.shard_writer import write_set
from lbr_dist.errors import UserError
from lbr_dist.model.tokenizer import Tokenization
from lbr_dist.recipes import load_recipe, parse_recipe, save_recipe
from lbr_dist.training.audit import AuditLog, audit, last_attempt


class Batch:
    """What the log reads of a micro-batch."""

    def __init__(self, samples: list[Any], ids: list[str]) -> None:
        self.samples, self.ids = samples, ids


@pytest.fixture
def planned(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> tuple[Path, Plan, list[str]]:
    """(run folder, its plan, record ids)."""
    tokenization = Tokenization.load(str(tiny_model_dir()))
    records = [Record(id=f"r{i}", question=f"what is {i}", answer=f"it is {i * i}") for i in range(60)]
    (tmp_path / "set").mkdir()
    write_set(tmp_path / "set", {"gl": records}, tokenization, name="audit")
    recipe = parse_recipe(
        {
            "stage": "generative",
            "output": str(tmp_path / "run"),
            "model": {"path": str(tiny_model_dir())},
            "data": {"sets": [{"path": str(tmp_path / "set")}], "bin_tokens": 128}
            | {"max_x_tokens": 60, "max_y_tokens": 60},
            "batch": {"global_batch": 2},
            "duration": {"epochs": 2},
        },
        "test",
    )
    (tmp_path / "run").mkdir()
    save_recipe(recipe, tmp_path / "run" / "recipe.yaml")
    plan, readers = open_data(recipe, tokenization)
    return tmp_path / "run", plan, [str(id_) for id_ in readers[0].index.ids]


def attempt(
    planned: tuple[Path, Plan, list[str]],
    number: int,
    steps: range,
    world: int,
    wrong: dict[int, str] | None = None,
    fingerprint: str | None = None,
) -> None:
    run_dir, plan, names = planned
    for rank in range(world):
        made = fingerprint or plan.fingerprint
        log = AuditLog(run_dir, rank, start=steps.start, attempt=number, world=world, plan=made, saves="test")
        for step in steps:
            samples = [s for micro in plan.step(step).micro_batches(rank, world) for s in micro.samples]
            ids = [names[s.ref.row] for s in samples]
            if rank == 0 and wrong and step in wrong:
                ids[0] = wrong[step]
            log.step(step, plan.step(step).epoch, [Batch(samples, ids)])  # type: ignore[list-item]
        log.close()


def total(plan: Plan) -> int:
    return plan.steps_per_epoch(0) + plan.steps_per_epoch(1)


def test_restarts_at_other_world_sizes_are_one_history(planned: tuple[Path, Plan, list[str]]) -> None:
    end = total(planned[1])
    attempt(planned, 1, range(0, 5), 2)
    attempt(planned, 2, range(3, end - 1), 1)
    attempt(planned, 3, range(end - 2, end), 3)
    found = audit(planned[0])
    assert found.problems == []
    assert (found.steps, found.samples, found.attempts, found.redone) == (end, 120, 3, 3)


def test_steps_of_an_earlier_plan_are_counted_and_not_compared(planned: tuple[Path, Plan, list[str]]) -> None:
    """As after --allow-change of what shapes the plan: the recipe that they were made by is gone."""
    attempt(planned, 1, range(0, 3), 1, wrong={0: "stranger", 2: "stranger"}, fingerprint="older")
    attempt(planned, 2, range(2, 5), 1, wrong={4: "another"})
    found = audit(planned[0])
    assert (found.steps, found.unplanned) == (5, 2)
    (problem,) = found.problems
    assert "step 5: not the planned samples" in problem
    assert "1 problems, but for 2 steps from before the data order was changed (not compared)" in str(found)
    attempt(planned, 3, range(5, 6), 1, fingerprint="newer")
    with pytest.raises(UserError, match="the prepared sets or the recipe changed since the run"):
        audit(planned[0])


def test_a_start_under_a_changed_plan_that_made_no_step(planned: tuple[Path, Plan, list[str]]) -> None:
    """The recipe is that start's own already."""
    attempt(planned, 1, range(0, 3), 1, fingerprint="older")
    attempt(planned, 2, range(2, 2), 1)
    found = audit(planned[0])
    assert (found.steps, found.unplanned, found.problems) == (2, 2, [])


def test_an_epoch_may_have_parts_of_two_passes(planned: tuple[Path, Plan, list[str]]) -> None:
    run_dir, _, names = planned
    raw = load_recipe(run_dir / "recipe.yaml").model_dump(mode="json")
    raw["data"]["sets"][0]["weight"], raw["data"]["block"] = 0.7, 4
    save_recipe(recipe := parse_recipe(raw, "test"), run_dir / "recipe.yaml")
    plan, _ = open_data(recipe, Tokenization.load(recipe.model.path))
    uses = Counter(ref for step in range(total(plan)) for epoch, ref in plan.step(step).uses() if epoch == 1)
    assert max(uses.values()) == 2
    attempt((run_dir, plan, names), 1, range(total(plan)), 1)
    assert audit(run_dir).problems == []


def test_a_sample_of_another_step_is_found(planned: tuple[Path, Plan, list[str]]) -> None:
    attempt(planned, 1, range(0, 4), 1, wrong={2: "stranger"})
    (problem,) = audit(planned[0]).problems
    assert "step 3: not the planned samples" in problem  # as metrics and log.txt count
    assert "stranger" in problem


def test_a_gap_is_found(planned: tuple[Path, Plan, list[str]]) -> None:
    attempt(planned, 1, range(0, 2), 1)
    attempt(planned, 2, range(3, 5), 1)
    file = planned[0] / "audit" / "rank-0.jsonl"
    assert audit(planned[0]).problems == [f"step 3: no record: not in {file} (the start had 1 ranks)"]


@pytest.mark.parametrize("kept", [0, 3])
def test_rows_that_are_gone_were_not_under_way(planned: tuple[Path, Plan, list[str]], kept: int) -> None:
    """A rank's log that was lost, whole or from some step on."""
    checkpoint, file = planned[0] / "checkpoints" / "step-000005", planned[0] / "audit" / "rank-1.jsonl"
    attempt(planned, 1, range(0, 6), 2)
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, [], {}, step=5)
    assert audit(planned[0]).problems == []
    file.write_text("".join(file.read_text().splitlines(keepends=True)[: 1 + kept] if kept else ""))
    gap = f"step {kept + 1} to 5: no record: not in {file}"
    assert audit(planned[0]).problems == [f"{gap}{', which is empty' * (not kept)} (the start had 2 ranks)"]
    attempt(planned, 2, range(5, 5), 2)
    (checkpoint / "manifest.json").unlink()
    assert audit(planned[0]).problems == [f"{gap} (the start had 2 ranks)"]
    file.unlink()
    assert audit(planned[0]).problems == [
        f"step 1 to 5: no record: not in {file}, which is missing (the start had 2 ranks)"
    ]


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (
            lambda lines: [lines[0], *reversed(lines[1:])],
            "line 3: step 5 after step 6 in start 1, and 4 more lines like",
        ),
        (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], "line 5: step 3 after step 4 in start 1"),
        (lambda lines: [*lines[:4], *lines[3:]], "line 5: step 3 after step 3 in start 1"),
        (
            lambda lines: [*lines[:3], lines[3].replace('"r', '"q'), *lines[3:]],
            "line 5: step 3 after step 3 in start 1",
        ),
        (lambda lines: [*lines, *lines], "line 8: start 1 after start 1, so the rest is of another run"),
        (lambda lines: [lines[0].replace("test", "othr"), *lines[1:]], "line 1: of another run than"),
        (lambda lines: [lines[0].replace(':0,"att', ':1,"att'), *lines[1:]], "of start 1, start is 1 and not 0"),
        (lambda lines: [lines[0].replace('plan":"', 'plan":"o'), *lines[1:]], "of start 1, plan is 'o"),
    ],
    ids=["reversed", "swapped", "doubled", "foreign", "twice", "saves", "start", "plan"],
)
def test_a_log_that_no_single_run_writes_is_named(
    planned: tuple[Path, Plan, list[str]], harm: Callable[[list[str]], list[str]], reason: str
) -> None:
    attempt(planned, 1, range(0, 6), 2)
    file = planned[0] / "audit" / "rank-1.jsonl"
    file.write_text("".join(harm(file.read_text().splitlines(keepends=True))))
    problem = audit(planned[0]).problems[0]
    assert problem.startswith(f"{file} line ")
    assert reason in problem


def test_a_log_of_a_rank_that_was_not_there(planned: tuple[Path, Plan, list[str]]) -> None:
    attempt(planned, 1, range(0, 6), 2)
    file = planned[0] / "audit" / "rank-1.jsonl"
    file.with_stem("rank-2").write_text(file.read_text())
    found = audit(planned[0])
    assert found.problems == [f"{file.with_stem('rank-2')} line 1: there was no rank 2: start 1 had 2 ranks"]
    assert found.steps == 6


def test_a_start_that_was_taken_over_may_write_on_for_some_steps(planned: tuple[Path, Plan, list[str]]) -> None:
    """As one that was suspended does, up to its next save."""
    run_dir = planned[0]
    attempt(planned, 1, range(0, 7), 2)
    attempt(planned, 2, range(3, 6), 1)
    file = run_dir / "audit" / "rank-0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:5], *lines[8:], *lines[5:8]]))
    attempt(planned, 3, range(6, 8), 1)
    found = audit(run_dir)
    assert (found.steps, found.problems) == (8, [])


def test_a_step_that_one_rank_did_not_finish_is_no_step(planned: tuple[Path, Plan, list[str]]) -> None:
    attempt(planned, 1, range(0, 3), 2)
    file = planned[0] / "audit" / "rank-1.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:9])
    assert audit(planned[0]).steps == 2
    attempt(planned, 2, range(2, 4), 2)
    found = audit(planned[0])
    assert found.problems == []
    assert found.steps == 4


def test_a_sample_may_be_named_as_a_key_of_the_log(planned: tuple[Path, Plan, list[str]]) -> None:
    attempt(planned, 1, range(0, 2), 1, wrong={0: "attempt", 1: "start"})
    attempt(planned, 2, range(2, 3), 1)
    assert last_attempt(planned[0]) == 2


def test_relative_paths_are_those_of_where_the_run_was_started(
    planned: tuple[Path, Plan, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(planned, 1, range(0, 3), 1)
    file = planned[0] / "recipe.yaml"
    file.write_text(file.read_text().replace(f"{tmp_path}/run", "./run").replace(f"{tmp_path}/set", "set"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = audit("../run")
    assert (found.steps, found.problems) == (3, [])
    assert Path.cwd() == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        ("start", "the line of the start before its first 4 steps cannot be read"),
        ("key", "the line of the start before its first 4 steps cannot be read"),
        ("zeros", "no line of it can be read"),
        ("link", "is a link to nothing (/nowhere/rank.jsonl)"),
        ("folder", "is a folder"),
    ],
)
def test_a_log_that_cannot_be_read_is_named(planned: tuple[Path, Plan, list[str]], harm: str, reason: str) -> None:
    attempt(planned, 1, range(0, 4), 2)
    logs = [planned[0] / "audit" / f"rank-{rank}.jsonl" for rank in (1, 0)]
    for file in logs:
        content = file.read_bytes()
        file.unlink()
        if harm == "link":
            file.symlink_to("/nowhere/rank.jsonl")
        elif harm == "folder":
            file.mkdir()
        else:
            changed = {"start": b"[" + content[1:], "key": content.replace(b"attempt", b"attempu")}
            file.write_bytes(changed.get(harm, bytes(len(content))))
        if file == logs[0]:
            assert f"{file}: {reason}" in audit(planned[0]).problems
    with pytest.raises(UserError, match=re.escape(f"{logs[1]}: {reason}: put a whole copy in its place")):
        audit(planned[0])


@pytest.mark.parametrize("harm", ["link", "folder", "no folder"])
def test_a_log_that_cannot_be_written_is_named(tmp_path: Path, harm: str) -> None:
    file = tmp_path / "audit" / "rank-0.jsonl"
    if harm == "no folder":
        file = tmp_path / "audit"
    file.parent.mkdir(exist_ok=True)
    if harm == "folder":
        file.mkdir()
    else:
        file.symlink_to("/nowhere/rank.jsonl")
    with pytest.raises(UserError, match=f"^{file}: a log has to be written there .*: remove what is in its place"):
        AuditLog(tmp_path, 0, start=0, attempt=1, world=1, plan="p")


def test_no_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no audit log"):
        audit(tmp_path)
