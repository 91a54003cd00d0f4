"""Where the row-wise work of a command runs: here, or on the workers of a cluster.

The expensive part of `lbr prepare`, `encode` and `mine` has one shape: read sources as a stream of blocks, do something
to each block, commit its result to a file of its own, and hand back a few numbers. A command is written once against
`Executor`; this module's `Here` does the blocks one after the other, `lbr_dist.launch.ray_data` does them on Ray. A
block is the same wherever it is done, so the output is too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

Source = TypeVar("Source")
Block = TypeVar("Block")
Result = TypeVar("Result")


class Executor(Protocol):
    """Does `work` to every block that `read` gives of every source."""

    def stream(
        self,
        sources: Iterable[Source],
        read: Callable[[Source], Iterable[Block]],
        work: Callable[[Block], Result],
        *,
        model: bool = False,
    ) -> Iterator[Result]:
        """Results, in any order.

        Args:
            sources: small descriptions, such as file names.
            read: the blocks of a source, each small enough for memory. Picklable, as `work` is.
            work: may keep what is expensive to load (a model, a tokenizer) in attributes that are made at its first
                call and left out when it is pickled.
            model: the work holds a model: it belongs into few processes that stay, each with a device of its own.
        """
        ...


class Here:
    """In this process, one block after the other, in order."""

    def stream(
        self,
        sources: Iterable[Source],
        read: Callable[[Source], Iterable[Block]],
        work: Callable[[Block], Result],
        *,
        model: bool = False,
    ) -> Iterator[Result]:
        """See `Executor`."""
        for source in sources:
            for block in read(source):
                yield work(block)


_current: ContextVar[Executor] = ContextVar("executor", default=Here())  # noqa: B039 (it holds nothing)


def current() -> Executor:
    """Where commands run their work."""
    return _current.get()


@contextmanager
def executing(executor: Executor) -> Iterator[None]:
    """Make `executor` the current one."""
    token = _current.set(executor)
    try:
        yield
    finally:
        _current.reset(token)


def alone(task: Source) -> tuple[Source]:
    """`read` of a source that is its own only block."""
    return (task,)
