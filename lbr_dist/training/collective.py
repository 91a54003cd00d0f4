"""What a run does on one rank, or on each by itself, and what came of it on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lbr_dist.errors import UserError

Result = TypeVar("Result")


def on_rank_zero(function: Callable[[], Result]) -> Result:
    """Run a function on rank 0 and give its result, or its `UserError`, to every rank. Collective."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def on_all_ranks(function: Callable[[], None]) -> None:
    """Run a function on every rank; if it raises a `UserError` on some, the first one is raised on all. Collective."""
    error = None
    try:
        function()
    except UserError as raised:
        error = str(raised)
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for found in errors:
        if found is not None:
            raise UserError(found)
