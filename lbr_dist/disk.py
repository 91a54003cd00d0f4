"""Writing to disk: for everyone who publishes a file or a folder by renaming it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import xxhash

from lbr_dist.errors import UserError

log = logging.getLogger("lbr")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a disk that takes no more, whatever is written."""
DENIED = (errno.EACCES, errno.EPERM)
"""Errors of a file or folder that this user may not use."""
BROKEN = (errno.EIO, errno.ESTALE)
"""Errors of storage that fails, and may come back."""


def file_xxh128(path: Path) -> str:
    """XXH3-128 of a file's bytes, in hexadecimal."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries (new names, renames), to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A file beside `file` to write into, with the same ending, which becomes it at the end, and is on disk by then; if
    anything fails `file` stays as it was. Of several processes that write one, the last has it, whole."""
    temporary = file.with_name(f".tmp-{secrets.token_hex(4)}-{file.name}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def mark(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in ns: other ones say that a file changed; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def cache_folder(name: str) -> Path:
    """The folder `lbr_dist/name` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else home() / ".cache") / "lbr_dist" / name


def home() -> Path:
    """The user's home folder; a container's user may have none (no HOME, no entry in passwd): then, for the rest of the
    process, it is a folder among the temporary files, which other libraries find too."""
    try:
        return Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(Path(tempfile.gettempdir()) / f"home-{os.getuid()}")
        return Path.home()


def is_mount(place: Path) -> bool:
    """Whether something is mounted at a folder; os.path.ismount does not see what containers bind there."""
    if os.path.ismount(place):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return False
    mounted = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines)
    return str(place) in mounted


def usable_folder(folder: Path, what: str, remedy: str = "give another folder") -> None:
    """Make a folder for files that are written at the end; whether it can be written is found out now.

    Raises:
        UserError: it cannot, or it is a file; `what` names it in the message, and `remedy` says what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise UserError(f"{what}: it is a file; give a folder") from None
    except OSError as error:
        raise UserError(f"{what}: cannot be written ({error.strerror}); {remedy}") from None


@contextlib.contextmanager
def new_folder(out: Path, what: str) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out` at the end and is removed if anything fails.

    Modes are those that new files and folders have there (umask, a folder's group), also of what a library wrote for
    its owner alone, as safetensors does. A SIGTERM ends the process with 143, and leaves nothing; what a killed one
    left is removed by the next that makes `out`.

    Raises:
        UserError: `out` is a file, holds something, or cannot be made; or the disk is full. `what` names it.
    """
    try:
        place = out.resolve()
        if place.exists() and not place.is_dir():
            raise UserError(f"{what}: it is a file; choose another name")
        if place.is_dir() and any(place.iterdir()):
            raise UserError(f"{what}: it exists and is not empty; choose another folder or remove it")
        if is_mount(place) or Path.cwd().is_relative_to(place):
            raise UserError(f"{what}: it is the current folder, holds it, or is a mount; name a folder to make in it")
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        temporary, lock = _own_folder(place)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{what}: cannot be made ({reason}); choose another folder") from None
    try:
        with _exit_on_sigterm(), room(what, "nothing was left behind; free space, or choose a folder on another disk"):
            yield temporary
            _as_new_files(temporary)
            try:
                temporary.rename(place)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise UserError(f"{what}: something else was written there meanwhile; choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _own_folder(place: Path) -> tuple[Path, int]:
    """A new hidden folder beside `place`, and the descriptor that holds its lock where the file system has any."""
    while True:
        temporary = place.with_name(f".{place.name}-{secrets.token_hex(4)}")
        temporary.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another process swept it before it was locked
            lock = os.open(temporary, os.O_RDONLY)
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if temporary.exists():
                return temporary, lock
            os.close(lock)


def _sweep(place: Path) -> None:
    """Remove such folders of processes that were killed: nobody holds their locks."""
    for left in place.parent.glob(f".{glob.escape(place.name)}-{'[0-9a-f]' * 8}"):
        with contextlib.suppress(OSError):  # held, or on a file system without locks
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """A SIGTERM raises SystemExit, so that what is open is cleaned up; a handler that is there already stays."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _as_new_files(folder: Path) -> None:
    """Give files in `folder` that only their owner may read the mode of a new file there."""
    new = folder / f".mode-{secrets.token_hex(4)}"
    new.touch()
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and stat.S_IMODE(file.stat().st_mode) == 0o600:
            file.chmod(mode)


@contextlib.contextmanager
def room(what: str, remedy: str) -> Iterator[None]:
    """Turn a full or read-only disk into an error of the user.

    Raises:
        UserError: with what was to be written, and what to do.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"{what}: {os.strerror(error.errno)}; {remedy}") from error


def take_lock(descriptor: int, place: Path) -> bool:
    """Take the lock of an open file or folder, which ends with the descriptor; False: somebody holds it, or `place` is
    another one by now. Where the file system has no locks, a warning says so, and nobody holds any."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        log.warning("%s: no lock to be had (%s): see to it that no two commands use it", place, error)
    try:
        return os.path.samestat(os.fstat(descriptor), place.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold a lock on `folder` (flock on a file in it), which ends with the process, however it ends.

    Where the file system has no locks, a warning says so.

    Raises:
        UserError: another process holds it.
        OSError: the file cannot be made.
    """
    file = folder / "lock"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not take_lock(descriptor, file):
            holder = os.pread(descriptor, 300, 0).decode("utf-8", "replace").strip() or "another process"
            raise UserError(f"{what}: {holder} is writing it: wait for its end or stop it, or choose another output")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Within it no other process is within it for the same folder: the next one waits. No file is left there.

    Where the file system has no locks, nobody waits.

    Raises:
        OSError: there is no such folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
