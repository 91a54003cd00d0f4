"""Which checkpoints go: old ones after a commit, and at a start what a dead writer left."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

from lbr_dist.training.checkpoint.files import TEMPORARY
from lbr_dist.training.checkpoint.format import DISCARDED, REPLACED, Manifest
from lbr_dist.training.checkpoint.listing import list_checkpoints


def rotate(run_dir: Path, keep_last: int, keep_every: int | None, trusted: Callable[[Manifest], bool]) -> None:
    """Remove checkpoints but the newest `keep_last` and the multiples of `keep_every`.

    Args:
        run_dir: the run.
        keep_last: those that are not `trusted` take no place among them.
        keep_every: steps.
        trusted: whether the run could go back to one.
    """
    kept, reached = 0, math.inf
    for path, manifest in list_checkpoints(run_dir):  # newest first
        if manifest is None:
            continue
        if kept < keep_last:
            kept += manifest.step < reached and trusted(manifest)  # else the run went back before it
            reached = min(reached, manifest.step)
        elif keep_every is None or manifest.step % keep_every:
            discarded = path.with_name(f"{DISCARDED}{path.name}")
            path.rename(discarded)  # one rename, so that a checkpoint never looks half there
            shutil.rmtree(discarded, ignore_errors=True)


def bring_back(folder: Path) -> None:
    """Give a checkpoint its name back that a writer was about to replace when it died."""
    for path in folder.glob(f"{REPLACED}*"):
        original = folder / path.name.removeprefix(REPLACED)
        if not original.exists():
            path.rename(original)


def remove_stale(folder: Path) -> None:
    """Remove what a dead writer left, but for what it was about to replace."""
    bring_back(folder)
    for prefix in (REPLACED, DISCARDED, TEMPORARY):
        for path in folder.glob(f"{prefix}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
