"""One exact way to accumulate gradients over the micro-batches of a step, under any ZeRO stage.

DeepSpeed averages gradients over ranks and, by default, divides each backward by its accumulation count; several of the
ways to run more than one backward per step are silently wrong (docs/contrastive.md has the table). This file is the one
place that knows: `accumulate` leaves in the engine the gradient of

    (1 / world) * sum over ranks, sum over closures of loss

and the caller then calls `engine.step()` once. So for a mean over the global batch, multiply each closure's loss sum by
world / (number of terms over all ranks).

By default gradients stay local until the last backward, and are reduced once. That takes room for a whole gradient on
every rank; `reduce="each"` reduces after every backward instead, for ZeRO-3 models whose whole gradient does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Reduce = Literal["auto", "once", "each"]

SAFE_LOW_PRECISION_SUM = 16
"""Most bfloat16 gradients added up locally: beyond, a gradient can vanish in the running sum (8 bits of mantissa)."""


def accumulate(
    engine: DeepSpeedEngine, closures: Sequence[Callable[[], Tensor]], *, reduce: Reduce = "auto"
) -> list[Tensor]:
    """Run and differentiate each closure in turn; then the caller calls `engine.step()`.

    Args:
        engine: with an accumulation of 1 (`gradient_accumulation_steps: 1`) and managed accumulation, the default.
        closures: each runs the engine's module and returns a scalar that depends on every parameter it ran through;
            the same number on every rank, at least one, with the same number of module calls each (ZeRO-3 hangs
            otherwise). A rank with nothing to do returns a dummy batch's output times 0.
        reduce: "once": one reduction per step; "each": one per closure; "auto": once, but for more than
            `SAFE_LOW_PRECISION_SUM` bfloat16 closures, which a rank would add up in bfloat16 before the reduction; what
            is reduced is added up in float32 (`grad_accum_dtype`). ZeRO-1 sums in bfloat16 either way.

    Returns:
        The closures' values, detached.

    Raises:
        ValueError: no closure, or an engine configured otherwise.

    An error in a closure leaves the step's gradients dropped and starts no collective call, so that it reaches the
    launcher at once and the other ranks can be stopped. Where all ranks meet it they may go on: the next step begins
    with nothing, if the error was in the first closure or gradients are reduced once.
    """
    if not closures:
        raise ValueError("accumulate: no micro-batch on this rank; give it a dummy one")
    if engine.gradient_accumulation_steps() != 1 or not engine.managed_gradient_accumulation():
        raise ValueError(
            "accumulate: the DeepSpeed configuration needs gradient_accumulation_steps: 1 (accumulation is derived "
            "from the plan) and no managed_gradient_accumulation: false"
        )
    if len(closures) > 1 and _once(engine, len(closures), reduce):
        with _coalesced(engine):
            return [_backward(engine, closure) for closure in closures]
    values = []
    for number, closure in enumerate(closures):
        engine.set_gradient_accumulation_boundary(number == len(closures) - 1)
        values.append(_backward(engine, closure))
    return values


@contextmanager
def _coalesced(engine: DeepSpeedEngine) -> Iterator[None]:
    """DeepSpeed's one reduction for all backward passes inside; after an error the next step begins with nothing."""
    count = engine.optimizer.micro_step_id
    try:
        with engine.coalesce_grad_reduction():
            try:
                yield
            except BaseException:
                _drop(engine)  # with nothing left to reduce, leaving the block starts no collective call
                raise
    except BaseException:
        _drop(engine)  # leaving it counts as a backward all the same, to whose gradient the next one would be added
        engine.optimizer.micro_step_id = count
        raise


def _drop(engine: DeepSpeedEngine) -> None:
    engine.zero_grad()
    engine.optimizer.zero_grad()  # float32 sums of bfloat16 gradients too; in this order, for a CPU without streams


def _backward(engine: DeepSpeedEngine, closure: Callable[[], Tensor]) -> Tensor:
    loss = closure()
    engine.backward(loss, scale_wrt_gas=False)
    return loss.detach()


def _once(engine: DeepSpeedEngine, count: int, reduce: Reduce) -> bool:
    """Whether to coalesce. Without ZeRO the reduction waits for the boundary anyway."""
    stage = int(engine.zero_optimization_stage())
    if stage == 0 or reduce != "auto":
        return stage > 0 and reduce == "once"
    compute, _ = engine.get_data_types()
    return stage < 2 or compute == torch.float32 or count <= SAFE_LOW_PRECISION_SUM
