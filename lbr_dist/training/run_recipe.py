"""The recipe that a run or a checkpoint carries, and what of it may change when the run goes on."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbr_dist.config import Recipe
from lbr_dist.errors import UserError
from lbr_dist.recipes import load_recipe

RECIPE = "recipe.yaml"

HARMLESS = (
    "output",
    "tracking",
    "checkpoint",
    "data.workers",
    "data.prefetch",
    "data.cache_dir",
    "data.cache_gib",
    "batch.micro_tokens",
    "contrastive.tile",
    "model.attention",
    "model.activation_checkpointing",
    "bottleneck.surprisal.model",
    "duration",
    "deepspeed",
    "on_nan",
    "max_skips",
    "step_timeout",
)
"""Fields, or whole sections, that may change on resume. `duration` may: a longer run has another learning rate from
there on, which is what whoever extends it asks for. A surprisal model that has moved is known by its weights."""

SET_PATH = re.compile(r"data\.sets\.\d+\.path")
"""Harmless too, of a set that was there: sets are compared by their content when a checkpoint is chosen, wherever they
have moved. So is a model that has moved: `origin.same_model`."""

FOLDERS = ("model.path", "model.start_from")
"""The same where they are the same folder: Ray's drivers make them absolute, other launchers leave them as they are."""


def load_run_recipe(folder: Path) -> Recipe:
    """The recipe of the run in a folder, or of a checkpoint.

    Raises:
        UserError: there is none, or it is not one.
    """
    file, copy = folder / RECIPE, copy_of(folder)
    there = f" (the run's checkpoints hold a copy: {copy})" if copy else ""
    if not file.is_file():
        kind = f"its {RECIPE} is missing" if copy else f"not a run nor a checkpoint of lbr (it has no {RECIPE})"
        raise UserError(f"{folder}: {kind}{there}")
    try:
        return load_recipe(file, kept=True)
    except UserError as error:
        raise UserError(f"{error}{there}") from None


def copy_of(folder: Path) -> Path | None:
    """A copy of a run's recipe: the recipe that the last of a run's checkpoints carries."""
    found = folder.glob(f"checkpoints/step-*/{RECIPE}")
    return max(found, key=lambda file: (len(file.parent.name), file), default=None)  # six digits, or more


def started_in(folder: Path, recipe: Recipe) -> Path:
    """The folder that relative paths of a run's recipe start from: the run's own says it; else the present one."""
    path, output = Path(os.path.normpath(Path.cwd() / folder)), Path(os.path.normpath(recipe.output))
    if not output.is_absolute() and path.parts[-len(output.parts) :] == output.parts:
        return path.parents[len(output.parts) - 1]
    return Path.cwd()


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted fields whose values differ, with both values."""
    before, after = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    return {
        field: (before.get(field), after.get(field))
        for field in sorted({*before, *after})
        if before.get(field) != after.get(field)
    }


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """A dumped recipe by dotted fields."""
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        items = ((str(index), item) for index, item in enumerate(node))  # type: ignore[assignment]
    else:
        return {prefix: node}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flat(value, f"{prefix}.{key}" if prefix else key)
    return found


def covered(field: str, allowed: Sequence[str]) -> bool:
    """Whether a dotted field, or a section that it is in, is among `allowed`."""
    return any(field == name or field.startswith(f"{name}.") for name in allowed)
