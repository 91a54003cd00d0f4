"""What a run does on one rank, or on each by itself, and what came of it on all of them; who tells whom."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, TypeVar

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


class Team(Protocol):
    """Ranks that work together; used from one thread at a time."""

    rank: int
    world: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""


class GlooTeam:
    """The ranks of the default process group, over a gloo group of their own. Collective to make.

    Args:
        timeout: how long a rank waits for the others.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timeout)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]
