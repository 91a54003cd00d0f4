"""Option values that several commands check alike."""

from __future__ import annotations

import math
import os
import re
from typing import Any

import typer

from lbr_dist.errors import UserError


def dtype_option(text: str) -> Any:
    """`--dtype`, checked."""
    if text not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {text}: expected float32 or bfloat16")
    return text


def place(value: Any) -> Any:
    """A path or several, with ~ expanded where no shell does it: behind `--out=`, `KIND=` and `hf:`.

    Every argument and option that may be a path has this callback.
    """
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [place(item) for item in value]
    prefix, path = re.fullmatch(r"([a-z-]+=|hf:)?(.*)", str(value), re.DOTALL).groups("")  # type: ignore[union-attr]
    return type(value)(prefix + os.path.expanduser(path))  # noqa: PTH111 (a Path would change addresses)


def finite(value: float | None) -> float | None:
    """A number that can be computed with; `min` and `max` let nan pass.

    Raises:
        typer.BadParameter: it is nan or infinite; the message names the option.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def positive(value: float | None) -> float | None:
    """A finite number above 0.

    Raises:
        typer.BadParameter: it is none; the message names the option.
    """
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a finite number above 0.")
    return value
