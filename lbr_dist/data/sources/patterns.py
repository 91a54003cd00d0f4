"""What a pattern such as `texts/**/*.jsonl` stands for, as in a shell; unlike `Path.glob`, it passes over no folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from lbr_dist.errors import UserError

SPECIAL = re.compile(r"[*?\[]")
"""What makes a path, or a part of it, a pattern."""


def matches(pattern: Path) -> set[Path]:
    """The files and folders that a pattern stands for; hidden ones only where its part for them has the dot too.

    `**` stands for any number of folders in each other, links not followed, and at the end for all that is in them.

    Raises:
        UserError: a folder in which it looks cannot be read.
    """
    try:
        return set(_matches(Path(pattern.anchor or "."), pattern.relative_to(pattern.anchor).parts))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """What the parts of a pattern stand for in a folder."""
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if not SPECIAL.search(first):
        if os.path.lexists(folder / first):
            yield from _matches(folder / first, rest)
        return
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if first.startswith(".") or not entry.name.startswith(".")]
    if first == "**":
        yield from _matches(folder, rest or ("*",))
    for entry in shown:
        if first == "**":
            if entry.is_dir(follow_symlinks=False):
                yield from _matches(folder / entry.name, parts)
        elif fnmatchcase(entry.name, first) and (not rest or entry.is_dir()):
            yield from _matches(folder / entry.name, rest)
