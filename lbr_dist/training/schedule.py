"""Learning rate as a pure function of how far the run is, in samples.

Stated in samples and not in steps, and without state: the rate of a step is the same at any world size, after any
restart, and for a last step that is only partly full.
"""

from __future__ import annotations

import math

from lbr_dist.config import Optim


def factor(optim: Optim, seen: float, total: float) -> float:
    """Share of the peak learning rate for the step that ends at `seen` samples.

    Args:
        optim: `warmup` (share of `total`), `schedule` and `final_lr` are read.
        seen: samples used up to and including this step, so that the first step has a rate above 0. Any unit serves
            (the loop counts global batches), as only the ratio to `total` is used.
        total: samples of the whole run, in the same unit.

    Returns:
        Linear from 0 to 1 over the warm-up, then cosine or linear from 1 to `final_lr`, or constant 1.
    """
    progress = min(1.0, seen / total)
    if progress < optim.warmup:
        return progress / optim.warmup
    if optim.schedule == "constant" or optim.warmup == 1:
        return 1.0
    decay = (progress - optim.warmup) / (1 - optim.warmup)
    shape = 1 - decay if optim.schedule == "linear" else (1 + math.cos(math.pi * decay)) / 2
    return optim.final_lr + (1 - optim.final_lr) * shape
