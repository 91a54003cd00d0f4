"""Feed one rank: micro-batches in plan order, made ahead of time by loader processes.

The main process only plans (cheap) and hands out jobs; a loader process reads, tokenizes and packs one micro-batch at a
time. A job says everything, so the number of processes changes nothing, and starting at any step is just starting
there. Batches cross the process boundary as bytes rather than as shared-memory tensors: a step of many micro-batches
would hold a file descriptor for every tensor, and containers often come with a tiny /dev/shm; the copy of some 100 KB
costs less than the tokenization it follows. Tensors travel as numpy arrays, since torch's own pickling of a small one
takes a millisecond.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lbr_dist.config import Recipe
from lbr_dist.data.assemble import Assembler, Job, LocalBatch
from lbr_dist.data.plan import Plan, StepPlan
from lbr_dist.data.remote import UnreachableError
from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.errors import UserError
from lbr_dist.model.tokenizer import Tokenization

__all__ = ["Loader", "LocalBatch"]

TIMEOUT_S = 1800
"""Seconds to wait for one micro-batch: far longer than any fetch of a remote shard, so it means a hung process."""
PROBES = 64
"""Samples on which the instructions are checked before step 0."""
COUNTED = 8
"""Steps whose micro-batches are counted to know how many a whole step has; they differ by few."""


class Loader:
    """Iterable over (StepPlan, micro-batches of this rank), from `start_step` to the end of the run."""

    def __init__(
        self,
        plan: Plan,
        readers: Sequence[ShardReader],
        tokenization: Tokenization,
        recipe: Recipe,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
    ) -> None:
        """Set up, and check the first samples.

        Args:
            plan: which samples form each step.
            readers: one for each set of the mixture.
            tokenization: the model's tokenizer.
            recipe: settings; `data.workers` loader processes each prepare `data.prefetch` micro-batches ahead, and
                between them a whole step.
            rank: this data-parallel rank.
            world: number of ranks.
            start_step: first global step to yield.

        Raises:
            UserError: an instruction whose tokens depend on the text after it; a damaged or mismatched set.
        """
        self._plan, self._recipe, self._rank, self._world = plan, recipe, rank, world
        self._steps = range(start_step, plan.total_steps(recipe.duration))
        self._assembler = Assembler(recipe, readers, plan.sources, tokenization)
        if self._steps:
            first = plan.step(start_step).micro_batches(rank, world)
            if start_step == 0:  # what a run began with is not asked again of the texts where it is resumed
                probes = [s for micro in first for s in micro.samples if s.side != "x"]
                self._assembler.check(probes[:PROBES])
            self._assembler.batch(Job(first[0].samples[:1], 0, first[0].task))

    def __len__(self) -> int:
        """Steps."""
        return len(self._steps)

    def __iter__(self) -> Iterator[tuple[StepPlan, list[LocalBatch]]]:
        """Yield the steps.

        Raises:
            UserError: a shard is damaged or gone (it is named), or is not that of its index; /dev/shm is full.
            OSError: storage failed, or a server of shards is away.
            RuntimeError: a loader process died or hangs.
        """
        workers = self._recipe.data.workers
        jobs = _Jobs(self._plan, self._steps, self._rank, self._world)
        batches: Any = DataLoader(
            _Batches(self._assembler),
            sampler=jobs,
            batch_size=None,
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=self._ahead() if workers else None,
            timeout=TIMEOUT_S if workers else 0,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else it draws from the global one, and a resumed run would differ
        )
        before = set(multiprocessing.active_children())
        check_processes(workers)
        source = iter(batches)
        processes = set(multiprocessing.active_children()) - before
        try:
            while (first := next(source, None)) is not None:
                step, count = jobs.planned.popleft()
                yield step, [_unpack(first), *(_unpack(next(source)) for _ in range(count - 1))]
        finally:
            del source
            for process in processes:  # they ignore SIGTERM, and one may be in the middle of a long fetch
                process.kill()

    def _ahead(self) -> int:
        """Micro-batches that each loader process prepares ahead: a whole step has to be ready when one has trained."""
        steps = (self._plan.step(number) for number in self._steps[:COUNTED])
        most = max((len(step.micro_batches(self._rank, self._world)) for step in steps), default=0)
        return max(self._recipe.data.prefetch, -(-most // self._recipe.data.workers))


class _Jobs(Sampler[Job]):
    """Jobs in plan order; remembers the plans of the steps that are under way."""

    def __init__(self, plan: Plan, steps: range, rank: int, world: int) -> None:
        self._plan, self._steps, self._rank, self._world = plan, steps, rank, world
        self.planned: deque[tuple[StepPlan, int]] = deque()

    def __iter__(self) -> Iterator[Job]:
        for number in self._steps:
            step = self._plan.step(number)
            micros = step.micro_batches(self._rank, self._world)
            self.planned.append((step, len(micros)))
            first_pair = step.pairs(self._rank, self._world).start
            for micro in micros:
                yield Job(micro.samples, first_pair, micro.task)


class _Batches(Dataset[bytes]):
    """Job to pickled micro-batch, or to the pickled message of an error that the user can mend."""

    def __init__(self, assembler: Assembler) -> None:
        self._assembler = assembler

    def __getitem__(self, job: Job) -> bytes:
        try:
            return _pack(self._assembler.batch(job))
        except UnreachableError as error:  # others were read before: a fault, after which a run is started again
            raise ConnectionError(str(error)) from None
        except UserError as error:
            return pickle.dumps(str(error))


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _pack(batch: LocalBatch) -> bytes:
    data = io.BytesIO()
    _Pickler(data, protocol=pickle.HIGHEST_PROTOCOL).dump(batch)
    return data.getvalue()


def _unpack(data: bytes) -> LocalBatch:
    batch = pickle.loads(data)  # made by this program's own loader process
    if isinstance(batch, str):
        raise UserError(batch)
    return batch


def check_processes(workers: int) -> None:
    """Check that so many loader processes can be had: they need semaphores, which Linux keeps in /dev/shm, and a
    DataLoader that gets too few leaves a traceback behind its error.

    Raises:
        UserError: names the setting and what the system says.
    """
    context = multiprocessing.get_context()
    try:
        _ = [context.Lock() for _ in range(8 + 3 * workers if workers else 0)]
    except OSError as error:
        raise UserError(
            f"data.workers is {workers}, but this machine allows no loader processes: a semaphore in /dev/shm cannot "
            f"be made ({error.strerror}); mount it writable, with some room, or set data.workers=0"
        ) from None


def _as_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    """A stop signal for the whole job must not kill the loader: the trainer finishes its step and ends it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_leave_with_trainer, daemon=True).start()


def _leave_with_trainer() -> None:
    """End this process when its trainer is gone (SIGKILL): torch's own watch waits for batches that nobody takes.

    The trainer is not always the system's parent: with forkserver, Python's default from 3.14 on, the server is.
    """
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)
