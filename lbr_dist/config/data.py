"""Settings of what is read, and how it is packed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lbr_dist.config.base import Place, Positive, PositiveFloat, Section


class DataSet(Section):
    """One prepared set (the output of `lbr prepare`) in the mixture."""

    path: Place
    """Folder, or URL prefix that webdataset can open, of a prepared set."""
    split: Literal["gl", "cl", "eval"] | None = None
    """Which side to read; default: `gl` for stage 1 and `cl` for stage 2."""
    weight: PositiveFloat = 1.0
    """Passes over this set in one epoch of the mixture: 1 uses each sample once, 0.5 half of them, 2 each twice. Passes
    go on from epoch to epoch: with 0.7 the second one uses the rest of the first pass and four tenths of the next, so
    that some samples may come twice in it."""
    target: Literal["sft", "reconstruct", "prefix"] | None = None
    """Stage 1 target for this set; default: `generative.target`."""


class Data(Section):
    """What is read, and how it is packed."""

    sets: Annotated[list[DataSet], Field(min_length=1)]
    """The prepared sets of the mixture."""
    bin_tokens: Positive = 4096
    """Capacity of one packed bin, in tokens, bottleneck tokens included; the longest X and Y must fit (stage 1)."""
    max_x_tokens: Positive = 1024
    """Longest X (question, passage or document), in tokens, without Z."""
    max_y_tokens: Positive = 1024
    """Longest Y (answer or target), in tokens, end-of-sequence included."""
    too_long: Literal["cut", "drop"] = "cut"
    """What happens to a longer sample; either way it is counted and reported."""
    window: Positive = 65536
    """Samples shuffled and packed together: the plan's memory, and the reach of its shuffle."""
    block: Positive = 64
    """Neighbouring rows that are shuffled as one unit before the window's own shuffle (sequential reads)."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Loader processes per rank; they never change the order of the data."""
    prefetch: Positive = 4
    """Micro-batches that each loader process prepares ahead, at least: between them they always prepare a whole step
    while another trains, in about 210 KB of a rank's memory for each micro-batch of 8,192 tokens."""
    cache_dir: Place | None = None
    """Where remote shards are kept; default: a folder in the user's cache."""
    cache_gib: PositiveFloat = 20.0
    """Bound of that cache in GiB; the least recently used shards go first."""
