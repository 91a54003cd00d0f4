"""The language-model head as a loss: cross entropy of a linear layer, with logits never whole.

L positions times a vocabulary of 150,000 is gigabytes of logits, and as much again of their gradient. Here the rows go
through in chunks; since the loss is a plain sum, each chunk's gradients are final as soon as its logits exist, and are
made in the forward pass. What stays is the two gradients that the backward pass returns anyway, in float32 until it has
multiplied them: numbers that are bfloat16 already have that factor rounded away, one and the same for all of them.
torch 2.13's `linear_cross_entropy` has the same idea (and is the oracle in the tests), but older versions lack it.

`LossHead` takes the place of `lm_head` and keeps its parameter and its name, so that checkpoints, weight tying and
plain transformers see no difference, and ZeRO-3 gathers the weight for the call of the module that uses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Logits that exist at a time: 64 MiB of float32 on a CPU, 512 MiB on a GPU. Few rows in a chunk are slow on either,
because each chunk reads the whole weight and reads and writes its gradient: on a GPU (150,000 x 1,536) that takes as
long as the arithmetic of 300 rows (`benchmarks/loss_head.py`)."""


class LossHead(nn.Linear):
    """A linear head that returns logits, or with `targets_L` the summed cross entropy in float32."""

    def __init__(self, lm_head: nn.Linear):
        super().__init__(lm_head.in_features, lm_head.out_features, bias=False, device="meta")
        self.weight = lm_head.weight

    def forward(self, hidden: Tensor, targets_L: Tensor | None = None) -> Tensor:
        """Logits [..., V] of `hidden` [..., D]; or, of [L, D] with targets [L], the float32 scalar sum of -log P."""
        if targets_L is None:
            return super().forward(hidden)
        return linear_cross_entropy_sum(hidden, self.weight, targets_L)


def linear_cross_entropy_sum(
    hidden_LD: Tensor, weight_VD: Tensor, targets_L: Tensor, chunk_elements: int | None = None
) -> Tensor:
    """Sum over L of `-log softmax(hidden @ weight.T)[target]`, as a float32 scalar; exact, in chunks of rows.

    L may be 0: the loss is then 0 and so are the gradients. One backward pass only.
    """
    if chunk_elements is None:
        chunk_elements = CHUNK[hidden_LD.device.type]
    rows = max(1, chunk_elements // weight_VD.shape[0])
    return _LinearCrossEntropy.apply(hidden_LD, weight_VD, targets_L, rows)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, hidden_LD: Tensor, weight_VD: Tensor, targets_L: Tensor, rows: int) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_hidden_LD = torch.zeros_like(hidden_LD, dtype=wide) if need_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
        loss = hidden_LD.new_zeros((), dtype=torch.float32)
        logits_RV = hidden_LD.new_empty((min(rows, len(targets_L)), weight_VD.shape[0]))  # once: a CPU is slow at it
        for start in range(0, len(targets_L), rows):
            hidden_CD, targets_C1 = hidden_LD[start : start + rows], targets_L[start : start + rows, None]
            log_CV = torch.mm(hidden_CD, weight_VD.t(), out=logits_RV[: len(hidden_CD)]).float()
            torch.log_softmax(log_CV, 1, out=log_CV)
            own_C1 = log_CV.gather(1, targets_C1)
            loss -= own_C1.sum()
            if not (need_hidden or need_weight):
                continue
            low_CV = log_CV.exp_().to(weight_VD.dtype)
            low_CV.scatter_(1, targets_C1, own_C1.expm1().to(weight_VD.dtype))
            if grad_hidden_LD is not None:
                _accumulate(grad_hidden_LD[start : start + rows], low_CV, weight_VD)
            if grad_weight_VD is not None:
                _accumulate(grad_weight_VD, low_CV.t(), hidden_CD)
        ctx.grads, ctx.dtype = (grad_hidden_LD, grad_weight_VD), weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the head's gradients were made in the forward pass and serve one backward pass only")
        hidden, weight = (None if g is None else g.mul_(grad).to(ctx.dtype) for g in grads)
        return hidden, weight, None, None


def _accumulate(total_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """total += left @ right, in float32 whatever the factors' type."""
    if left_MK.dtype == total_MN.dtype:
        total_MN.addmm_(left_MK, right_KN)
    elif total_MN.is_cuda:  # the product itself adds to the float32 total, which a product beside it would cross twice
        torch.addmm(total_MN, left_MK, right_KN, out_dtype=torch.float32, out=total_MN)
    else:
        total_MN.addmm_(left_MK.float(), right_KN.float())
