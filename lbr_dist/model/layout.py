"""Samples to one packed stream: where X, Z and Y lie, who attends to whom, and which position predicts what.

A sample is `[X ; Z ; Y]` with positions that run from 0 through all three (paper section 3.2). Samples lie one behind
the other in a single stream of T tokens, never padded. Everything that depends on the lengths alone is computed here,
once per batch and in numpy, so that no decoder layer computes an index and the device never waits for the host.

    stream      X X X Z Y Y | X X Z Y | ...
    segment 1   q: X X X Z      k: X X X Z      causal
    segment 2   q: Y Y          k: Z Y Y        causal, aligned at the bottom right

The two segments are the paper's information cut-off mask, exactly: Y sees Z and earlier Y, never X. Queries stay in
place; keys and values are gathered once, with only Z in them twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One sample as token ids: `z` bottleneck tokens (0: none), and an empty `y` where nothing is predicted."""

    x: Sequence[int]
    z: int
    y: Sequence[int] = ()


class _Tensors:
    """Moves all tensors of a dataclass, nested ones included."""

    def _map(self, function: Any) -> Self:
        changed = {}
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changed[item.name] = function(value)
            elif isinstance(value, _Tensors):
                changed[item.name] = value._map(function)
        return replace(self, **changed)  # type: ignore[type-var]

    def to(self, device: torch.device | str) -> Self:
        """Copy on `device`; the host does not wait for the device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))


@dataclass
class Segments(_Tensors):
    """Who attends to whom, for a variable-length attention call.

    Segment i has the queries `cu_q[i]:cu_q[i+1]` of the stream, and the keys `kv_index_K[cu_k[i]:cu_k[i+1]]`. With
    `causal`, query j of n sees key c of m where `c <= j + m - n` (bottom-right alignment).

    Attributes:
        cu_q, cu_k: int32 [segments + 1], offsets.
        kv_index_K: int64, rows of the stream to gather as keys and values; None: the keys are the stream itself.
        max_q, max_k: longest segment, in tokens.
        causal: False is the bidirectional ablation.
        padded, block_mask: what a backend derives from the segments at the first layer and reuses at the others.
    """

    cu_q: Tensor
    cu_k: Tensor
    kv_index_K: Tensor | None
    max_q: int
    max_k: int
    causal: bool
    padded: Any = field(default=None, init=False, repr=False, compare=False)
    block_mask: Any = field(default=None, init=False, repr=False, compare=False)


@dataclass
class PackedBatch(_Tensors):
    """One micro-batch: S samples in one stream of T tokens, with L target tokens.

    Attributes:
        tokens_T: ids; at the positions of Z a placeholder (0) that the model replaces.
        positions_T: position in the sample, from 0, continuous over X, Z and Y.
        z_index_T: -1, or which of the K bottleneck vectors stands there. A sample with z of them has the LAST z, in
            order, so that the last Z is always vector K-1.
        z_positions_N: the N rows of the stream where `z_index_T` is not -1.
        segments: attention.
        loss_positions_L: rows whose hidden state predicts a target: the last Z (without Z: the last X) predicts Y_1,
            and Y_t predicts Y_t+1.
        targets_L: what they predict.
        starts_S, x_len_S, z_len_S, y_len_S: first row and lengths of each sample.
    """

    tokens_T: Tensor
    positions_T: Tensor
    z_index_T: Tensor
    z_positions_N: Tensor
    segments: Segments
    loss_positions_L: Tensor
    targets_L: Tensor
    starts_S: Tensor
    x_len_S: Tensor
    z_len_S: Tensor
    y_len_S: Tensor

    @property
    def pool_S(self) -> Tensor:
        """Row of each sample's last Z, or of its last X where it has no Z."""
        return self.starts_S + self.x_len_S + self.z_len_S - 1


