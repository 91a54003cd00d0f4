"""Progress bars on standard error, for people only: silent where it is not a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import TracebackType


class Progress:
    """Bars for the phases of one command; a context manager.

    Args:
        show: False: none, also on a terminal.
        transient: they go when they are done.
    """

    def __init__(self, show: bool = True, *, transient: bool = False) -> None:
        self._show, self._transient = show, transient

    def __enter__(self) -> Progress:
        self._bars = None
        if self._show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bars = Bars(*columns, console=Console(stderr=True), transient=self._transient)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextlib.contextmanager
    def phase(self, description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """One bar; yields a function that advances it. `total` None: the end is not known."""
        if self._bars is None:
            yield lambda count: None
            return
        bars = self._bars
        task = bars.add_task(description, total=total)
        yield lambda count: bars.advance(task, count)
        bars.update(task, total=bars.tasks[task].completed)


@contextlib.contextmanager
def bar(description: str, total: int | None, show: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar by itself, which goes when it is done; yields as `Progress.phase` does."""
    with Progress(show, transient=True) as progress, progress.phase(description, total) as advance:
        yield advance
