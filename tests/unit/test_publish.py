"""Where a prepared set may be made; what cannot be replaced by a rename is refused before anything is read."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prepared import domain, run, write

from lbr_dist.data import publish
from lbr_dist.data.preparation.pipeline import Pipeline
from lbr_dist.data.shards import open_set, verify
from lbr_dist.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> list[str]:
    return [str(write(tmp_path / "qa.jsonl", domain()))]


def test_links_lead_to_where_the_set_is_made(source: list[str], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk/set")  # not there yet
    run(source, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert verify(open_set(tmp_path / "disk/set"))
    assert run(source, tmp_path / "out").unchanged
    assert not run(source, tmp_path / "out", seed=1, overwrite=True).unchanged
    assert (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["set"]
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(UserError, match=r"--out .*circle: "):
        run(source, tmp_path / "circle")


def test_the_current_folder_is_not_replaced(source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match=r"--out \.: is the current folder or holds it"):
        run(source, Path())
    run(source, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out/gl")
    with pytest.raises(UserError, match=r"--out \.\.: is the current folder or holds it"):
        run(source, Path(".."), seed=1, overwrite=True)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A folder with a space in its name at which another of the same file system is bound, as containers do it."""
    place, other = tmp_path / "bound here", tmp_path / "other"
    place.mkdir()
    other.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "--bind", other, place], capture_output=True).returncode:
        pytest.skip("needs the right to mount (root)")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_mount_point_is_refused_at_once(source: list[str], mounted: Path) -> None:
    assert not os.path.ismount(mounted)  # what the standard library sees of it
    with pytest.raises(UserError, match="a file system is mounted there: name a folder to make in it"):
        run(source, mounted)
    assert not run(source, mounted / "set").unchanged


