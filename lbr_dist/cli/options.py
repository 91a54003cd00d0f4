"""Option values that several commands check alike."""

from __future__ import annotations

from typing import Any

from lbr_dist.errors import UserError


def dtype_option(text: str) -> Any:
    """`--dtype`, checked."""
    if text not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {text}: expected float32 or bfloat16")
    return text
