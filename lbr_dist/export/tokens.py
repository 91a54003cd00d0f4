"""How many bottleneck tokens the texts of an export get: said by the recipe, so it is known before a run begins."""

from __future__ import annotations

from lbr_dist.config import Recipe
from lbr_dist.errors import UserError


def fixed_tokens(recipe: Recipe, tokens: int | None = None) -> int:
    """Bottleneck tokens behind every text, as an export must have them; 0 where they cannot matter.

    Raises:
        UserError: the number varies with the text, or `tokens` contradicts the run.
    """
    bottleneck, causal = recipe.bottleneck, recipe.contrastive.attention == "causal"
    if not bottleneck.enabled or (recipe.pooling == "mean" and causal):  # no X sees Z, and the mean is over X
        if tokens is not None:
            raise UserError("--tokens: this run's embedding does not depend on bottleneck tokens; leave it out")
        return 0
    if recipe.pooling == "mean":
        raise UserError(
            "export: mean pooling over X beside bidirectional bottleneck tokens is nothing that sentence-transformers "
            "can do; use `lbr encode`, or train with contrastive.pooling=bottleneck"
        )
    least, most = bottleneck.fewest_and_most(recipe.data.max_x_tokens)
    if tokens is None and least != most:
        setting = "surprisal" if bottleneck.by_surprisal else f"ratio={bottleneck.effective_ratio:g}"
        raise UserError(
            f"export: with bottleneck.{setting} texts get {least} to {most} bottleneck tokens, and a tokenizer can "
            f"only append a fixed number; pass --tokens N (1 to {most}) to give every text the last N (exact for texts "
            "that have N), or use `lbr encode`"
        )
    count = most if tokens is None else tokens
    if not least <= count <= most:
        have = f"{least} to {most} bottleneck tokens: choose among these"
        if least == most:
            have = f"{most} bottleneck token{'s' * (most > 1)}: leave it out"
        raise UserError(f"--tokens {tokens}: this run's texts have {have}")
    return count
