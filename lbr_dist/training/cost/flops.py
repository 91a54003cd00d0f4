"""Floating-point operations that a step needs, from the model's shape and the samples' lengths: the numerator of MFU.

Model operations, not hardware operations: what recomputation (activation checkpointing, the second pass of a cached
contrastive step) adds is not counted, so that MFU says how fast the run is and not how busy.

    per token        6 * parameters in the decoder layers' matrices        (2 forward, 4 backward)
    per target       6 * vocabulary * width                                (the head, where Y is predicted)
    per score cell   12 * layers * query width                             (scores and their use: 4 forward, 8 backward)

Cells of a sample: n(n+1)/2 over [X Z], n = |X| + |Z|, and for Y behind a bottleneck |Y||Z| + |Y|(|Y|+1)/2; without a
bottleneck n(n+1)/2 over the whole sample; n^2 where attention is bidirectional.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lbr_dist.config import Recipe
from lbr_dist.training.cost.memory_model import Shape

if TYPE_CHECKING:
    from lbr_dist.data.plan.base import PlannedSample


@dataclass(frozen=True)
class FlopCounter:
    """Operations of samples on one model."""

    per_token: float
    per_target: float
    per_cell: float
    hide_x: bool
    """Of generative samples (side "x")."""
    causal: bool
    """Of the texts of pairs."""

    @classmethod
    def of(cls, settings: Any, recipe: Recipe) -> FlopCounter:
        """From a transformers configuration of a supported family."""
        shape = Shape.of(settings)
        return cls(
            6.0 * shape.layers * shape.per_layer,
            6.0 * shape.table,
            12.0 * shape.layers * shape.query,
            recipe.bottleneck.enabled,
            recipe.contrastive.attention == "causal",
        )

    def of_samples(self, samples: Sequence[PlannedSample]) -> float:
        """Forward and backward operations for these samples."""
        total = 0.0
        for s in samples:
            if s.side == "x" and self.hide_x:
                n = s.x_len + s.z_len
                cells = n * (n + 1) / 2 + s.y_len * s.z_len + s.y_len * (s.y_len + 1) / 2
            else:
                cells = s.tokens * (s.tokens + 1) / 2 if self.causal or s.side == "x" else float(s.tokens) ** 2
            total += self.per_token * s.tokens + self.per_target * s.y_len + self.per_cell * cells
        return total
