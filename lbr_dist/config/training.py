"""Settings of the loop: batch, optimizer, duration, checkpoints, tracking."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lbr_dist.config.base import BelowOne, Positive, PositiveFloat, Section, Share


class Batch(Section):
    """Batch semantics, stated once; accumulation is derived and never changes them."""

    global_batch: Positive
    """Samples per optimizer step over all ranks: packed bins in stage 1, query-passage pairs in stage 2."""
    micro_tokens: Positive | None = None
    """Most tokens in one forward pass of one rank; default: one bin (`data.bin_tokens`)."""


class Optim(Section):
    """Optimizer and schedule."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw: decoupled weight decay; sgd: no momentum; `weight_decay` applies."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    z_lr: PositiveFloat | None = None
    """Peak learning rate of the bottleneck vectors; default: `lr`."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    eps: PositiveFloat = 1e-8
    """AdamW's denominator offset."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """On matrices only: norms, biases and Z have none."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after warm-up."""
    warmup: Share = 0.05
    """Share of the run's samples over which the rate rises from 0."""
    final_lr: Share = 0.1
    """Rate at the end, as a share of the peak (cosine and linear)."""


class Duration(Section):
    """How long to train; exactly one of the two."""

    epochs: PositiveFloat | None = None
    """Passes over the mixture (may be fractional). A recipe has either this or `steps`."""
    steps: Positive | None = None
    """Optimizer steps; excludes `epochs`."""

    @model_validator(mode="after")
    def _one(self) -> Duration:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("duration needs exactly one of duration.epochs and duration.steps")
        return self


class Checkpoint(Section):
    """When checkpoints are written and which are kept. The last step is always saved."""

    every_steps: Positive = 500
    """Steps between checkpoints."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""
    keep_every: Positive | None = None
    """Checkpoints at multiples of this many steps are never removed."""
    asynchronous: bool = True
    """Write in the background: training waits for the copy to host memory only."""


class Tracking(Section):
    """Metrics: always to metrics.jsonl in the run, and to wandb when named."""

    every_steps: Positive = 1
    """Steps between logged rows."""
    wandb_project: str | None = None
    """wandb project; None: wandb is not used."""
    wandb_mode: Literal["online", "offline"] = "offline"
    """offline writes files that `wandb sync` uploads."""
    name: str | None = None
    """Name of the run in tables and plots; default: its folder's name."""
