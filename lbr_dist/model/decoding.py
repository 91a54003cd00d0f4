"""Greedy answers through the bottleneck: Y sees only Z and earlier Y, as in training (paper section 3.2).

The prompts `[X ; Z]` run as one packed stream with a key-value cache. Then the rows that Y may see (Z, or X and Z with
full attention) are cut out of that cache, one left-padded line per sample, and Y is decoded from them, token by token
for all samples at once. X's keys and values are thus gone, not masked, and the positions run on behind X and Z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lbr_dist.model.bottleneck import LbrModel
from lbr_dist.model.layout import PackedBatch, Sample, pack

if TYPE_CHECKING:
    from transformers import DynamicCache


TOGETHER = 32
"""Samples that are decoded at a time."""


@torch.no_grad()
def generate_answers(
    model: LbrModel,
    samples: Sequence[Sample],
    *,
    eos_id: int | None,
    max_new_tokens: int,
    hide_x: bool = True,
) -> list[list[int]]:
    """The most likely next token, again and again, until end-of-sequence or `max_new_tokens`.

    Args:
        model: unsharded; left in evaluation mode.
        samples: prompts; their `y` is not read.
        eos_id: token that ends an answer (not part of it); None: answers have `max_new_tokens` tokens.
        max_new_tokens: most tokens of an answer.
        hide_x: generate through the bottleneck; False lets Y see X (the baseline without bottleneck).

    Returns:
        Answers as token ids, in the order of the samples.

    Raises:
        ValueError: `hide_x` with a sample that has no Z.
    """
    if hide_x and any(sample.z == 0 for sample in samples):
        raise ValueError("hide_x needs bottleneck tokens in every sample")
    model.eval()
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].x))
    answers: list[list[int]] = [[] for _ in samples]
    for start in range(0, len(order), TOGETHER):
        members = order[start : start + TOGETHER]
        prompts = [replace(samples[i], y=()) for i in members]
        for i, answer in zip(members, _decode(model, prompts, eos_id, max_new_tokens, hide_x), strict=True):
            answers[i] = answer
    return answers


def _decode(
    model: LbrModel, prompts: list[Sample], eos_id: int | None, max_new_tokens: int, hide_x: bool
) -> list[list[int]]:
    vectors = 0 if model.z is None else len(model.z)
    batch = pack(prompts, bottleneck_vectors=vectors, hide_x=False).to(model.device)
    logits_SV, cache, visible_SM = _prefill(model, batch, hide_x)
    positions_S = batch.x_len_S + batch.z_len_S
    answers: list[list[int]] = [[] for _ in prompts]
    rows, running = list(range(len(prompts))), torch.ones(len(prompts), dtype=torch.bool)
    for step in range(max_new_tokens):
        tokens_S = logits_SV.argmax(-1)
        for i, (row, token) in enumerate(zip(rows, tokens_S.tolist(), strict=True)):
            if running[i] and token == eos_id:
                running[i] = False
            elif running[i]:
                answers[row].append(token)
        if step + 1 == max_new_tokens or not running.any():
            break
        if 4 * running.sum() <= 3 * len(rows):  # answers that have ended need not be computed further
            kept_S = running.nonzero()[:, 0]
            rows, running = [rows[i] for i in kept_S.tolist()], running[kept_S]
            kept_S = kept_S.to(model.device)
            cache.batch_select_indices(kept_S)
            tokens_S, positions_S, visible_SM = tokens_S[kept_S], positions_S[kept_S], visible_SM[kept_S]
        visible_SM = torch.cat([visible_SM, visible_SM.new_ones(len(rows), 1)], 1)
        output = model.causal_lm(
            input_ids=tokens_S[:, None],
            position_ids=(positions_S + step)[:, None],
            attention_mask=visible_SM[:, None, None, :],
            past_key_values=cache,
            use_cache=True,
        )
        logits_SV = output.logits[:, -1]
    return answers


def _prefill(model: LbrModel, batch: PackedBatch, hide_x: bool) -> tuple[Tensor, DynamicCache, Tensor]:
    """Logits of Y_1 [S, V], the cache that Y sees, and which of its left-padded columns are real [S, M]."""
    from transformers import DynamicCache

    packed: Any = DynamicCache()
    hidden_TD = model.decode(batch, use_cache=True, past_key_values=packed)
    starts_S = batch.starts_S + (batch.x_len_S if hide_x else 0)
    lengths_S = batch.pool_S + 1 - starts_S
    columns_M = torch.arange(int(lengths_S.max()), device=model.device) - lengths_S.max()
    rows_SM = batch.pool_S[:, None] + 1 + columns_M
    visible_SM = rows_SM >= starts_S[:, None]
    rows_SM = rows_SM.clamp(min=0)
    kept = DynamicCache()
    for index, layer in enumerate(packed.layers):
        kept.update(_lines(layer.keys, rows_SM), _lines(layer.values, rows_SM), index)
    return model.causal_lm.lm_head(hidden_TD[batch.pool_S]), kept, visible_SM


def _lines(tensor: Any, rows_SM: Tensor) -> Tensor:
    """[1, H, T, Dh] to one line of cache per sample, [S, H, M, Dh]."""
    return tensor[0][:, rows_SM].transpose(0, 1)