def pack(samples: Sequence[Sample], *, bottleneck_vectors: int, hide_x: bool, causal: bool = True) -> PackedBatch:
    """Lay samples out as one stream.

    Args:
        samples: at least one. X or Y may be empty; X and Z may not both be.
        bottleneck_vectors: K, the number of learned vectors.
        hide_x: Y does not see X (the bottleneck); False is plain causal attention over the whole sample.
        causal: False is the bidirectional ablation, for samples without Y.

    Raises:
        ValueError: a sample that the layout cannot hold; the plan must not make one.
    """
    if not samples:
        raise ValueError("pack needs at least one sample")
    lengths = np.array([(len(s.x), s.z, len(s.y)) for s in samples], dtype=np.int64)
    x_S, z_S, y_S = lengths.T
    _check(x_S, z_S, y_S, bottleneck_vectors, hide_x, causal)
    total_S = lengths.sum(1)
    starts_S = np.cumsum(total_S) - total_S

    parts = chain.from_iterable((s.x, (0,) * s.z, s.y) for s in samples)
    tokens_T = np.fromiter(chain.from_iterable(parts), np.int64, total_S.sum())
    z_positions_N = _ranges(starts_S + x_S, z_S)
    z_index_T = np.full(len(tokens_T), -1, dtype=np.int64)
    z_index_T[z_positions_N] = _ranges(bottleneck_vectors - z_S, z_S)
    y_rows_L = _ranges(starts_S + x_S + z_S, y_S)
    return PackedBatch(
        tokens_T=torch.from_numpy(tokens_T),
        positions_T=torch.from_numpy(_ranges(np.zeros_like(total_S), total_S)),
        z_index_T=torch.from_numpy(z_index_T),
        z_positions_N=torch.from_numpy(z_positions_N),
        segments=_segments(starts_S, x_S, z_S, y_S, hide_x, causal),
        loss_positions_L=torch.from_numpy(y_rows_L - 1),
        targets_L=torch.from_numpy(tokens_T[y_rows_L]),
        starts_S=torch.from_numpy(starts_S),
        x_len_S=torch.from_numpy(x_S.copy()),
        z_len_S=torch.from_numpy(z_S.copy()),
        y_len_S=torch.from_numpy(y_S.copy()),
    )


def _check(x_S: np.ndarray, z_S: np.ndarray, y_S: np.ndarray, vectors: int, hide_x: bool, causal: bool) -> None:
    if (x_S + z_S == 0).any():
        raise ValueError(f"sample {int(np.argmin(x_S + z_S))} has neither X nor Z: nothing can represent it")
    if (z_S > vectors).any():
        raise ValueError(f"a sample asks for {int(z_S.max())} bottleneck tokens; there are {vectors} vectors")
    if hide_x and ((z_S == 0) & (y_S > 0)).any():
        raise ValueError("hide_x needs at least one bottleneck token in every sample with a target")
    if not causal and (y_S > 0).any():
        raise ValueError("a target needs causal attention: bidirectional attention would show Y to itself")


def _segments(
    starts_S: np.ndarray, x_S: np.ndarray, z_S: np.ndarray, y_S: np.ndarray, hide_x: bool, causal: bool
) -> Segments:
    if hide_x:
        q_lengths = np.stack([x_S + z_S, y_S], 1).ravel()
        k_starts = np.stack([starts_S, starts_S + x_S], 1).ravel()
        k_lengths = np.stack([x_S + z_S, z_S + y_S], 1).ravel()
        used = q_lengths > 0
        q_lengths, k_starts, k_lengths = q_lengths[used], k_starts[used], k_lengths[used]
    else:
        q_lengths = k_lengths = x_S + z_S + y_S
        k_starts = starts_S
    in_place = int(k_lengths.sum()) == int(q_lengths.sum())
    return Segments(
        cu_q=torch.from_numpy(_offsets(q_lengths)),
        cu_k=torch.from_numpy(_offsets(k_lengths)),
        kv_index_K=None if in_place else torch.from_numpy(_ranges(k_starts, k_lengths)),
        max_q=int(q_lengths.max()),
        max_k=int(k_lengths.max()),
        causal=causal,
    )


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + length - 1 of every range, one behind the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1], dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)
