"""Writes checkpoints behind the training loop: one thread per rank, one commit for all.

Every rank writes its files into one temporary folder and reports sizes, checksums and slices (or its error) to rank 0,
which checks that the slices tile every parameter and that it sees the files, writes the manifest, renames the folder,
replaces `latest` and only then removes old checkpoints. The ranks meet through a process group of their own (gloo, used
by these threads alone), not through marker files: an error or a dead rank reaches all of them at once, where markers on
a network file system arrive when its caches expire and a dead rank is a time-out to be guessed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import threading
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lbr_dist.disk import DENIED, FULL, mark, sync
from lbr_dist.errors import UserError
from lbr_dist.training.checkpoint import files
from lbr_dist.training.checkpoint import format as layout
from lbr_dist.training.checkpoint.format import FileEntry, Kind, Manifest
from lbr_dist.training.checkpoint.listing import newest
from lbr_dist.training.checkpoint.rotation import bring_back, remove_stale, rotate
from lbr_dist.training.checkpoint.tensor_file import NAMES, TensorSpec, write_tensors
from lbr_dist.training.collective import Team
from lbr_dist.training.run_folder import in_time

log = logging.getLogger("lbr")

MENDABLE = (*FULL, *DENIED)
"""What a restart meets again, and the user can mend; anything else may be storage that comes back."""
SLOWEST_WRITE = timedelta(hours=2)
"""How long a rank waits for the others' files; a rank that died is noticed at once."""


@dataclass
class TensorFile:
    """A safetensors file of this rank, in host memory: `tensors` stay untouched until it is written."""

    kind: Kind
    tensors: dict[str, torch.Tensor]
    slices: list[tuple[int, int, int]] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Problem:
    text: str
    mendable: bool


_SHARED = "the run folder must be on storage that all nodes share, and mounted"


class StorageError(RuntimeError):
    """A checkpoint could not be written, for a reason that may pass."""


@dataclass
class Snapshot:
    """All that one rank writes of one checkpoint."""

    step: int
    manifest: dict[str, Any]
    """Manifest fields but for what the writer knows itself; rank 0's counts."""
    tensor_files: list[TensorFile]
    linked: dict[str, tuple[Path, FileEntry]] = field(default_factory=dict)
    """Files of this rank that an earlier checkpoint has already."""
    extra: dict[str, bytes] = field(default_factory=dict)
    """Rank 0: other files, by their name in the checkpoint."""


