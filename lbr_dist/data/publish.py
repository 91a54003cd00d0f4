"""Make a folder appear whole or not at all.

Everything is written to a hidden folder beside the target, flushed to disk, and renamed in one step. What a killed run
leaves behind is hidden and can never be taken for a finished set. The next run removes it, except for the committed
blocks of the very same job (`resumable`), from which it goes on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lbr_dist.data.manifest import manifest_of
from lbr_dist.data.shard_writer import SPLITS
from lbr_dist.data.shards import open_set, verify
from lbr_dist.disk import is_mount, sync, take_lock
from lbr_dist.errors import UserError, printable

log = logging.getLogger("lbr")

RESUME = "resume"
"""Folder of the workspace that outlives a killed run."""
NAMES = {"manifest.json", "report.json", "report.md", "mined.jsonl", "surprisal", *SPLITS}
"""What `lbr prepare`, `lbr mine` and `lbr surprisal` write into a set's folder,"""
ENDINGS = {".tar", ".parquet"}
"""and into that of a side."""
MOST_NAMED = 3
"""Names of others' files in a message."""


class TakenError(UserError):
    """Something else lies where a set was to appear; `workspace` keeps what is done."""


def check_target(out: Path) -> Path:
    """Where `out` really lies, links followed; what is not ours to replace is refused, before anything is read.

    Raises:
        UserError: it is no folder, or one that holds something else than a prepared set, or one that no rename can
            replace, or lies in the folder of a prepared set, which is never replaced with something else in it.
    """
    try:
        place = out.resolve()
        if printable(str(place)) != str(place):  # pyarrow takes no other path
            raise UserError(f"--out {printable(str(place))}: its name is not UTF-8: choose another folder")
        if place.is_dir():
            if _is_foreign(place):
                raise UserError(f"--out {out}: is not empty and holds no prepared set: choose another folder")
            if Path.cwd().is_relative_to(place):
                raise UserError(f"--out {out}: is the current folder or holds it: name a folder to make in it")
            if is_mount(place):
                raise UserError(f"--out {out}: a file system is mounted there: name a folder to make in it")
        elif place.exists():
            raise UserError(f"--out {out}: is not a folder: choose another")
        if holder := next((folder for folder in place.parents if manifest_of(folder) is not None), None):
            raise UserError(
                f"--out {out}: lies in the prepared set {holder}, which then could not be replaced: name another folder"
            )
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise UserError(f"--out {out}: cannot be used ({error}): choose another folder") from None
    return place


def finished(
    out: Path, origin: dict[str, Any], overwrite: bool, difference: Callable[[Any], str]
) -> dict[str, Any] | None:
    """Report of the set in `out` if it was made from the same input; None: there is none, or it may be replaced.

    Args:
        origin: what the set is to be made from, as its manifest will say.
        overwrite: whether another set, or a damaged one, may be replaced; every byte is then checked.
        difference: says what differs from the `input` of another set's manifest.

    Raises:
        TakenError: there is another set, or a damaged one, and `overwrite` is off, or something else lies in its
            folder.
    """
    if not (out / "manifest.json").is_file() or _is_foreign(out):
        return None
    try:
        opened = open_set(out)
        made_from = opened.manifest["input"]
        if made_from == json.loads(json.dumps(origin)):
            if overwrite:
                verify(opened)
            return json.loads((out / "report.json").read_text(encoding="utf-8"))
        problem = f"holds a set made from other input ({difference(made_from)})"
    except (UserError, OSError, ValueError) as error:
        problem = f"holds a damaged set ({error})"
    if not overwrite:
        raise TakenError(f"--out {out}: {problem}: choose another folder, or replace it with --overwrite")
    if others := _others(out):
        more = f" and {len(others) - MOST_NAMED} more" * (len(others) > MOST_NAMED)
        raise TakenError(
            f"--out {out}: {problem}, and what is no part of it: {', '.join(others[:MOST_NAMED])}{more}: --overwrite "
            "would remove that too: move it away, or choose another folder"
        )
    return None