@pytest.mark.parametrize("fault", [UserError("no such device"), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("dear", [True, False])
def test_dear_blocks_outlive_a_mistake_and_a_full_disk(tmp_path: Path, fault: Exception, dear: bool) -> None:
    def work() -> None:
        with publish.workspace(tmp_path / "out", dear=dear) as folder:
            blocks = publish.resumable(folder, {"job": 1}) / "blocks"
            blocks.mkdir()
            (blocks / "000001.npy").write_bytes(b"hours")
            (folder / "set").mkdir()
            raise fault

    with pytest.raises(UserError, match=r"device"):
        work()
    left = sorted(path.name for path in (tmp_path / ".out.preparing").rglob("*"))
    assert left == (["000001.npy", "blocks", "job.json", "resume"] if dear else [])


def test_a_file_system_that_becomes_read_only(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The committed blocks stay, and the next run uses them."""

    def fail(folder: Path, out: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    real: Any = publish.publish
    monkeypatch.setattr("lbr_dist.data.preparation.prepare.publish", fail)
    with pytest.raises(UserError, match="the file system became read-only: mend that and run again"):
        run(source, tmp_path / "out")
    assert list((tmp_path / ".out.preparing/resume/blocks").glob("*.npz"))
    monkeypatch.setattr("lbr_dist.data.preparation.prepare.publish", real)
    run(source, tmp_path / "out")
    assert verify(open_set(tmp_path / "out"))
    assert not (tmp_path / ".out.preparing").exists()


@pytest.mark.parametrize(
    "manifest", ['{"manifest_version": 3, "name": "x"}', '{"files": [], "format": 1}', "[1, 2]", "// notes\n{", ""]
)
def test_a_folder_with_the_manifest_of_another_program_is_kept(
    source: list[str], tmp_path: Path, manifest: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text(manifest)
    (tmp_path / "out/background.js").touch()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is not empty and holds no prepared set"):
            run(source, tmp_path / "out", overwrite=overwrite)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["background.js", "manifest.json"]


def test_a_set_whose_manifest_is_damaged_is_replaced(source: list[str], tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    (tmp_path / "out/surprisal").mkdir()  # as `lbr surprisal` does
    os.truncate(tmp_path / "out/manifest.json", 99)
    with pytest.raises(UserError, match=r"holds a damaged set .* or replace it with --overwrite"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", overwrite=True)
    assert verify(open_set(tmp_path / "out"))


@pytest.mark.parametrize("theirs", ["NOTES.md", "runs/s1/latest", "cl/mined/manifest.json"])
def test_a_set_is_not_replaced_with_what_else_lies_in_its_folder(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: str
) -> None:
    def write_theirs() -> None:
        (tmp_path / "out" / theirs).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / theirs).touch()

    def late(folder: Path, out: Path) -> None:
        write_theirs()
        real(folder, out)

    run(source, tmp_path / "out")
    write_theirs()
    assert run(source, tmp_path / "out", overwrite=True).unchanged
    named = "/".join(theirs.split("/")[: 1 + theirs.startswith("cl/")])
    with pytest.raises(UserError, match=rf"no part of it: {named}: --overwrite would remove that too: move it away"):
        run(source, tmp_path / "out", seed=1, overwrite=True)
    (tmp_path / "out" / named).rename(tmp_path / "away")
    real: Any = publish.publish
    monkeypatch.setattr("lbr_dist.data.preparation.prepare.publish", late)
    with pytest.raises(UserError, match="something else was written there meanwhile"):
        run(source, tmp_path / "out", seed=1, overwrite=True)
    assert (tmp_path / "out" / theirs).exists()


@pytest.mark.parametrize("theirs", ["out", "out/thesis.tex"])
def test_what_was_written_to_the_target_meanwhile_is_kept(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: str
) -> None:
    def late(folder: Path, out: Path) -> None:
        (tmp_path / theirs).parent.mkdir(exist_ok=True)
        (tmp_path / theirs).touch()
        real(folder, out)

    real: Any = publish.publish
    with monkeypatch.context() as patch:
        patch.setattr("lbr_dist.data.preparation.prepare.publish", late)
        with pytest.raises(UserError, match="something else was written there meanwhile: move it away and run again"):
            run(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / theirs).exists()
    assert list((tmp_path / ".out.preparing/resume/blocks").glob("*.npz"))
    (tmp_path / "out").rename(tmp_path / "away")
    run(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["away", "out", "qa.jsonl"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_set_that_was_put_there_meanwhile_is_as_one_that_was_there(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    def late(*args: Any) -> Any:
        report = real(*args)
        shutil.copytree(tmp_path / "other", tmp_path / "out")
        return report

    run(source, tmp_path / "other", seed=1)
    real: Any = Pipeline.run
    monkeypatch.setattr(Pipeline, "run", late)
    if overwrite:
        run(source, tmp_path / "out", overwrite=True)
    else:
        with pytest.raises(UserError, match=r"made from other input \(.*seed was 1, is 0\).*--overwrite"):
            run(source, tmp_path / "out")
        assert list((tmp_path / ".out.preparing/resume/blocks").glob("*.npz"))
    assert open_set(tmp_path / "out").manifest["seed"] == int(not overwrite)


def test_a_second_start_between_the_two_renames_of_an_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rename(path: Path, target: Path) -> Path:
        moved = real(path, target)
        if path == out:
            with pytest.raises(UserError, match="another lbr process is writing it"), publish.workspace(out):
                pass
        return moved

    out, real = tmp_path / "out", Path.rename
    out.mkdir()
    (out / "manifest.json").write_text("old")
    monkeypatch.setattr(Path, "rename", rename)
    with publish.workspace(out) as work:
        (work / "set").mkdir()
        (work / "set/manifest.json").write_text("new")
        publish.publish(work / "set", out)
    assert (out / "manifest.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("at", ["rename", "sync"])
def test_a_fault_within_an_overwrite_leaves_a_set_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    """At the second of the two renames the old set comes back; at the sync after them the new one is there."""

    def rename(path: Path, target: Path) -> Path:
        if target == out and path.name == "set":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_rename(path, target)

    def sync(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real_sync(path)

    out, real_rename, real_sync = tmp_path / "out", Path.rename, publish.sync
    out.mkdir()
    (out / "manifest.json").write_text("old")
    if at == "rename":
        monkeypatch.setattr(Path, "rename", rename)
    else:
        monkeypatch.setattr(publish, "sync", sync)
    fails = pytest.raises(UserError, match="disk is full") if at == "rename" else contextlib.nullcontext()
    with fails, publish.workspace(out) as work:
        (work / "set").mkdir()
        (work / "set/manifest.json").write_text("new")
        publish.publish(work / "set", out)
    assert (out / "manifest.json").read_text() == ("old" if at == "rename" else "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert ("may not be on disk yet" in caplog.text) == (at == "sync")


def test_a_workspace_that_its_holder_removed_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening it and locking it, the one before ended."""
    real = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        real(descriptor, how)
        (tmp_path / ".out.preparing").rmdir()

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="another lbr process is writing it"), publish.workspace(tmp_path / "out"):
        pass


def test_without_locks_on_the_file_system_a_set_is_made_all_the_same(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")  # Lustre, mounted without flock

    monkeypatch.setattr(fcntl, "flock", flock)
    run(source, tmp_path / "out")
    assert verify(open_set(tmp_path / "out"))
    assert "no lock to be had" in caplog.text
