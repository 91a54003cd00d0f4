"""Attention over a packed stream, by segments and without a mask tensor.

We own the attention function: transformers would guess the packing from the position ids, and guess it wrong with a
cache or an all-ones mask. It is registered as `lbr_packed`; the model's forward hands it the batch's `Segments` as a
keyword argument. Three backends compute the same thing:

- `varlen` (CUDA): one variable-length flash call, `torch.nn.attention.varlen`.
- `flex` (CUDA): FlexAttention with a block mask made once per batch; for heads or types that flash lacks.
- `sdpa` (CPU, and wherever the others do not apply): segments padded into groups of similar length, see `padded.py`.

Without Segments (generation with a cache) the call falls through to transformers' SDPA with the mask it was given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lbr_dist.errors import UserError
from lbr_dist.model.layout import Segments
from lbr_dist.model.padded import padded_sdpa

NAME = "lbr_packed"
Backend = Literal["varlen", "flex", "sdpa"]


def register() -> None:
    """Make `attn_implementation="lbr_packed"` known to transformers. No mask function goes with it: none is built."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def choose_backend(setting: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for `model.attention` on a device.

    Raises:
        UserError: the setting asks for a kernel that this device or type does not have.
    """
    if setting == "auto":
        flash = device.type == "cuda" and dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (8, 0)
        return "varlen" if flash else "sdpa"
    if setting in ("varlen", "flex") and device.type != "cuda":
        raise UserError(f"model.attention={setting} needs a CUDA device; set model.attention=auto")
    if setting == "varlen" and dtype == torch.float32:
        raise UserError(
            "model.attention=varlen has no float32 kernel; set model.dtype=bfloat16 or model.attention=flex"
        )
    return setting  # type: ignore[return-value]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    backend: Backend = "sdpa",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' own form: query [1, H, T, Dh], key and value [1, Hkv, T, Dh] to [1, T, H, Dh].

    Args:
        module: the layer's attention module; only read where there are no segments.
        query, key, value: after rotary embedding; a stream has batch size 1.
        attention_mask: None, or (without segments) a 4-D mask.
        scaling: of the scores; None: 1 / sqrt(Dh).
        dropout: must be 0 with segments: no backend has it in common with the others.
        segments: who attends to whom.
        backend: see `choose_backend`.
        kwargs: what else the model hands down; passed on without segments, else of no effect here.
    """
    if segments is None:
        if attention_mask is None:
            raise RuntimeError("lbr_packed needs `segments`, or a 4-D mask: it never guesses who attends to whom")
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise RuntimeError("packed attention has no dropout; load the backbone with attention_dropout=0")
    q_THD, k_THD, v_THD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out_THD = _BACKENDS[backend](q_THD, k_THD, v_THD, segments, scaling)
    return out_THD.unsqueeze(0), None


def _gather_keys(k_THD: Tensor, v_THD: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    if segments.kv_index_K is None:
        return k_THD, v_THD
    return k_THD.index_select(0, segments.kv_index_K), v_THD.index_select(0, segments.kv_index_K)


@cache
def _varlen_function() -> tuple[Callable[..., Any], bool]:
    """The function, and whether it takes fewer heads of keys than of queries (from torch 2.12 or 2.13 on)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    attend, grouped = _varlen_function()
    k_KHD, v_KHD = _gather_keys(k_THD, v_THD, segments)
    options: dict[str, Any] = {"window_size": (-1, 0) if segments.causal else (-1, -1), "scale": scaling}
    shared = q_THD.shape[1] // k_KHD.shape[1]
    if shared > 1 and grouped:
        options["enable_gqa"] = True
    elif shared > 1:
        k_KHD, v_KHD = k_KHD.repeat_interleave(shared, 1), v_KHD.repeat_interleave(shared, 1)
    tensors = (q_THD.contiguous(), k_KHD.contiguous(), v_KHD.contiguous())
    return attend(*tensors, segments.cu_q, segments.cu_k, segments.max_q, segments.max_k, **options)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _block_mask(segments: Segments) -> Any:
    """FlexAttention's block mask of the segments; made once per batch.

    Counted from the end of a segment, bottom-right alignment reads: a query sees the keys at least as far from the end.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    if segments.block_mask is None:
        q_segment, q_from_end = _places(segments.cu_q)
        k_segment, k_from_end = _places(segments.cu_k)
        causal = segments.causal

        def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = q_segment[q] == k_segment[k]
            return same & (k_from_end[k] >= q_from_end[q]) if causal else same

        segments.block_mask = create_block_mask(
            visible, None, None, len(q_segment), len(k_segment), device=str(segments.cu_q.device)
        )
    return segments.block_mask


def _places(cu: Tensor) -> tuple[Tensor, Tensor]:
    """Of every row: its segment, and its distance from the segment's end."""
    total = int(cu[-1])
    segment = torch.repeat_interleave(torch.arange(len(cu) - 1, device=cu.device), cu.diff(), output_size=total)
    return segment, cu[segment + 1] - torch.arange(total, device=cu.device)


def _flex(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    k_KHD, v_KHD = _gather_keys(k_THD, v_THD, segments)
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q_THD, k_KHD, v_KHD))
    out = _compiled_flex()(
        q, k, v, block_mask=_block_mask(segments), scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Segments, float | None], Tensor]] = {
    "varlen": _varlen,
    "flex": _flex,
    "sdpa": padded_sdpa,
}
