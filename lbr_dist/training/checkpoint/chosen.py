"""Reading a checkpoint that was chosen: a run at work may remove it meanwhile, and another rank may see another one."""

from __future__ import annotations

import socket
from collections.abc import Callable, Container
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lbr_dist.errors import UserError
from lbr_dist.training.checkpoint.format import Kind, Manifest, gone, read_manifest
from lbr_dist.training.checkpoint.listing import resolve
from lbr_dist.training.run_folder import in_time

if TYPE_CHECKING:
    from lbr_dist.training.collective import Team

Result = TypeVar("Result")


def with_checkpoint(
    path_or_run: str | Path, use: Callable[[Path], Result], kinds: Container[Kind] | None = None, *, again: bool = True
) -> Result:
    """What `use` makes of the checkpoint that `resolve` finds; of a newer one, if the run that was named removed it.

    Args:
        path_or_run: see `resolve`.
        use: may be called twice.
        kinds: see `resolve`.
        again: whether it may.

    Raises:
        UserError: see `resolve`; or the checkpoint was removed, and was named, or was the second one.
    """
    checkpoint = resolve(path_or_run, kinds)
    try:
        return use(checkpoint)
    except Exception as error:
        if checkpoint.is_dir():
            raise
        if not again or checkpoint == Path(path_or_run):
            raise UserError(gone(checkpoint)) from error
    return with_checkpoint(path_or_run, use, kinds, again=False)


def same_on_all(team: Team, path: Path) -> Manifest:
    """The manifest of a checkpoint, if every rank sees the same one there: nodes may have folders of their own at this
    path, with other weights of the same shapes. Collective.

    Raises:
        UserError: a rank sees another one, or none.
    """
    seen = _look(path)
    first = team.broadcast(_commit(seen))
    if isinstance(first, str):
        raise UserError(first)
    if _commit(seen) != first and in_time(lambda: _commit(_look(path)) == first):
        seen = _look(path)
    reports = team.gather((socket.gethostname(), _commit(seen)))
    removed = not team.broadcast(path.is_dir())  # as rank 0 sees it
    for rank, (host, found) in enumerate(reports):
        if found != first:
            if removed:
                raise UserError(gone(path))
            which = "no whole" if isinstance(found, str) else "another"
            raise UserError(
                f"rank {rank} on {host} sees {which} checkpoint at {path}: the run folder must be on storage that all "
                "nodes share"
            )
    assert isinstance(seen, Manifest)
    return seen


def _look(path: Path) -> Manifest | str:
    """The manifest, or why it cannot be read."""
    try:
        return read_manifest(path)
    except UserError as error:
        return str(error)


def _commit(seen: Manifest | str) -> tuple[str, int] | str:
    """What tells one commit from all others."""
    return seen if isinstance(seen, str) else (seen.attempt, seen.sequence)
