"""What follows the two stages of a whole path, evaluation and export: what is known of it before the first one begins.

It would find out itself, days later. Read without torch: jobs may be submitted where there is none.
"""

from __future__ import annotations

import re
from pathlib import Path

from lbr_dist.config import Recipe
from lbr_dist.data.manifest import manifest_of
from lbr_dist.errors import UserError
from lbr_dist.export.tokens import fixed_tokens


def check_delivery(recipe: Recipe, out: str | None, tokens: int | None, here: Path | None = None) -> Path:
    """Check that a run can be evaluated on the first set of its recipe and exported, as far as that can be told.

    Args:
        recipe: of the run.
        out: folder of the export, as it was named; one that holds something is left as it is. None: `model` in the run.
        tokens: see `fixed_tokens`.
        here: what a relative `out` is in; default: the working directory.

    Returns:
        The folder of the export.

    Raises:
        UserError: the export cannot be made with so many tokens, or not there; or the set has no eval side.
    """
    fixed_tokens(recipe, tokens)
    if out and re.match(r"\w[\w.-]*=", out):
        raise UserError(
            f"OUT {out}: looks like an override, and a pipeline takes none: write it into the recipe (a folder of that "
            f"name is ./{out})"
        )
    folder = (here or Path()) / out if out else Path(recipe.output) / "model"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"OUT {folder}: is a file: name a folder for the exported model")
    data = recipe.data.sets[0].path
    try:
        held_out = (manifest_of(Path(data)) or {})["splits"]["eval"]
        questions = held_out["records"] - held_out["texts"]
    except (KeyError, TypeError):
        return folder  # remote, or still to be made; what is wrong with it, stage 1 says
    if questions < 1:
        raise UserError(
            f"{data}: the first of data.sets is what the run is evaluated on, and there is no question on its eval "
            "side: prepare it with --eval, or put another set first"
        )
    return folder
