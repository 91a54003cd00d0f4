"""Where a prepared set may be made; what cannot be replaced by a rename is refused before anything is read."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prepared import domain, run, write

from lbr_dist.data import publish
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
