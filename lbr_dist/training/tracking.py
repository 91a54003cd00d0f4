"""What a run says about itself: rows in metrics.jsonl, wandb where it is wanted, and one line for who watches.

Rank 0 only. The file is the record: one JSON object per logged step, appended as it happens; a resumed run first drops
the rows of steps that it takes back, so that reading the file gives one row per step and one loss curve.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from lbr_dist.config import Recipe, Tracking
from lbr_dist.disk import DENIED, FULL, replacing
from lbr_dist.errors import UserError, one_line
from lbr_dist.logs import iterate_rows, open_log

METRICS = "metrics.jsonl"
PLAIN_SECONDS = 5.0
"""Between two lines where the output is not a terminal."""

NO_PLACE = {
    *FULL,
    *DENIED,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
}
"""Errors that do not go away by another start, as those of a network may."""

log = logging.getLogger("lbr")


class Tracker:
    """Metrics of one run, on rank 0.

    Attributes:
        wandb_id: id of the wandb run, to be kept in checkpoints; None where wandb is not used.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        total_steps: int,
        done: int,
        wandb_id: str | None = None,
        on_row: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        run_dir = Path(recipe.output)
        self._recipe, self._total, self._start, self._on_row = recipe, total_steps, done, on_row
        keep_rows(run_dir / METRICS, done)
        self._file: TextIO = open_log(run_dir / METRICS)
        self._wandb = _start_wandb(recipe, run_dir, wandb_id)
        self.wandb_id: str | None = self._wandb.id if self._wandb else None
        self._line = _Terminal(total_steps) if sys.stderr.isatty() else _Plain()
        self._began = time.monotonic()  # wandb may take minutes

    def row(self, values: dict[str, Any]) -> bool:
        """Log one step; `step` counts finished steps. Values that are not finite are written as null.

        Returns:
            Whether it is one of the steps that have a row.
        """
        step = values["step"]
        written = step % self._recipe.tracking.every_steps == 0 or step == self._total
        if written:
            clean = {key: _number(value) for key, value in values.items()}
            self._file.write(json.dumps(clean) + "\n")
            given = {key: value for key, value in clean.items() if value is not None}
            self._to_wandb(lambda run: run.log(given, step=step))
            if self._on_row:
                self._on_row(clean)
        self._line.show(step, self._describe(values, self._eta(step)), last=step == self._total)
        return written

    def close(self) -> None:
        """Finish the files and the line."""
        self._line.close()
        self._file.close()
        self._to_wandb(lambda run: run.finish())

    def _to_wandb(self, call: Callable[[Any], object]) -> None:
        """Whatever wandb raises (its helper process may have been killed) ends its use and not the run."""
        if not self._wandb:
            return
        try:
            call(self._wandb)
        except Exception as error:
            self._wandb = None
            log.warning(
                "wandb failed (%s: %s) and gets no more rows until the next start; %s has all of them",
                type(error).__name__,
                error,
                self._file.name,
            )

    def _eta(self, step: int) -> float:
        return (time.monotonic() - self._began) / max(1, step - self._start) * (self._total - step)

    def _describe(self, values: dict[str, Any], eta_s: float) -> str:
        parts = [
            f"step {values['step']}/{self._total}",
            f"loss {values['loss']:.4f}",
            f"lr {values['lr']:.2e}",
            f"|g| {values['grad_norm']:.3g}",
            f"{values['tokens_per_s']:,.0f} tokens/s",
        ]
        if "accuracy" in values:
            parts.insert(2, f"accuracy {values['accuracy']:.3f}")
        if values.get("mfu"):
            parts.append(f"MFU {values['mfu']:.1%}")
        if eta_s > 0:
            parts.append(f"{duration(eta_s)} left")
        return "  ".join(parts)


class _Plain:
    """A line every few seconds."""

    def __init__(self) -> None:
        self._shown = -math.inf

    def show(self, step: int, text: str, *, last: bool) -> None:
        if last or time.monotonic() - self._shown >= PLAIN_SECONDS:
            self._shown = time.monotonic()
            log.info(text)

    def close(self) -> None:
        pass


class _Terminal:
    """A live line with a bar."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (BarColumn(bar_width=20), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
        self._task = self._progress.add_task("starting", total=total)
        self._progress.start()

    def show(self, step: int, text: str, *, last: bool) -> None:
        self._progress.update(self._task, completed=step, description=text)

    def close(self) -> None:
        self._progress.stop()


def keep_rows(file: Path, done: int) -> None:
    """Drop the rows of steps after `done`, which a resumed run takes back, and a last row torn by a kill."""
    if file.is_file():
        with replacing(file) as temporary, temporary.open("w", encoding="utf-8") as kept:
            for row in iterate_rows(file):
                if row.get("step", done + 1) <= done:
                    kept.write(json.dumps(row) + "\n")


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s`, `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class _LogFile(logging.FileHandler):
    """A log on a full disk loses lines, which the error stream has too, and not the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Instead of a traceback for every line."""


def start_log(run_dir: Path, rank: int) -> None:
    """Rank 0 writes its log to the run's log.txt and to the error stream; other ranks only warnings, to the latter.

    Raises:
        UserError: the run folder cannot be made or written.
    """
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    console: logging.Handler = logging.StreamHandler()
    if rank == 0 and sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        console = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, markup=False)
    else:
        console.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.addHandler(console)
    if rank == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = _LogFile(run_dir / "log.txt", encoding="utf-8")
        except OSError as error:
            if error.errno not in NO_PLACE:
                raise
            raise UserError(
                f"output {run_dir}: cannot be written ({error.filename}: {error.strerror}): choose another output"
            ) from None
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(file)


def _number(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def check_wandb(tracking: Tracking) -> None:
    """Check that wandb has a key where it is to go online; its server is not asked.

    Raises:
        UserError: it has none.
    """
    if tracking.wandb_project is None or tracking.wandb_mode == "offline":
        return
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb
    from wandb.errors import AuthenticationError, UsageError

    try:
        wandb.login(verify=False)
    except (UsageError, AuthenticationError) as error:
        raise _no_wandb(tracking, error) from None


def _no_wandb(tracking: Tracking, error: Exception) -> UserError:
    reason = one_line(error)
    return UserError(
        f"tracking.wandb_project {tracking.wandb_project}: wandb does not start ({reason}): run `wandb login`, or "
        "set tracking.wandb_mode=offline"
    )


def _start_wandb(recipe: Recipe, run_dir: Path, run_id: str | None) -> Any:
    tracking = recipe.tracking
    if tracking.wandb_project is None:
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb
    from wandb.errors import AuthenticationError, CommError, UsageError

    begin = partial(
        wandb.init,
        project=tracking.wandb_project,
        name=tracking.name or run_dir.name,
        dir=str(run_dir),
        id=run_id,
        resume="allow" if run_id else None,
        config=recipe.model_dump(mode="json"),
    )
    try:
        return begin(mode=tracking.wandb_mode)
    except (UsageError, AuthenticationError) as error:
        raise _no_wandb(tracking, error) from None
    except CommError as error:
        reason = one_line(error)
        log.warning(
            "wandb does not answer (%s): goes on offline; later: wandb sync %s/wandb/offline-*", reason, run_dir
        )
        return begin(mode="offline")
