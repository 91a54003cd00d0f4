"""Folders that appear whole, locks, and what a full disk says."""

from __future__ import annotations

import errno
import logging
import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lbr_dist import disk as module
from lbr_dist.disk import cache_folder, locked, new_folder, replacing, room, usable_folder
from lbr_dist.errors import UserError


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with new_folder(out, "make out") as folder:
        (folder / "x").touch()
        assert not out.exists()
    assert [file.name for file in out.iterdir()] == ["x"]
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "b", "make b") as folder:
        (folder / "nothing").rename(folder / "x")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_modes_are_those_of_new_files_whatever_wrote_them(tmp_path: Path) -> None:
    (tmp_path / "group").mkdir()
    (tmp_path / "group").chmod(0o2775)
    before = os.umask(0o002)
    try:
        with new_folder(tmp_path / "group" / "out", "make out") as folder:
            (folder / "weights").touch(0o600)
            (folder / "tool").touch(0o700)
    finally:
        os.umask(before)
    out = tmp_path / "group" / "out"
    modes = [oct(path.stat().st_mode & 0o7777) for path in (out, out / "weights", out / "tool")]
    assert modes == ["0o2775", "0o664", "0o700"]


def test_what_was_written_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="make out: something else was written there"), new_folder(out, "make out"):
        (out / "theirs").mkdir(parents=True)
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "theirs"]


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link", "make it") as folder:
        (folder / "x").touch()
    assert (tmp_path / "real" / "x").is_file()
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UserError, match="make it: "), new_folder(tmp_path / "round", "make it"):
        pass


HALF_WRITTEN = """
import sys, time
from pathlib import Path
from lbr_dist.disk import new_folder
with new_folder(Path(sys.argv[1]), "make it") as folder:
    (folder / "half").write_text("a")
    print(folder.name, flush=True)
    time.sleep(60)
"""


def test_a_command_that_is_terminated_leaves_no_half_written_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HALF_WRITTEN, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert (tmp_path / process.stdout.readline().strip() / "half").exists()
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_command_left_is_removed_by_the_next_and_not_what_one_at_work_writes(tmp_path: Path) -> None:
    other = tmp_path / ".out2-0123abcd"
    for file in (other / "x", tmp_path / ".out-of-hand" / "x", tmp_path / ".out-89abcdef"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    kept = sorted(tmp_path.iterdir())
    command = [sys.executable, "-c", HALF_WRITTEN, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        half = tmp_path / process.stdout.readline().strip()
        with new_folder(tmp_path / "out", "make it") as folder:
            assert sorted(tmp_path.iterdir()) == sorted([*kept, half, folder])
        process.kill()
    (tmp_path / "out").rmdir()
    assert (half / "half").exists()
    with new_folder(tmp_path / "out", "make it") as folder:
        assert sorted(tmp_path.iterdir()) == sorted([*kept, folder])


def test_a_folder_that_is_swept_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, swept = module.fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        if not swept:
            swept.extend(tmp_path.iterdir())
            swept[0].rmdir()
        real(descriptor, how)

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with new_folder(tmp_path / "out", "make it") as folder:
        assert folder not in swept
        (folder / "x").touch()
    assert (tmp_path / "out" / "x").exists()


def test_without_locks_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", flock)
    (tmp_path / ".out-0123abcd").mkdir()
    with new_folder(tmp_path / "out", "make it") as folder:
        (folder / "x").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out-0123abcd", "out"]


def test_what_cannot_become_a_new_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out, message in (
        (tmp_path / "file", "it is a file"),
        (tmp_path / "file" / "out", "cannot be made"),
        (tmp_path / ("n" * 300), "cannot be made"),
        (tmp_path, "is not empty"),
        (Path(), "it is the current folder"),
        (Path("/proc"), "is not empty"),
    ):
        with pytest.raises(UserError, match=f"export: .*{message}"), new_folder(out, "export"):
            pass


def test_a_full_disk_is_an_error_of_the_user_and_a_fault_of_the_machine_is_not() -> None:
    with pytest.raises(UserError, match="x: No space left on device; free some"), room("x", "free some"):
        raise OSError(errno.ENOSPC, "written otherwise")
    with pytest.raises(OSError, match="fault"), room("x", "free some"):
        raise OSError(errno.EIO, "fault")


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    out = tmp_path / "plot.png"
    for content in ("first", "second"):
        with replacing(out) as file:
            assert file.suffix == ".png"
            file.write_text(content)
        assert out.read_text() == content
    with pytest.raises(TypeError), replacing(out) as file:
        file.open("w").writelines(["thi", None])  # type: ignore[list-item]
    with pytest.raises(FileNotFoundError), replacing(out):
        pass
    assert out.read_text() == "second"
    assert list(tmp_path.iterdir()) == [out]


def test_of_two_that_replace_a_file_the_last_has_it(tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    with replacing(out) as last:
        last.write_text("the last, and longer")
        with replacing(out) as first:
            first.write_text("the first")
        assert out.read_text() == "the first"
    assert out.read_text() == "the last, and longer"
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_will_be_written_is_tried_first(tmp_path: Path) -> None:
    usable_folder(tmp_path / "a" / "b", "--out a/b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out f: it is a file"):
        usable_folder(tmp_path / "file", "--out f")
    with pytest.raises(UserError, match="--out f: cannot be written"):
        usable_folder(tmp_path / "file" / "f", "--out f")


def test_a_lock_is_held_once_and_names_its_holder(tmp_path: Path) -> None:
    with locked(tmp_path, "encode"), pytest.raises(UserError, match=r"encode: process .* is writing it"):
        locked(tmp_path, "encode").__enter__()
    with locked(tmp_path, "encode"):
        pass


def test_a_folder_whose_holder_removed_it_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the lock's file and locking it, the one before ended and removed the folder."""
    real = module.fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        real(descriptor, how)
        (tmp_path / "lock").unlink()

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with pytest.raises(UserError, match="is writing it"), locked(tmp_path, "encode"):
        pass


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), locked(tmp_path, "encode"):
        pass
    assert "no lock to be had" in caplog.text


def test_one_cache_also_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("shards") == tmp_path / "xdg/lbr_dist/shards"
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # as if it were not set
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("search") == tmp_path / "home/.cache/lbr_dist/search"

    def nobody(user: int) -> None:
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 71234)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert cache_folder("search").parts[-4:] == ("home-71234", ".cache", "lbr_dist", "search")
