"""A contrastive step over a batch of any size in the memory of one micro-batch (GradCache; Gao et al. 2021).

The loss needs all embeddings of the global batch, but their activations need not exist together:

    pass 1  every micro-batch without gradient: only the embeddings are kept
    loss    on the embeddings as leaves, with the negatives of all ranks: gives d loss / d embedding
    pass 2  every micro-batch again, now with gradient, of the surrogate sum(embedding * d loss / d embedding)

By the chain rule the parameter gradient is that of the whole batch at once. Dropout must repeat itself in pass 2, so
the random state before each micro-batch is recorded and restored. The price is one more forward pass, but for the last
micro-batch: its activations fit while nothing else is there, so pass 1 runs it with gradient and pass 2 begins with its
backward. Of M micro-batches M - 1 are run twice, and with one nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Micro = TypeVar("Micro")
Stats = TypeVar("Stats")


def prepare(
    micro_batches: Sequence[Micro],
    embed: Callable[[Micro], Tensor],
    loss_of: Callable[[Sequence[Tensor]], tuple[Tensor, Stats]],
    *,
    cache: bool | None = None,
) -> tuple[list[Callable[[], Tensor]], Callable[[], tuple[Tensor, Stats]]]:
    """Pass 1 and the loss: what is left is to `accumulate`, alone or beside other losses' closures.

    The engine then has the exact gradient of the loss over all micro-batches.

    Args:
        micro_batches: as many on every rank.
        embed: runs the engine's module on one micro-batch and returns its embeddings [S, D]; rows that the loss does
            not use (a dummy micro-batch) get a gradient of zero.
        loss_of: from the micro-batches' embeddings, in order, to the loss and anything else. It runs once per step, on
            every rank; communication between ranks belongs here. As in `accumulate`, gradients are averaged over ranks
            (`info_nce` has the factor that this needs).
        cache: None: only if there is more than one micro-batch. False: keep all activations, in one backward.

    Returns:
        The closures of pass 2, and what gives the loss, detached, and what else `loss_of` returned once they have run.
    """
    if cache is None:
        cache = len(micro_batches) > 1
    if not cache:
        return _direct(micro_batches, embed, loss_of)
    states, leaves = [], []
    with torch.no_grad():
        for micro in micro_batches[:-1]:
            states.append(RandomState.now())
            leaves.append(embed(micro).requires_grad_())
    with torch.enable_grad():
        last = embed(micro_batches[-1])
        leaves.append(last.detach().requires_grad_())
        after = RandomState.now()
        loss, stats = loss_of(leaves)
        *gradients, of_last = torch.autograd.grad(loss, leaves, materialize_grads=True)
    kept = [last]
    closures: list[Callable[[], Tensor]] = [lambda: (kept.pop() * of_last).sum()]
    for micro, state, gradient in zip(micro_batches, states, gradients, strict=False):
        final = after if len(closures) == len(micro_batches) - 1 else None
        closures.append(_surrogate(micro, embed, state, gradient, final))
    return closures, lambda: (loss.detach(), stats)


def _direct(
    micro_batches: Sequence[Micro],
    embed: Callable[[Micro], Tensor],
    loss_of: Callable[[Sequence[Tensor]], tuple[Tensor, Stats]],
) -> tuple[list[Callable[[], Tensor]], Callable[[], tuple[Tensor, Stats]]]:
    kept: list[tuple[Tensor, Stats]] = []

    def closure() -> Tensor:
        loss, stats = loss_of([embed(micro) for micro in micro_batches])
        kept.append((loss.detach(), stats))
        return loss

    return [closure], lambda: kept[0]


def _surrogate(
    micro: Micro, embed: Callable[[Micro], Tensor], state: RandomState, gradient: Tensor, final: RandomState | None
) -> Callable[[], Tensor]:
    """Pass 2 of one micro-batch; `final`: where it leaves the generators, after the last one."""

    def closure() -> Tensor:
        state.restore()
        embedding = embed(micro)
        if final is not None:
            final.restore()
        return (embedding * gradient).sum()

    return closure


@dataclass(frozen=True)
class RandomState:
    """State of the generators that dropout draws from: the CPU's, and the current CUDA device's where there is one."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """Record."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None)

    def restore(self) -> None:
        """Set the generators back to what was recorded."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
