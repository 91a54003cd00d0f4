"""Read what is not on this machine: whole files through webdataset's openers, kept in a bounded cache.

Streaming a shard over a network makes every dropped connection a training failure, so a remote shard is copied whole,
checked against its checksum and only then read. webdataset's openers (`webdataset.gopen`) do the transfer, so whatever
they can read (http, https, gs, hf, ais, sftp and `pipe:` with any command) works here; they cannot resume, so a broken
transfer starts again from its first byte.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import re
import select
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any

import xxhash

from lbr_dist.disk import FULL, usable_folder
from lbr_dist.errors import UserError

log = logging.getLogger("lbr")

ATTEMPTS = 5
"""Transfers tried before a remote file is given up."""
BACKOFF_S = 1.0
"""Wait before the second attempt, in seconds; doubles with each further one."""
STALL_S = 60.0
"""A transfer that brings no byte for this many seconds is ended and tried again."""
CHUNK = 1 << 16
FILE = re.compile(r"[0-9a-f]{32}")
"""Names of the files in a cache: their XXH3-128."""
BY_CURL = re.compile(r"(?:https?|sftp|ftps|scp)://[^/?#]*")
"""What an address begins with that curl transfers."""
CURL = {
    3: "the address is malformed",
    6: "no such host",
    7: "nobody answers there",
    18: "the transfer ended early",
    22: "the server refuses: a wrong path, or no permission (HTTP status 400 or more)",
    28: "it took too long",
    35: "no TLS connection came about",
    47: "it redirects without end",
    52: "the server answers nothing",
    56: "the connection broke",
    60: "the server's certificate is not trusted",
}
"""What curl, which transfers http and https, means by its exit codes."""


def is_url(path: str) -> bool:
    """Whether `path` is for webdataset's openers (`scheme://...` or `pipe:...`) rather than a local path."""
    return "://" in path or path.startswith("pipe:")


def join(root: str, name: str) -> str:
    """Address of the file `name` below `root`; a `pipe:` root must hold `{}`, which becomes the quoted name.

    Raises:
        UserError: a `pipe:` root without `{}`.
    """
    if root.startswith("pipe:"):
        if "{}" not in root:
            raise UserError(f"{root}: a prepared set behind pipe: needs {{}} in place of the file's name")
        return root.replace("{}", shlex.quote(name))
    return f"{root.rstrip('/')}/{name}"


class UnreachableError(UserError):
    """A remote file could not be read: a wrong address or, where others were read before, a server that is away."""


