"""The CPU's packed attention: segments padded into groups of similar length, one fused SDPA call per group.

A mask over the whole stream would cost T x T; a call per segment would drown in overhead on small models. Here a
segment's queries are the rows of its keys (for Y: Z again, its outputs dropped) and the padding stands at the right, so
that the kernel's plain causality is exact and no mask is read at all. The price is bounded: at most `_SLACK` of a
segment's length in padding, and the few rows of Z twice. Only bidirectional groups of mixed lengths read a key mask.

Rows go into slots and back by `index_select` in both directions: its own backward is a serial scatter-add, but here
all rows except Z's stand in exactly one slot, so the backward is a gather too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from lbr_dist.model.layout import Segments

_SLACK = 0.2


@dataclass(frozen=True)
class PaddedGroups:
    """The segments of one batch in padded groups, with P slots in all.

    Attributes:
        shapes: (segments, padded length) of every group, in the order of the slots.
        masks: per group a key mask [segments, 1, 1, length], or None where causality hides the padding.
        rows_P: row of the stream that stands in each slot; in the padding the segment's own first key, so that a NaN
            (times 0 it is NaN) stays in its own segment.
        slot_T: slot in which each row of the stream is a query.
        idle_N: slots that are no row's query: padding, and Z in front of Y.
        again_rows_M, again_slots_M: rows of Z, and the slots in which they stand a second time.
    """

    shapes: list[tuple[int, int]]
    masks: list[Tensor | None]
    rows_P: Tensor
    slot_T: Tensor
    idle_N: Tensor
    again_rows_M: Tensor
    again_slots_M: Tensor


def padded_sdpa(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """Attention by segments. q [T, H, Dh], k and v [T, Hkv, Dh] to [T, H, Dh]."""
    if segments.padded is None:
        segments.padded = padded_groups(segments)
    groups: PaddedGroups = segments.padded
    shared = q_THD.shape[1] // k_THD.shape[1]
    if shared > 1 and q_THD.is_cuda:  # in float32, or with a mask, only the unfused kernel takes grouped queries there
        k_THD, v_THD, shared = k_THD.repeat_interleave(shared, 1), v_THD.repeat_interleave(shared, 1), 1
    sizes = [count * length for count, length in groups.shapes]
    parts = [_Gather.apply(tensor, groups).split(sizes) for tensor in (q_THD, k_THD, v_THD)]
    outputs = []
    for (count, length), mask, *qkv in zip(groups.shapes, groups.masks, *parts, strict=True):
        q, k, v = (part.unflatten(0, (count, length)).transpose(1, 2) for part in qkv)
        causal = segments.causal and length > 1
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=shared > 1
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return _Scatter.apply(torch.cat(outputs), groups)


def padded_groups(segments: Segments) -> PaddedGroups:
    """Sort the segments by length and cut them into groups whose shortest is within `_SLACK` of the longest."""
    device = segments.cu_q.device
    cu_q, cu_k = (cu.cpu().numpy().astype(np.int64) for cu in (segments.cu_q, segments.cu_k))
    q_lengths, k_lengths = np.diff(cu_q), np.diff(cu_k)
    kv_index = np.arange(cu_k[-1]) if segments.kv_index_K is None else segments.kv_index_K.cpu().numpy()
    order = np.argsort(-k_lengths, kind="stable")
    falling = -k_lengths[order]
    shapes, masks, rows, real, query = [], [], [], [], []
    start = 0
    while start < len(order):
        longest = -falling[start]
        end = int(np.searchsorted(falling, -(1 - _SLACK) * longest, side="right"))
        members = order[start:end, None]
        offset = np.arange(longest)
        real_SL = offset < k_lengths[members]
        rows.append(kv_index[cu_k[members] + np.where(real_SL, offset, 0)].ravel())
        real.append(real_SL.ravel())
        query.append((real_SL & (offset >= k_lengths[members] - q_lengths[members])).ravel())
        shapes.append((end - start, int(longest)))
        unmasked = segments.causal or bool(real_SL.all())
        masks.append(None if unmasked else torch.from_numpy(real_SL[:, None, None, :]).to(device))
        start = end
    rows_P, real_P, query_P = (np.concatenate(parts) for parts in (rows, real, query))
    slot_T = np.empty(cu_q[-1], dtype=np.int64)
    slot_T[rows_P[query_P]] = np.flatnonzero(query_P)
    again_M = np.flatnonzero(real_P & ~query_P)
    indices = (rows_P, slot_T, np.flatnonzero(~query_P), rows_P[again_M], again_M)
    return PaddedGroups(shapes, masks, *(torch.from_numpy(index).to(device) for index in indices))


class _Gather(Function):
    """Rows of the stream to slots, [T, H, Dh] to [P, H, Dh]. Padding takes no part in any output: its gradient is 0."""

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, groups: PaddedGroups) -> Tensor:
        ctx.groups = groups
        return x_THD.index_select(0, groups.rows_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PHD: Tensor) -> tuple[Tensor, None]:
        groups: PaddedGroups = ctx.groups
        grad_THD = grad_PHD.index_select(0, groups.slot_T)
        grad_THD.index_add_(0, groups.again_rows_M, grad_PHD.index_select(0, groups.again_slots_M))
        return grad_THD, None


class _Scatter(Function):
    """Outputs from slots back to their rows, [P, H, Dh] to [T, H, Dh]; idle slots are dropped."""

    @staticmethod
    def forward(ctx: Any, x_PHD: Tensor, groups: PaddedGroups) -> Tensor:
        ctx.groups = groups
        return x_PHD.index_select(0, groups.slot_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor, None]:
        groups: PaddedGroups = ctx.groups
        return grad_THD.index_select(0, groups.rows_P).index_fill_(0, groups.idle_N, 0), None
