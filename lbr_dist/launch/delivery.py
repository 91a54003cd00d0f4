"""What follows the two stages of a whole path, evaluation and export: what is known of it before the first one begins.

It would find out itself, days later. Read without torch: jobs may be submitted where there is none.
"""

from __future__ import annotations

from pathlib import Path

from lbr_dist.config import Recipe
from lbr_dist.data.manifest import manifest_of
from lbr_dist.errors import UserError
from lbr_dist.export.tokens import fixed_tokens


def check_delivery(recipe: Recipe, out: Path, tokens: int | None) -> None:
    """Check that a run can be evaluated on the first set of its recipe and exported, as far as that can be told.

    Args:
        recipe: of the run.
        out: folder of the export; one that holds something is left as it is.
        tokens: see `fixed_tokens`.

    Raises:
        UserError: the export cannot be made with so many tokens, or not there; or the set has no eval side.
    """
    fixed_tokens(recipe, tokens)
    if out.exists() and not out.is_dir():
        raise UserError(f"OUT {out}: is a file: name a folder for the exported model")
    data = recipe.data.sets[0].path
    try:
        held_out = (manifest_of(Path(data)) or {})["splits"]["eval"]
        questions = held_out["records"] - held_out["texts"]
    except (KeyError, TypeError):
        return  # remote, or still to be made; what is wrong with it, stage 1 says
    if questions < 1:
        raise UserError(
            f"{data}: the first of data.sets is what the run is evaluated on, and there is no question on its eval "
            "side: prepare it with --eval, or put another set first"
        )
