"""Option values that several commands check alike."""

from __future__ import annotations

import math
from typing import Any

import typer

from lbr_dist.errors import UserError


def dtype_option(text: str) -> Any:
    """`--dtype`, checked."""
    if text not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {text}: expected float32 or bfloat16")
    return text


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
