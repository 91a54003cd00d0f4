"""A rank that something happens to: `train_all` with one fault put in."""

from __future__ import annotations

import errno
import itertools
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from training_runs import train_all

from lbr_dist.errors import EXIT_USER_ERROR


def train_with(rank: int, world: int, fault: str, recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train with one fault.

    `nan STEP`: an infinite loss on the last rank. `hang STEP`: the last rank. `signal STEP NUMBER`: the last rank gets
    it in that step. `vanish STEP PATH`: a file goes away after that step. `unwritten`: the first file of the last rank
    finds no room. `none`.
    """
    kind, *details = fault.split()
    if kind == "none" or (kind != "vanish" and rank != world - 1):
        return train_all(rank, world, recipes)
    if kind == "vanish":
        return _vanish(rank, world, int(details[0]), Path(details[1]), recipes)
    if kind == "unwritten":
        return _unwritten(rank, world, recipes)
    from lbr_dist.training import steps

    real, seen = steps.Generative.__call__, [0]

    def faulty(self: Any, plan: Any, batches: Any) -> Any:
        if plan.step + 1 == int(details[0]):
            if kind == "hang":
                time.sleep(3600)
            if kind == "signal":
                os.kill(os.getpid(), int(details[1]))
                return real(self, plan, batches)
            seen[0] += 1
            with mock.patch.object(steps, "poisoned", lambda loss: loss * torch.inf):
                return real(self, plan, batches)
        return real(self, plan, batches)

    with mock.patch.object(steps.Generative, "__call__", faulty):
        return train_all(rank, world, recipes)


def _unwritten(rank: int, world: int, recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from lbr_dist.training.checkpoint import writer as checkpoint_writer

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "weights")
    effects = itertools.chain([full], itertools.repeat(mock.DEFAULT))
    write = checkpoint_writer._write_tensor_file
    with mock.patch.object(checkpoint_writer, "_write_tensor_file", mock.Mock(wraps=write, side_effect=effects)):
        return train_all(rank, world, recipes)


def _vanish(rank: int, world: int, step: int, path: Path, recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from lbr_dist.data import shard_reader
    from lbr_dist.training.audit import AuditLog

    real = AuditLog.step

    def noticing(self: AuditLog, done: int, *rest: Any) -> None:
        real(self, done, *rest)
        if done + 1 == step:
            path.unlink(missing_ok=True)

    with mock.patch.object(AuditLog, "step", noticing), mock.patch.object(shard_reader, "OPEN_FILES", 1):
        results = train_all(rank, world, recipes)
    if world > 1 and "error" in results[0]:  # as under a launcher: this rank ends at once, the others notice
        (Path(recipes[0]["output"]) / "told").write_text(results[0]["error"])
        os._exit(EXIT_USER_ERROR)
    return results
