"""The plain way to train on `[X ; Z ; Y]`, to compare with: padded rows through transformers' own SDPA.

Without a bottleneck that is ordinary causal attention, with one a dense mask [B, 1, L, L] over the whole batch, as a
collator would build it. Same weights, same targets, same loss head as the packed side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lbr_dist.model.bottleneck import LbrModel
from lbr_dist.model.layout import PackedBatch, Sample


@dataclass
class DenseBatch:
    """Right-padded samples, B rows of L tokens.

    Attributes:
        tokens_BL: ids, 0 at Z and in the padding.
        mask: [B, 1, L, L] with a bottleneck; [B, L] where rows have padding; None: nothing to mask but the future.
        z_rows_N, z_index_N: row of the flattened batch and vector of every bottleneck token.
        predict_N, targets_N: rows of the flattened batch that predict, and what.
    """

    tokens_BL: Tensor
    mask: Tensor | None
    z_rows_N: Tensor
    z_index_N: Tensor
    predict_N: Tensor
    targets_N: Tensor


def collate(samples: Sequence[Sample], device: str = "cpu") -> DenseBatch:
    """Pad samples to the longest; those with Z hide their X from Y."""
    longest = max(len(s.x) + s.z + len(s.y) for s in samples)
    tokens_BL = torch.zeros(len(samples), longest, dtype=torch.long)
    real_BL = torch.zeros(len(samples), longest, dtype=torch.bool)
    hidden = any(s.z for s in samples)
    mask_BLL = torch.ones(longest, longest, dtype=torch.bool).tril().repeat(len(samples), 1, 1) if hidden else None
    z_rows, z_index, predict = [], [], []
    targets: list[int] = []
    for row, s in enumerate(samples):
        x, y = len(s.x), len(s.x) + s.z
        tokens_BL[row, :x], tokens_BL[row, y : y + len(s.y)] = torch.tensor(s.x), torch.tensor(s.y)
        real_BL[row, : y + len(s.y)] = True
        if mask_BLL is not None:
            mask_BLL[row, y:, :x] = s.z == 0
        z_rows += [row * longest + x + i for i in range(s.z)]
        z_index += list(range(-s.z, 0))
        predict += [row * longest + y - 1 + i for i in range(len(s.y))]
        targets += s.y
    mask = mask_BLL[:, None] if mask_BLL is not None else None if bool(real_BL.all()) else real_BL
    indices = (torch.tensor(values, dtype=torch.long).to(device) for values in (z_rows, z_index, predict, targets))
    return DenseBatch(tokens_BL.to(device), None if mask is None else mask.to(device), *indices)


def dense_loss(model: LbrModel, batch: DenseBatch) -> Tensor:
    """The summed loss of a padded batch, by the model's weights under transformers' SDPA."""
    plain = model.causal_lm
    before = plain.config._attn_implementation
    plain.set_attn_implementation("sdpa")
    try:
        embeds_ND = plain.get_input_embeddings()(batch.tokens_BL).flatten(0, 1)
        if len(batch.z_rows_N):
            assert model.z is not None
            embeds_ND = embeds_ND.index_copy(0, batch.z_rows_N, model.z[batch.z_index_N])
        embeds_BLD = embeds_ND.view(*batch.tokens_BL.shape, -1)
        output = plain.model(inputs_embeds=embeds_BLD, attention_mask=batch.mask, use_cache=False)
        return plain.lm_head(output.last_hidden_state.flatten(0, 1)[batch.predict_N], batch.targets_N)
    finally:
        plain.set_attn_implementation(before)


def packed_loss(model: LbrModel, batch: PackedBatch) -> Tensor:
    """The same of a packed stream; what a backend derives from its segments is derived anew, as for a new batch."""
    batch.segments.padded = batch.segments.block_mask = None
    return model(batch, "generate")


def backward_of(model: LbrModel, batches: Sequence[Any], loss_of: Callable[[LbrModel, Any], Tensor]) -> float:
    """Forward and backward over all batches, whose gradients are dropped; returns the summed loss."""
    total = 0.0
    for batch in batches:
        loss = loss_of(model, batch)
        loss.backward()
        total += float(loss)
    model.zero_grad()
    return total
