"""Texts in batches: for the plain models of others, and for every encoder, texts of about one length together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def batches(lengths: np.ndarray, budget: int, padded: bool = False) -> Iterator[np.ndarray]:
    """Rows in batches of at most `budget` tokens, longest first, so that a batch's texts have about one length.

    Args:
        lengths: tokens of each text.
        budget: tokens in a batch; a longer text is a batch of its own.
        padded: count the tokens of the padded batch (texts x longest) instead of their sum.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rest = lengths[order[start : start + budget + 1]]
        used = np.arange(1, len(rest) + 1) * rest[0] if padded else np.cumsum(rest)
        count = max(1, int(np.searchsorted(used, budget, side="right")))
        yield order[start : start + count]
        start += count


def pad(inputs: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token ids, padded at their end, and the mask of the real ones: int64 [texts, longest] both."""
    import torch

    ids_BT = torch.zeros((len(inputs), max(1, *map(len, inputs))), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(inputs):
        ids_BT[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        mask_BT[row, : len(ids)] = 1
    return ids_BT.to(device), mask_BT.to(device)
