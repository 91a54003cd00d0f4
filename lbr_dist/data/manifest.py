"""Whether a folder is a prepared set: told by its manifest, without what it takes to open one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KEYS = {"format", "splits", "fingerprint"}
"""What is in the manifest of every prepared set."""


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """The manifest of the prepared set in `folder`, not checked any further; None: there is none, or a damaged one."""
    try:
        found = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.keys() >= KEYS else None
