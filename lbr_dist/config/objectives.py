"""Settings of the two objectives."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lbr_dist.config.base import Positive, PositiveFloat, Section, Share


class Generative(Section):
    """Stage 1 (paper section 3.2)."""

    target: Literal["sft", "reconstruct", "prefix"] = "sft"
    """sft: X = question, Y = answer; reconstruct: X = Y = document; prefix: X = D[:k], Y = D[k:], k drawn per row."""
    prefix_min: Share = 0.2
    """Smallest share of the document that becomes X with target `prefix`."""
    prefix_max: Share = 0.8
    """Largest share."""

    @model_validator(mode="after")
    def _order(self) -> Generative:
        if self.prefix_min > self.prefix_max:
            raise ValueError("generative.prefix_min is larger than generative.prefix_max")
        return self


class Contrastive(Section):
    """Stage 2 (paper section 3.3)."""

    temperature: PositiveFloat = 0.05
    """Softmax temperature tau on cosine similarities."""
    pooling: Literal["bottleneck", "last", "mean"] = "bottleneck"
    """Hidden state that represents a text: the last Z (LBR), the last token, or the mean over tokens (baselines)."""
    attention: Literal["causal", "bidirectional"] = "causal"
    """Causal is the paper's; bidirectional is its ablation (paper section 5.1)."""
    query_instruction: str = ""
    """Text put before every query; it must end in a line break, so that it tokenizes the same with any query."""
    passage_instruction: str = ""
    """Text put before every passage; likewise."""
    hard_negatives: Annotated[int, Field(ge=0)] = 0
    """Hard negatives used per record, of those that the record carries in `negatives`."""
    two_way: bool = False
    """Add the passage-to-query loss (symmetric InfoNCE)."""
    mask_same_answer: bool = True
    """Do not count as negatives: passages of the query's own record id, with its own (normalised) answer, or with one
    of the record's `positives`."""
    margin: float | None = None
    """Do not count as negatives passages that score above the positive plus this margin (cosine); None: off."""
    tile: Positive = 4096
    """Tile squared scores are held at a time: the loss's memory grows with that, not with the batch squared."""
