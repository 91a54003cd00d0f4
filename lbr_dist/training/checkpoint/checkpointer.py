"""Saving and restoring a run: the engine's slices, the loop's state and each rank's random state.

Saving stops training only while this rank's slices are copied to host memory (buffers that are kept, so the memory is
paid once: as much as the rank's share of weights and moments); the rest happens in `writer`. What a recipe
says (learning rates, weight decay, parameter groups) is not in a checkpoint and so cannot come back from one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lbr_dist.disk import mark
from lbr_dist.errors import UserError
from lbr_dist.training.checkpoint import format as layout
from lbr_dist.training.checkpoint.chosen import same_on_all
from lbr_dist.training.checkpoint.engine_state import WEIGHT, EngineState, Piece
from lbr_dist.training.checkpoint.format import FileEntry, Kind, Manifest, verify
from lbr_dist.training.checkpoint.listing import resolve
from lbr_dist.training.checkpoint.weights import (
    SliceReader,
    pack_rank_state,
    read_rank_state,
    tensor_name,
)
from lbr_dist.training.checkpoint.writer import SLOWEST_WRITE, CheckpointWriter, Snapshot, TensorFile
from lbr_dist.training.checkpoint.zero_state import open_engine
from lbr_dist.training.collective import GlooTeam
from lbr_dist.training.ds_config import versions

if TYPE_CHECKING:
    from lbr_dist import config


@dataclass(frozen=True)
class _Frozen:
    """A file of frozen weights in a checkpoint, and its `mark` when it was known to be good."""

    path: Path
    entry: FileEntry
    mark: tuple[int, int] | None

    @property
    def unchanged(self) -> bool:
        return self.mark is not None and mark(self.path) == self.mark


class Checkpointer:
    """Saves a DeepSpeed engine to a run folder and restores it. Collective to make.

    Args:
        run_dir: the run; what dead writers left in `checkpoints/` is removed.
        engine: the DeepSpeed engine, stage 0 to 3.
        settings: when to keep what, and whether to write in the background.
        extra_files: files that every checkpoint carries (name inside it, to content).
    """

    def __init__(self, run_dir: Path, engine: Any, settings: config.Checkpoint, *, extra_files: dict[str, bytes]):
        self._team = GlooTeam(SLOWEST_WRITE)
        self._engine, self._settings, self._extra = engine, settings, dict(extra_files)
        self._state = open_engine(engine, self._team.rank, self._team.world)
        self._parameters = self._state.parameters()
        self._index = {parameter.name: index for index, parameter in enumerate(self._parameters)}
        self._buffers: dict[str, torch.Tensor] = {}
        self._frozen: deque[_Frozen] = deque(maxlen=min(2, settings.keep_last))
        """This rank's frozen weights in the last checkpoints, oldest first. A save links the oldest, so two copies on
        disk take turns, and damage to one of them spares every other checkpoint."""
        self._writer = CheckpointWriter(Path(run_dir), self._team, settings.keep_last, settings.keep_every)

    def save(
        self, step: int, state: dict[str, Any], *, rank_state: dict[str, Any] | None = None, wait: bool = False
    ) -> None:
        """Save the engine as it is now; returns when it may change again. Collective.

        Args:
            step: optimizer steps done; names the checkpoint. Nothing is done if this object has saved it already.
            state: the loop's state, JSON-able and the same on every rank.
            rank_state: this rank's own state, JSON-able but for top-level tensors.
            wait: return only when the checkpoint is committed.

        Raises:
            UserError: this save, or the one before it, could not be written.
        """
        self.wait()
        if self._writer.committed is None or self._writer.committed.name != layout.step_name(step):
            self._writer.submit(self._snapshot(step, state, rank_state or {}))
        if wait or not self._settings.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when the last save is committed on every rank.

        Raises:
            UserError: it could not be written; the path and the free space are named, earlier checkpoints are intact.
            RuntimeError: another rank ended before the commit.
        """
        self._writer.wait()
        name = self._rank_file("frozen")
        if self._writer.committed is not None and name in self._writer.entries:
            self._remember(self._writer.committed / name, self._writer.entries[name], self._writer.marks[name])

    @property
    def attempt(self) -> str:
        """What the manifests of this object's checkpoints have as `attempt`."""
        return self._writer.attempt

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing the last save."""
        return self._writer.busy

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the last save could not be written; `wait` says why."""
        return self._writer.failed

    def load(self, path: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Restore the engine from a checkpoint, written at any world size and ZeRO stage. Collective.

        Existence and sizes of the files are checked, not their content: `find_resumable` and `verify` do that.

        Returns:
            The loop's state, and this rank's own (None if the world size changed).

        Raises:
            UserError: the checkpoint is incomplete, or is of another model or optimizer, or another one on some rank.
        """
        path = Path(path)
        problems = self._team.broadcast(verify(path, deep=False) if self._team.rank == 0 else None)
        if problems:
            raise UserError(f"{path} cannot be resumed from: {'; '.join(problems)}")
        manifest = same_on_all(self._team, path)
        _require_same_model(path, manifest, self._state)
        _restore(self._state, SliceReader(path, manifest), optimizer=True)
        self._state.set_counters(manifest.engine)
        self._writer.resumed = manifest.sequence
        self._frozen.clear()
        if manifest.world_size != self._team.world:
            return manifest.state, None
        name = self._rank_file("frozen")
        if name in manifest.files and manifest.files[name].slices == self._frozen_slices():
            self._remember(path / name, manifest.files[name], mark(path / name))
        return manifest.state, read_rank_state(path / self._rank_file("rank"))

    def _rank_file(self, kind: Kind) -> str:
        return layout.rank_file(kind, self._team.rank, self._team.world)

    def _slice(self, piece: Piece) -> tuple[int, int, int]:
        return self._index[piece.name], piece.own_start, piece.own_end

    def _remember(self, path: Path, entry: FileEntry, known: tuple[int, int] | None) -> None:
        if not self._frozen or self._frozen[-1].path != path:
            self._frozen.append(_Frozen(path, entry, known))

    def _frozen_slices(self) -> list[tuple[int, int, int]]:
        return [self._slice(piece) for piece in self._state.frozen()]

    def _snapshot(self, step: int, state: dict[str, Any], rank_state: dict[str, Any]) -> Snapshot:
        optimizer = self._state.optimizer_entry()
        tensors, metadata = pack_rank_state(rank_state)
        weights, moments = TensorFile("weights", {}), TensorFile("optimizer", {})
        snapshot = Snapshot(
            step=step,
            manifest={
                "created": _now(),
                "zero_stage": self._engine.zero_optimization_stage(),
                "versions": versions(),
                "parameters": self._parameters,
                "tied": self._state.tied(),
                "optimizer": optimizer,
                "engine": self._state.counters(),
                "state": state,
            },
            tensor_files=[weights, moments, TensorFile("rank", tensors, metadata=metadata)],
            extra=self._extra if self._team.rank == 0 else {},
        )
        for piece in self._state.pieces(optimizer, store=False):
            self._copy(piece, weights, WEIGHT)
            for key in optimizer.keys:
                self._copy(piece, moments, key)
        self._snapshot_frozen(snapshot)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return snapshot

    def _snapshot_frozen(self, snapshot: Snapshot) -> None:
        if all(parameter.trained for parameter in self._parameters):
            return
        if len(self._frozen) == self._frozen.maxlen and (oldest := self._frozen[0]).unchanged:
            snapshot.linked[self._rank_file("frozen")] = (oldest.path, oldest.entry)
            return
        frozen = TensorFile("frozen", {})
        for piece in self._state.frozen():
            self._copy(piece, frozen, WEIGHT, keep=False)
        snapshot.tensor_files.append(frozen)

    def _copy(self, piece: Piece, file: TensorFile, key: str, keep: bool = True) -> None:
        if piece.own_start == piece.own_end:
            return
        name, source = tensor_name(file.kind, key, piece.name), piece.owned(key)
        buffer = self._buffers.get(f"{file.kind}/{name}")
        if buffer is None:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        if keep:
            self._buffers[f"{file.kind}/{name}"] = buffer
        buffer.copy_(source, non_blocking=True)
        file.tensors[name] = buffer
        if not file.slices or file.slices[-1] != self._slice(piece):
            file.slices.append(self._slice(piece))


def start_from(engine: Any, path_or_run: str | Path) -> tuple[Path, list[str], list[str]]:
    """Put a checkpoint's weights into a fresh engine, slice by slice; optimizer and counters stay as they are.

    Collective. Parameters are matched by name and shape.

    Returns:
        The checkpoint, names that it lacks (left as they are in the engine), and names that only it has.

    Raises:
        UserError: nothing to read there, it is damaged, or another one on some rank, or a parameter has another shape.
    """
    team = GlooTeam(SLOWEST_WRITE)
    found: Any = None
    if team.rank == 0:
        try:
            found = resolve(path_or_run)
        except UserError as error:
            found = str(error)
    found = team.broadcast(found)
    if isinstance(found, str):
        raise UserError(found)
    manifest = same_on_all(team, found)
    state = open_engine(engine, team.rank, team.world)
    missing, unexpected, reshaped = _differences(manifest, state)
    if reshaped:
        raise UserError(f"{found}: shapes differ from the model's: {'; '.join(reshaped)}")
    _restore(state, SliceReader(found, manifest), optimizer=False)
    return found, missing, unexpected


def _restore(state: EngineState, reader: SliceReader, optimizer: bool) -> None:
    entry = reader.manifest.optimizer if optimizer else None
    with torch.no_grad():
        for piece in state.pieces(entry, store=True):
            _fill(piece, reader)
            for key in entry.keys if entry else ():
                reader.read_into(piece.tensors[key], "optimizer", key, piece.name, piece.start)
        for piece in state.frozen():
            _fill(piece, reader)
        state.loaded()


def _fill(piece: Piece, reader: SliceReader) -> None:
    if piece.name in reader.parameters:
        kind: Kind = "weights" if reader.parameters[piece.name].trained else "frozen"
        reader.read_into(piece.tensors[WEIGHT], kind, WEIGHT, piece.name, piece.start)


def _differences(manifest: Manifest, state: EngineState) -> tuple[list[str], list[str], list[str]]:
    stored = {parameter.name: parameter for parameter in manifest.parameters}
    model = {parameter.name: parameter for parameter in state.parameters()}
    reshaped = [
        f"{name} is {list(stored[name].shape)} in the checkpoint and {list(parameter.shape)} in the model"
        for name, parameter in model.items()
        if name in stored and stored[name].shape != parameter.shape
    ]
    return [n for n in model if n not in stored], [n for n in stored if n not in model], reshaped


def _require_same_model(path: Path, manifest: Manifest, state: EngineState) -> None:
    missing, unexpected, reshaped = _differences(manifest, state)
    stored = {parameter.name: parameter.trained for parameter in manifest.parameters}
    changed = [p.name for p in state.parameters() if p.name in stored and stored[p.name] != p.trained]
    for what, names in (
        ("the model has parameters that the checkpoint lacks", missing),
        ("the checkpoint has parameters that the model lacks", unexpected),
        ("shapes differ", reshaped),
        ("parameters were trained and are now frozen, or the reverse", changed),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{path} is of another model: {what}: {', '.join(names[:3])}{more}")
    if manifest.optimizer.family != state.family:
        raise UserError(
            f"{path} holds the state of {manifest.optimizer.family}, and optim.name asks for {state.family}: "
            "set optim.name back, or start a new run with model.start_from"
        )


def _now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat(timespec="seconds")