@contextlib.contextmanager
def workspace(out: Path, *, dear: bool = False) -> Iterator[Path]:
    """A folder beside `out` to work in, removed at the end; empty but for what `resumable` may use.

    Committed blocks stay for the next run if this one is killed, interrupted, or fails for a reason that lies neither
    in its input nor in a full disk (a lost worker, memory, a fault of the storage); for these too if they are `dear`.

    Raises:
        UserError: another process writes the same `out`, the folder cannot be made, or the disk is full.
    """
    folder = out.parent / f".{out.name}.preparing"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}): choose another") from error
    try:
        if not take_lock(lock, folder):
            raise UserError(f"--out {out}: another lbr process is writing it: wait for it, or choose another")
        try:
            _restore(out)
            _clear(folder)
            yield folder
        except UserError as error:
            _leave(folder, keep=dear or isinstance(error, TakenError))
            raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            kept = _leave(folder, keep=dear or not full)
            if full:
                left = f"what is done is kept in {folder}" if kept else "nothing was left behind"
                raise UserError(
                    f"--out {out}: the disk is full ({error.strerror}); {left}: free space and run again, or choose a "
                    "folder on another disk"
                ) from error
            if error.errno == errno.EROFS:
                raise UserError(f"--out {out}: the file system became read-only: mend that and run again") from error
            raise
        except BaseException:
            _leave(folder, keep=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def resumable(work: Path, job: Any) -> Path:
    """The folder in the workspace `work` for committed blocks: with those of an earlier run if it had the same `job`.

    Args:
        job: everything that decides the blocks; JSON-able.
    """
    folder = work / RESUME
    description, wanted = folder / "job.json", json.dumps(job, sort_keys=True).encode()
    if not (description.is_file() and description.read_bytes() == wanted):
        _remove(folder)
        folder.mkdir()
        temporary = folder / "job.tmp"
        temporary.write_bytes(wanted)
        temporary.replace(description)
    return folder


def publish(folder: Path, out: Path) -> None:
    """Flush `folder` to disk and rename it to `out`, in place of an older set or an empty folder.

    Raises:
        TakenError: something else was written there meanwhile.
    """
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)
    old = _old(out)
    try:
        if out.exists():
            if not out.is_dir() or _is_foreign(out) or _others(out):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            out.rename(old)
        folder.rename(out)
    except OSError as error:
        if old.exists() and not out.exists():
            with contextlib.suppress(OSError):  # the next `workspace` does it then
                old.rename(out)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise TakenError(
            f"--out {out}: something else was written there meanwhile: move it away and run again; what is done is kept"
        ) from None
    try:
        sync(out.parent)
    except OSError as error:
        log.warning("%s is complete, but its name may not be on disk yet (%s)", out, error.strerror)
    _remove(old)


def _is_foreign(folder: Path) -> bool:
    """Whether a folder holds something, and that is no prepared set; a damaged manifest is ours by the names beside."""
    names = {entry.name for entry in folder.iterdir()}
    if not (folder / "manifest.json").is_file():
        return bool(names)
    try:
        json.loads((folder / "manifest.json").read_bytes())
    except (ValueError, RecursionError):
        return not names <= NAMES
    return manifest_of(folder) is None


def _others(folder: Path) -> list[str]:
    """What lies in a set's folder and is no part of a set, for messages."""
    found = [entry.name for entry in folder.iterdir() if entry.name not in NAMES]
    for side in SPLITS:
        if (folder / side).is_dir():
            found += [f"{side}/{entry.name}" for entry in (folder / side).iterdir() if entry.suffix not in ENDINGS]
    return [printable(name) for name in sorted(found)]


def _restore(out: Path) -> None:
    """Finish what a run that ended between the two renames of an overwrite left."""
    old = _old(out)
    if old.exists():
        if out.exists():
            _remove(old)
        else:
            old.rename(out)


def _leave(folder: Path, *, keep: bool) -> bool:
    """Remove what a failed run made; returns whether committed blocks were there to be kept, and were."""
    with contextlib.suppress(OSError):  # the fault that ended the run may be the storage's
        if keep:
            _clear(folder)
        if keep and any((folder / RESUME).glob("*/*")):
            return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _clear(folder: Path) -> None:
    """Remove what a run left, except for committed blocks."""
    for entry in folder.iterdir():
        if entry.name != RESUME:
            _remove(entry)


def _old(out: Path) -> Path:
    return out.parent / f".{out.name}.old"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
