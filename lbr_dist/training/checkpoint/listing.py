"""The checkpoints of a run folder: which there are, the newest one, and the one to go on from."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator
from pathlib import Path

from lbr_dist.errors import UserError
from lbr_dist.training.checkpoint.files import TEMPORARY
from lbr_dist.training.checkpoint.format import (
    MANIFEST,
    STEP_NAME,
    Kind,
    Manifest,
    checkpoints_folder,
    is_checkpoint,
    read_manifest,
    verify,
)

log = logging.getLogger("lbr")

WITHOUT_OPTIMIZER: frozenset[Kind] = frozenset({"weights", "frozen", "rank", "extra"})


def list_checkpoints(run_dir: str | Path) -> list[tuple[Path, Manifest | None]]:
    """A run's checkpoints, the one committed last first; the manifest is None where it cannot be read."""
    return sorted(_committed(Path(run_dir)), key=lambda item: _age(*item), reverse=True)


def _committed(run_dir: Path) -> Iterator[tuple[Path, Manifest | None]]:
    folder = checkpoints_folder(run_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        if STEP_NAME.fullmatch(path.name):
            try:
                yield path, read_manifest(path)
            except UserError:
                yield path, None


def _age(path: Path, manifest: Manifest | None) -> tuple[int, int]:
    first = 2**62  # unreadable ones, so that they are reported
    return manifest.sequence if manifest else first, _step(path, manifest)


def _step(path: Path, manifest: Manifest | None) -> int:
    return manifest.step if manifest else int(path.name.removeprefix("step-"))


def newest(run_dir: str | Path) -> tuple[Path, Manifest] | None:
    """The checkpoint that was committed last, whether it verifies or not; None: there is none that can be read."""
    return next(((path, manifest) for path, manifest in list_checkpoints(run_dir) if manifest), None)


def progress(run_dir: str | Path) -> tuple[int, int]:
    """Sequence number and step of that checkpoint; (0, 0) where there is none."""
    found = newest(run_dir)
    return (found[1].sequence, found[1].step) if found else (0, 0)


def find_resumable(run_dir: str | Path, kinds: Container[Kind] | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why others were passed over.

    Reads every byte of the checkpoints it tries, or of their files of some kinds: call it on one rank and send the
    answer to the others.
    """
    run_dir = Path(run_dir)
    reasons = [
        f"{path}: never committed (the run ended while it was being written)"
        for path in sorted(checkpoints_folder(run_dir).glob(f"{TEMPORARY}step-*"))
    ]
    found, known = None, list_checkpoints(run_dir)
    for position, (path, manifest) in enumerate(known):
        problems = verify(path, kinds=kinds, again=False)
        if not problems:
            found = path
            reasons += [
                f"{other}: a later step, but committed before {path.name} (the run went back and on from there)"
                for other, older in known[position + 1 :]
                if _step(other, older) > _step(path, manifest)
            ]
            break
        reasons += problems
    return found, reasons


def resolve(path_or_run: str | Path, kinds: Container[Kind] | None = None) -> Path:
    """A checkpoint, if it verifies, or the newest one of a run folder that does, for its weights.

    Args:
        path_or_run: either.
        kinds: files that are read; of the others existence and sizes are compared. None: all, of a checkpoint that is
            named but for its optimizer; what committed ones are passed over is then logged, with the one chosen.

    Raises:
        UserError: neither, or no checkpoint that verifies (the reasons are given).
    """
    path = Path(path_or_run)
    if is_checkpoint(path):
        if problems := verify(path, kinds=WITHOUT_OPTIMIZER if kinds is None else kinds, again=False):
            raise UserError(f"{path}: this checkpoint cannot be used: {'; '.join(problems)}")
        return path
    if not path.exists():
        raise UserError(f"{path}: no such folder; give a run or one of its checkpoints")
    if not checkpoints_folder(path).is_dir():
        raise UserError(f"{path}: neither a checkpoint (no {MANIFEST}) nor a run folder (no checkpoints/)")
    first = newest(path)
    found, reasons = find_resumable(path, kinds)
    if first is not None and not first[0].is_dir():  # a run that is at work removed it while it was read
        found, reasons = find_resumable(path, kinds)
    if found is None:
        detail = "; ".join(reasons) or "it has none"
        raise UserError(f"{path}: no checkpoint can be used: {detail}")
    committed = [reason for reason in reasons if f"/{TEMPORARY}" not in reason]  # a run may be writing the others
    if committed and kinds is None:
        log.warning("%s: %s is used; passed over: %s", path, found.name, "; ".join(committed))
    return found