def fetch(url: str, target: Path, *, size: int | None = None, xxh128: str | None = None) -> None:
    """Copy `url` to the file `target`, whole or not at all.

    Args:
        size: expected bytes; None: not known.
        xxh128: expected XXH3-128 in hexadecimal; None: not known.

    Raises:
        UnreachableError: it could not be read in `ATTEMPTS` attempts.
        UserError: no opener exists for it, or the disk is full.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.partial")
    problem = ""
    try:
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                with partial.open("wb") as out:
                    got, digest = _transfer(url, out)
            except FileNotFoundError as error:
                what = "no such file" if url.startswith("file:") else "the program that reads it is missing"
                raise UserError(f"{url}: {what} ({error.filename})") from error
            except ValueError as error:
                raise UserError(f"{url}: webdataset has no opener for this address ({error})") from error
            except OSError as error:
                if error.errno in FULL:
                    raise UserError(
                        f"{target.parent}: the disk is full: no room for {url}: free space there, or choose another "
                        "place (a cache of shards: data.cache_dir, or a lower data.cache_gib; of indexes: "
                        "XDG_CACHE_HOME)"
                    ) from error
                problem = str(error)
                continue
            if size is not None and got != size:
                problem = f"{got} of {size} bytes arrived"
            elif xxh128 is not None and digest != xxh128:
                problem = f"checksum {digest} instead of {xxh128}"
            else:
                partial.replace(target)
                return
    finally:
        partial.unlink(missing_ok=True)
    raise UnreachableError(
        f"{url}: could not be read in {ATTEMPTS} attempts (last: {problem}): check the address and the connection"
    )


class ShardCache:
    """Remote files on local disk, named by content, bounded in bytes; shared safely by any number of processes.

    The least recently used files go first. One file is always kept, even when it alone is larger than the bound.
    Whoever has one open that goes closes it when it opens another (`ShardReader`), so that its space is free.
    """

    def __init__(self, folder: Path, gib: float) -> None:
        self.folder, self._usable = folder, False
        self.limit = int(gib * (1 << 30))

    def open(self, url: str, *, size: int, xxh128: str) -> int:
        """File descriptor (read only) of the cached copy of `url`, fetched first if needed; the caller closes it.

        Raises:
            UserError: the folder cannot be written, or it could not be fetched.
        """
        if not self._usable:
            usable_folder(self.folder, f"data.cache_dir {self.folder}")
            self._usable = True
        path = self.folder / xxh128
        with _locked(self.folder / f"{xxh128}.lock") as held:
            while (descriptor := _whole(path, size)) is None:
                for left in self.folder.glob(f".{xxh128}.*.partial") if held else ():  # by a process that was killed
                    left.unlink(missing_ok=True)
                fetch(url, path, size=size, xxh128=xxh128)
        self._evict(keep=path)
        return descriptor

    def discard(self, xxh128: str) -> None:
        """Remove a file, which is then fetched again."""
        (self.folder / xxh128).unlink(missing_ok=True)

    def _evict(self, keep: Path) -> None:
        with _locked(self.folder / "evict.lock"):
            files = []
            for entry in self.folder.iterdir():
                if FILE.fullmatch(entry.name) and entry.is_file():  # the folder may hold other files: not ours
                    with contextlib.suppress(FileNotFoundError):  # another process found it damaged
                        status = entry.stat()
                        files.append((status.st_mtime_ns, entry, status.st_size))
            total = sum(size for _, _, size in files)
            for _, entry, size in sorted(files):
                if total <= self.limit:
                    break
                if entry != keep:
                    entry.unlink(missing_ok=True)
                    total -= size


def _whole(path: Path, size: int) -> int | None:
    """A descriptor of the file, which from now on was used last; None: it is not there, or not whole.

    Another process may evict the file at any moment; what is open stays readable.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.is_file() and path.stat().st_size == size:
            os.utime(path)
            return os.open(path, os.O_RDONLY)
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock; where the file system has none (False), two processes may fetch a file twice, and no more."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except OSError as error:
            _warn_of_no_lock(path.parent, error.strerror)
            held = False
        yield held


@functools.cache
def _warn_of_no_lock(folder: Path, problem: str) -> None:
    """Once for each folder and process."""
    log.warning("%s: no lock to be had (%s): two processes may fetch the same shard", folder, problem)


def _transfer(url: str, out: IO[bytes]) -> tuple[int, str]:
    digest = xxhash.xxh3_128()
    got = 0
    with contextlib.closing(_chunks(url)) as chunks:
        for chunk in chunks:
            out.write(chunk)
            digest.update(chunk)
            got += len(chunk)
    return got, digest.hexdigest()


def _chunks(url: str) -> Generator[bytes]:
    """The bytes behind `url`; an opener's process is ended when it stalls, or when they are not read to the end.

    Raises:
        OSError: it stalled or failed.
    """
    from webdataset.gopen import Pipe

    stream: Any = _opened(url)
    if not isinstance(stream, Pipe):
        with stream:
            while chunk := stream.read(CHUNK):
                yield chunk
        return
    descriptor, whole = stream.stream.fileno(), False
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    try:
        while not whole:
            if not waiting.poll(STALL_S * 1000):
                raise OSError(f"no byte came for {STALL_S:g} s")
            chunk = os.read(descriptor, CHUNK)
            whole = not chunk
            if chunk:
                yield chunk
    finally:
        if not whole:
            _kill(stream.proc)
        stream.ignore_errors = True  # webdataset's error has the whole command in it
        stream.close()
    if stream.status not in stream.ignore_status:
        raise OSError(_why(url, stream.status))


def _opened(url: str) -> Any:
    """webdataset's stream of `url`, but that the processes of a `pipe:` are a session of their own."""
    from webdataset import utils
    from webdataset.gopen import Pipe, gopen, rewrite_url

    if host := BY_CURL.match(url):  # a space ends the address for curl, and brackets and braces make several of it
        url = host[0] + re.sub(r"[][{} ]", lambda found: f"%{ord(found[0]):02X}", url[host.end() :])
    place = rewrite_url(url)
    if not place.startswith("pipe:") or utils.enforce_security:
        return gopen(url, "rb")
    return Pipe(place.removeprefix("pipe:"), mode="rb", shell=True, ignore_status=[141], start_new_session=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and, where it leads a session of its own, what it started: a shell's commands outlive it."""
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _why(url: str, status: int) -> str:
    named = CURL.get(status) if url.startswith(("http://", "https://")) else None
    return named or f"the program that reads it ended with exit code {status}"