class CheckpointWriter:
    """Commits snapshots to a run folder, one at a time, in the background.

    Args:
        run_dir: the run; checkpoints go to `checkpoints/` in it.
        team: the ranks that commit together; making a writer is collective.
        keep_last: newest checkpoints kept.
        keep_every: checkpoints at multiples of this many steps are never removed.
    """

    def __init__(self, run_dir: Path, team: Team, keep_last: int, keep_every: int | None):
        self.folder = layout.checkpoints_folder(run_dir)
        self.team, self.keep_last, self.keep_every = team, keep_last, keep_every
        self.committed: Path | None = None
        """The checkpoint that this writer committed last."""
        self.entries: dict[str, FileEntry] = {}
        """This rank's files in it."""
        self.marks: dict[str, tuple[int, int] | None] = {}
        """Their size and time (`mark`) when it was committed."""
        self.resumed: int | None = None
        """Sequence number of the checkpoint that the run goes on from. Later ones of other starts were passed over."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._sequence, attempt = 0, ""
        if team.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_stale(self.folder)
            attempt = os.urandom(4).hex()
            if found := newest(run_dir):
                path, manifest = found
                self._sequence = manifest.sequence
                try:
                    self._name_latest(path.name)  # a writer may have been killed between its rename and this
                except OSError as error:  # the next save will tell
                    log.warning("%s: cannot be written (%s)", self.folder / layout.LATEST, error.strerror)
        self.attempt: str = team.broadcast(attempt)

    def submit(self, snapshot: Snapshot) -> None:
        """Start to write; waits for the one before, and raises its error."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the last snapshot could not be written; `wait` says why."""
        return self._error is not None

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            UserError: no room, or no right, to write a file (the path and the free space are named), on any rank.
            StorageError: a file could not be written for another reason.
            RuntimeError: another rank died before the commit.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self._commit(snapshot)
        except (UserError, StorageError) as error:
            self._error = error
        except BaseException as error:
            self._error = RuntimeError(
                f"checkpoint {layout.step_name(snapshot.step)} was not committed: {error} "
                "(if another rank ended, its log has the cause); earlier checkpoints are intact"
            )
            self._error.__cause__ = error

    def _commit(self, snapshot: Snapshot) -> None:
        name = layout.step_name(snapshot.step)
        temporary = self.folder / f"{files.TEMPORARY}{name}-{self.attempt}"
        problem = self.team.broadcast(self._make(temporary) if self.team.rank == 0 else None)
        mine, problem = self._write_files(temporary, snapshot) if problem is None else ({}, problem)
        reports = self.team.gather((mine, problem))
        problem = next((problem for _, problem in reports if problem), None)
        if self.team.rank == 0 and problem is None:
            problem = self._finish(temporary, self.folder / name, snapshot, [entries for entries, _ in reports])
        problem = self.team.broadcast(problem)
        if problem is not None:
            if self.team.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            kind = UserError if problem.mendable else StorageError
            raise kind(f"checkpoint {name} was not written: {problem.text}; earlier checkpoints are intact")
        self.committed, self.entries = self.folder / name, mine
        self.marks = {file: mark(self.committed / file) for file in mine}

    def _make(self, folder: Path) -> _Problem | None:
        """Rank 0: the folder that all write into. Its parents too: a run folder may have been moved away."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return _explain(error, 0, folder)
        return None

    def _write_files(self, folder: Path, snapshot: Snapshot) -> tuple[dict[str, FileEntry], _Problem | None]:
        entries: dict[str, FileEntry] = {}
        try:
            if not in_time(folder.is_dir):  # where storage is gone, making it would fill a disk of this machine
                rank = f"rank {self.team.rank} on {socket.gethostname()}"
                return {}, _Problem(f"{rank} does not see {folder}, which rank 0 made: {_SHARED}", mendable=False)
            for file in snapshot.tensor_files:
                name = layout.rank_file(file.kind, self.team.rank, self.team.world)
                entries[name] = _write_tensor_file(folder / name, file)
            for name, (source, entry) in snapshot.linked.items():
                files.link_or_copy(source, folder / name)
                entries[name] = entry
            for name, content in snapshot.extra.items():
                written = files.write_bytes(folder / name, content)
                entries[name] = FileEntry(kind="extra", bytes=written.bytes, xxh128=written.xxh128)
            sync(folder)
        except OSError as error:
            return {}, _explain(error, self.team.rank, folder)
        return entries, None

    def _finish(
        self, temporary: Path, final: Path, snapshot: Snapshot, parts: list[dict[str, FileEntry]]
    ) -> _Problem | None:
        """Rank 0: manifest, rename, latest, rotation. Returns what went wrong."""
        manifest = Manifest(
            format=layout.FORMAT,
            step=snapshot.step,
            sequence=self._sequence + 1,
            attempt=self.attempt,
            world_size=self.team.world,
            files={name: entry for part in parts for name, entry in part.items()},
            **snapshot.manifest,
        )
        missing = layout.gaps(manifest)
        if missing:
            return _Problem(f"the ranks' slices do not add up: {missing[0]}", mendable=True)
        if problem := _absent(temporary, parts):
            return problem
        try:
            files.write_bytes(temporary / layout.MANIFEST, layout.encode_manifest(manifest))
            for folder in [path for path in temporary.rglob("*") if path.is_dir()]:
                sync(folder)
            sync(temporary)
            replaced = final.with_name(f"{layout.REPLACED}{final.name}")
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            self._sequence += 1
            sync(self.folder)
            shutil.rmtree(replaced, ignore_errors=True)
            self._name_latest(final.name)
        except OSError as error:
            with contextlib.suppress(OSError):
                bring_back(self.folder)
            return _explain(error, 0, temporary)
        try:
            rotate(self.folder.parent, self.keep_last, self.keep_every, self._trusted)
        except (OSError, UserError) as error:  # this one is committed all the same
            log.warning("checkpoints before %s could not be removed: %s", final.name, error)
        return None

    def _name_latest(self, name: str) -> None:
        latest, line = self.folder / layout.LATEST, f"{name}\n".encode()
        if not latest.is_file() or latest.read_bytes() != line:
            files.replace_bytes(latest, line)

    def _trusted(self, manifest: Manifest) -> bool:
        """Whether the run could go back to it: what was passed over takes no place from one that was not."""
        return self.resumed is None or manifest.sequence <= self.resumed or manifest.attempt == self.attempt


def _write_tensor_file(path: Path, file: TensorFile) -> FileEntry:
    names = sorted(file.tensors, key=lambda name: -file.tensors[name].dtype.itemsize)
    specs = [TensorSpec(n, NAMES[file.tensors[n].dtype], tuple(file.tensors[n].shape)) for n in names]
    written = write_tensors(path, specs, (file.tensors[name] for name in names), file.metadata)
    return FileEntry(kind=file.kind, bytes=written.bytes, xxh128=written.xxh128, slices=file.slices)


def _absent(folder: Path, parts: list[dict[str, FileEntry]]) -> _Problem | None:
    """The first file that a rank has written, and rank 0 does not see."""
    for rank, entries in enumerate(parts):
        for name, entry in entries.items():
            if not in_time(partial(_seen, folder / name, entry.bytes)):
                where = f"rank 0 on {socket.gethostname()} does not see {folder / name}"
                return _Problem(f"{where}, which rank {rank} wrote: {_SHARED}", mendable=False)
    return None


def _seen(file: Path, size: int) -> bool:
    found = mark(file)
    return found is not None and found[0] == size


def _explain(error: OSError, rank: int, folder: Path) -> _Problem:
    where = error.filename or folder
    try:
        free = f"{shutil.disk_usage(folder.parent).free / 2**30:.2f} GiB free"
    except OSError:
        free = "free space unknown"
    return _Problem(f"rank {rank}: {where}: {error.strerror or error} ({free})", error.errno in MENDABLE)
