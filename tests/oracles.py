"""What must come out, computed the slow and obvious way from the samples alone (no segments, no packing code)."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from lbr_dist.model.layout import Sample

VOCABULARY = 400


def random_samples(
    rng: random.Random, count: int, *, longest: int = 12, vectors: int = 3, y: bool = True
) -> list[Sample]:
    """Samples with lengths from 1 (X and Y also 0) to `longest`, and 1 to `vectors` bottleneck tokens."""

    def tokens(least: int) -> list[int]:
        length = rng.choice([least, 1, 2, rng.randint(1, longest)])
        return [rng.randrange(3, VOCABULARY) for _ in range(length)]

    return [Sample(tokens(0), rng.randint(1, vectors), tokens(0) if y else []) for _ in range(count)]


def visible(samples: list[Sample], *, hide_x: bool, causal: bool = True) -> Tensor:
    """bool [T, T]: row i sees column j (paper section 3.2, mask M)."""
    parts = ["x" * len(sample.x) + "z" * sample.z + "y" * len(sample.y) for sample in samples]
    owner = torch.tensor([number for number, part in enumerate(parts) for _ in part])
    is_x, is_y = (torch.tensor([letter == kind for kind in "".join(parts)]) for letter in "xy")
    mask = owner[:, None] == owner
    if causal:
        mask = mask.tril()
    return mask & ~(is_y[:, None] & is_x) if hide_x else mask


def additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """4-D additive mask [1, 1, T, T], the only kind that transformers' eager attention takes."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[None, None]


def positions(samples: list[Sample]) -> Tensor:
    """Position ids [1, T]."""
    return torch.cat([torch.arange(len(s.x) + s.z + len(s.y)) for s in samples])[None]


def embed(samples: list[Sample], embedding_VD: Tensor, z_KD: Tensor | None) -> Tensor:
    """Input embeddings [1, T, D]; a sample with z bottleneck tokens has the last z vectors."""
    rows = []
    for s in samples:
        rows.append(embedding_VD[torch.tensor(s.x, dtype=torch.long)])
        if z_KD is not None and s.z:
            rows.append(z_KD[len(z_KD) - s.z :])
        rows.append(embedding_VD[torch.tensor(s.y, dtype=torch.long)])
    return torch.cat(rows)[None]


def token_losses(samples: list[Sample], logits_TV: Tensor) -> list[Tensor]:
    """-log P(Y_t | ...) of every target, one tensor [|Y|] per sample."""
    start, losses = 0, []
    for s in samples:
        first = start + len(s.x) + s.z
        rows = logits_TV[first - 1 : first - 1 + len(s.y)]
        losses.append(torch.nn.functional.cross_entropy(rows, torch.tensor(s.y, dtype=torch.long), reduction="none"))
        start = first + len(s.y)
    return losses
