"""Make a folder appear whole or not at all.

Everything is written to a hidden folder beside the target, flushed to disk, and renamed in one step. What a killed run
leaves behind is hidden, can never be taken for a finished set, and is removed by the next run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lbr_dist.errors import UserError


@contextlib.contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` to work in, removed at the end.

    Raises:
        UserError: another process prepares the same `out`, the folder cannot be made, or the disk is full.
    """
    folder = out.parent / f".{out.name}.preparing"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _restore(out)
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}): choose another") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another lbr prepare is writing it: wait for it, or choose another") from None
        try:
            for entry in folder.iterdir():  # what a killed run left
                _remove(entry)
            yield folder
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(
                    f"--out {out}: the disk is full ({error.strerror}); nothing was left behind: "
                    "free space or choose a folder on another disk"
                ) from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def publish(folder: Path, out: Path) -> None:
    """Flush `folder` to disk and rename it to `out`, in place of an older one."""
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)
    old = _old(out)
    if out.exists():
        out.rename(old)
    folder.rename(out)
    _sync(out.parent)
    _remove(old)


def _restore(out: Path) -> None:
    """Finish what a run that was killed between the two renames of an overwrite left."""
    old = _old(out)
    if old.exists():
        if out.exists():
            _remove(old)
        else:
            old.rename(out)


def _old(out: Path) -> Path:
    return out.parent / f".{out.name}.old"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
