"""How much a bottleneck token stands for, so that texts have as many of them on average as a fixed number gives.

The average is over the questions and answers of stage 2: they are what the embeddings are of.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lbr_dist.config import Bottleneck
from lbr_dist.data.information import read_information
from lbr_dist.data.plan.lengths import bottleneck_lengths
from lbr_dist.data.shards import open_set

if TYPE_CHECKING:
    from benchmarks.paper.workplace import Workplace

AVERAGE = 3
"""Bottleneck tokens of a text, on average."""
MOST = 8


def settings(place: Workplace, seed: int, by: str) -> tuple[str, ...]:
    """Recipe settings for a number of bottleneck tokens by `length`, or by `surprisal` under the language model."""
    index = open_set(place.folder / "data" / "domain").index("cl")
    x_N = np.concatenate([index.question_tokens, index.answer_tokens]).astype(np.int64)
    if by == "length":
        ratio = calibrate("ratio", x_N, x_N)
        return (f"bottleneck.max_tokens={MOST}", "bottleneck.tokens=null", f"bottleneck.ratio={ratio:.4g}")
    model = _language_model(place, seed)
    place.lbr(f"surprisal-{seed}", "surprisal", "data/domain", "--model", model)
    known = read_information(open_set(place.folder / "data" / "domain"), "cl", str(place.folder / model))
    bits = calibrate("bits", x_N, np.concatenate([known.question, known.answer]))
    return (
        f"bottleneck.max_tokens={MOST}",
        "bottleneck.tokens=null",
        f"bottleneck.surprisal={{model: {model}, bits: {bits:.4g}}}",
    )


def calibrate(unit: str, x_N: np.ndarray, bits_N: np.ndarray) -> float:
    """The `bottleneck.ratio` ("ratio") or `bottleneck.surprisal.bits` ("bits") that gives `AVERAGE` tokens a text."""
    low, high = 1e-3, 1e6  # many tokens a text, and one
    for _ in range(60):
        middle = math.sqrt(low * high)
        one = {"ratio": middle} if unit == "ratio" else {"surprisal": {"model": "any", "bits": middle}}
        bottleneck = Bottleneck.model_validate({"max_tokens": MOST, **one})
        many = bottleneck_lengths(bottleneck, x_N, bits_N).mean() > AVERAGE
        low, high = (middle, high) if many else (low, middle)
    return high


def _language_model(place: Workplace, seed: int) -> str:
    """The domain's language model as a plain folder, relative to the workplace."""
    if not place.scale.language_model:
        return f"base-{seed}"
    out = f"seed-{seed}/language-model"
    if not (place.folder / out / "config.json").exists():
        place.lbr(f"export-base-{seed}", "export", f"seed-{seed}/runs/base", out)
    return out
