"""Stage 1: generative learning through the bottleneck (paper section 3.2, equation 2).

The loss of an optimizer step is the mean of `-log P(Y_t | Z, Y_<t)` over all target tokens of the *global* batch. A
mean of micro-batch means would weight a token by how empty its micro-batch is, and so depend on how samples fall into
micro-batches and ranks; here each micro-batch gives its plain sum, divided by a denominator that the plan knows
beforehand on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lbr_dist.model.layout import PackedBatch


@dataclass(frozen=True)
class GenerativeLoss:
    """Loss of one micro-batch.

    Attributes:
        backward: scalar to differentiate. Gradients summed over a rank's micro-batches, then averaged over the ranks,
            are those of the global mean.
        total: float32 scalar without gradient, the sum of -log P over this micro-batch's targets. Summed over all
            micro-batches and ranks and divided by the step's target tokens, it is the step's loss.
    """

    backward: Tensor
    total: Tensor


def generative_loss(model: nn.Module, batch: PackedBatch, *, target_tokens: int, world_size: int) -> GenerativeLoss:
    """Loss of one micro-batch of a step.

    Args:
        model: an `LbrModel`, or the DeepSpeed engine around one.
        batch: samples with targets; may hold none (a dummy), the loss is then 0.
        target_tokens: targets of the step over all micro-batches and ranks (`StepPlan.target_tokens`).
        world_size: data-parallel ranks, over which the engine averages gradients.
    """
    total = model(batch, "generate")
    return GenerativeLoss(total * (world_size / max(1, target_tokens)), total.detach())
