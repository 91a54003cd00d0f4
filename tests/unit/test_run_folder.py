"""Which changed recipes may go on with a run."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from lbr_dist.config import Recipe
from lbr_dist.errors import UserError
from lbr_dist.launch import ray_stage
from lbr_dist.recipes import parse_recipe
from lbr_dist.training.faults import FaultError, storage_named
from lbr_dist.training.run_folder import check_folder, check_same, claim


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model and a run to start from."""
    for folder in ("base", "other", "stage1"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(model: str = "base", **more: Any) -> Recipe:
    raw = {
        "stage": "contrastive",
        "output": "run",
        "model": {"path": model, "start_from": "stage1"},
        "data": {"sets": [{"path": "d"}]},
        "batch": {"global_batch": 2},
        "duration": {"steps": 1},
    }
    return parse_recipe({**raw, **more}, "test")


def test_a_run_goes_on_under_another_launcher(place: Path) -> None:
    """Ray's drivers make paths absolute; the others leave them relative to the folder they are started in."""
    ray = ray_stage.absolute(recipe(), place)
    assert ray.model.path == str(place / "base")
    claim(recipe())
    assert check_same(place / "run", ray) == []
    claim(ray)
    assert check_same(place / "run", recipe()) == []


@pytest.mark.parametrize("model", ["other", "org/base", "nowhere/base"])
def test_another_model_is_refused(place: Path, model: str) -> None:
    claim(recipe())
    with pytest.raises(UserError, match=r"model\.path was 'base' and is"):
        check_same(place / "run", recipe(model))
    claim(recipe(model))
    with pytest.raises(UserError, match=rf"model\.path was '{model}' and is"):
        check_same(place / "run", ray_stage.absolute(recipe(), place))


def test_a_link_to_storage_that_is_away_is_named(place: Path) -> None:
    target = place / "scratch" / "checkpoints"
    (place / "run").mkdir(exist_ok=True)
    (place / "run" / "checkpoints").symlink_to(target)
    with pytest.raises(UserError, match=f"^run/checkpoints: is a link to {target}, which is not there: mount it"):
        check_folder(recipe(), resume="auto")


def test_a_run_folder_is_no_checkpoint_to_resume_from(place: Path) -> None:
    claim(recipe())
    for given in ("run", "always"):
        said = rf"--resume {given}: is no checkpoint.*give auto \(.*never \(.*or the path .*a folder in run/checkpoints"
        with pytest.raises(UserError, match=said):
            check_folder(recipe(), resume=given)


def test_a_field_that_no_recipe_has_is_not_allowed_in_silence(place: Path) -> None:
    for name in ("optim", "optim.lr", "data.sets", "data.sets.0", "data.sets.12.path", "contrastive.matryoshka.dims"):
        assert check_folder(recipe(), resume="auto", allow_change=["seed", name]) == []
    for name in ("optim.foo", "optim.l", "data.sets.path", "specials"):
        with pytest.raises(UserError, match=f"--allow-change {name}: no such field: give a name, or a section"):
            check_folder(recipe(), resume="auto", allow_change=["seed", name])


def test_a_start_that_failed_or_was_killed_while_it_claimed_the_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lbr_dist.training.run_folder.sync", full)
        with pytest.raises(OSError, match="No space left"):
            claim(recipe())
    assert not list((place / "run").iterdir())
    (place / "run" / ".recipe.yaml.tmp").write_text("stage: gen")  # as a kill in the middle of a write leaves it
    assert check_folder(recipe(), resume="auto") == []
    claim(recipe())
    assert [path.name for path in (place / "run").iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "more can be written there"), (errno.EACCES, "this user may read and write there")],
)
def test_what_every_start_meets_again_is_a_mistake_and_not_a_fault(number: int, remedy: str) -> None:
    said = f"^run/lock: .*: see to it that {remedy}, and run again"
    with pytest.raises(UserError, match=said), storage_named(Path("run")):
        raise OSError(number, os.strerror(number), "run/lock")
    with (
        pytest.raises(FaultError, match="the storage works"),
        storage_named(Path("run")),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "run/lock")
    with pytest.raises(FileNotFoundError, match="run/lock"), storage_named(Path("run")):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "run/lock")
    with (
        pytest.raises(UserError, match=f"^run, the temporary folder or /dev/shm: .*: see to it that {remedy}"),
        storage_named(Path("run")),
    ):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("damage", [b"", b"\0\0\0", b"stage: [", b"\xff\xfe"])
def test_a_damaged_recipe_is_named_with_its_copy(place: Path, damage: bytes) -> None:
    """As a machine that loses its power can leave it."""
    claim(recipe())
    (place / "run/recipe.yaml").write_bytes(damage)
    with pytest.raises(UserError, match=r"run/recipe\.yaml: (not valid YAML|expected a mapping)") as alone:
        check_same(place / "run", recipe())
    assert "copy" not in str(alone.value)
    for step in (999_999, 1_000_000):
        (place / f"run/checkpoints/step-{step:06d}").mkdir(parents=True)
        (place / f"run/checkpoints/step-{step:06d}/recipe.yaml").touch()
    with pytest.raises(UserError, match=r"hold a copy: .*run/checkpoints/step-1000000/recipe\.yaml\)"):
        check_same(place / "run", recipe())
    (place / "run/recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"its recipe\.yaml is missing .*hold a copy: .*step-1000000/recipe\.yaml\)"):
        check_same(place / "run", recipe())
    with pytest.raises(UserError, match=r"^output run: its recipe\.yaml is missing: copy it back from run/.*-1000000/"):
        check_folder(recipe(), resume="auto")
