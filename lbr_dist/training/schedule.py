"""Learning rate, temperature and joint weight as pure functions of how far the run is, in steps.

A step is a global batch, and there is no state: its value is the same at any world size and after any restart.
"""

from __future__ import annotations

import math

from lbr_dist.config import Optim


def factor(optim: Optim, done: float, total: float) -> float:
    """Share of the peak learning rate for a step.

    Args:
        optim: `warmup` (share of `total`), `schedule` and `final_lr` are read.
        done: steps up to and including this one, so that the first step has a rate above 0; only the share of `total`
            counts.
        total: steps of the whole run.

    Returns:
        Linear from 0 to 1 over the warm-up, then cosine or linear from 1 to `final_lr`, or constant 1.
    """
    progress = min(1.0, done / total)
    if progress < optim.warmup:
        return progress / optim.warmup
    if optim.schedule == "constant" or optim.warmup == 1:
        return 1.0
    decay = (progress - optim.warmup) / (1 - optim.warmup)
    shape = 1 - decay if optim.schedule == "linear" else (1 + math.cos(math.pi * decay)) / 2
    return optim.final_lr + (1 - optim.final_lr) * shape


def moved(shape: str, start: float, end: float | None, step: int, total_steps: int) -> float:
    """A value that moves from `start`, in step 0, to `end`, in the last step.

    Args:
        shape: constant (`start` all the way), linear, or cosine (slow at both ends).
        start: first value.
        end: last value; None with a constant.
        step: from 0.
        total_steps: of the run.
    """
    if shape == "constant" or end is None:
        return start
    share = min(1.0, step / max(1, total_steps - 1))
    return start + (end - start) * (share if shape == "linear" else (1 - math.cos(math.pi * share)) / 2)
