"""`lbr prepare`, `encode` and `mine` on a Ray cluster: the same commands, their blocks done by Ray Data.

`RayData` is an `Executor` (see data/execute.py). Sources are read by streaming read tasks, one block a row, and blocks
are worked on as they come: Ray Data holds back the readers when the workers are behind, so the object store stays
small. What a block makes goes straight to its own file on the storage that the nodes share; only a few numbers come
back. So a block that is done twice after a lost node does no harm, and a killed driver goes on where the files end.

An exception of ours travels as a result: Ray would retry the task, and wrap the message in a remote traceback.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import xxhash

from lbr_dist.data.execute import Block, Result, Source, alone
from lbr_dist.disk import FULL
from lbr_dist.errors import UserError
from lbr_dist.launch.ray_cluster import Bundle, check_room, living_nodes
from lbr_dist.launch.ray_worker import go_to

if TYPE_CHECKING:
    import pyarrow as pa

COLUMN = "pickled"
"""The one column of every Ray Data block: pickled objects of ours, which never leave the cluster."""
BLOCK_BYTES = 1
"""Ray Data's own blocks are cut after every row, so that each of our blocks is scheduled by itself."""
READERS = 4
"""CPUs per reading task: one in four of the cluster's reads, the others work."""
_works: dict[str, Any] = {}


class RayData:
    """Runs on the cluster that the process is connected to."""

    def __init__(
        self, *, workers: int | None = None, cpus_per_worker: int = 1, gpus_per_worker: int | None = None
    ) -> None:
        """Take a share of the cluster.

        Args:
            workers: processes at a time; default: what the cluster has room for beside the readers.
            cpus_per_worker: what each of them gets.
            gpus_per_worker: likewise, of one that holds a model; default: 1 where the cluster has GPUs.

        Raises:
            UserError: the cluster has no room for them.
        """
        self._nodes = living_nodes()
        cpus = int(sum(node.cpus for node in self._nodes))
        if cpus < 1 + cpus_per_worker:
            raise UserError(
                f"--cpus-per-worker {cpus_per_worker}: the cluster has {cpus} CPUs in all, and reading needs one of "
                "them: lower it, or add nodes"
            )
        if gpus_per_worker is None:
            gpus_per_worker = int(any(node.gpus >= 1 for node in self._nodes))
        self._cpus, self._gpus, self._wanted = cpus_per_worker, gpus_per_worker, workers
        self._readers = max(1, cpus // READERS)
        self._room(model=False)

    def _room(self, *, model: bool) -> tuple[Bundle, int]:
        """What a worker gets, and how many there are."""
        bundle = Bundle(self._cpus, self._gpus if model else 0)
        workers = self._wanted
        if workers is None:
            room = sum(node.room(bundle) for node in self._nodes)
            free = int(sum(node.cpus for node in self._nodes)) - self._readers
            workers = max(1, min(room, free // self._cpus))
        check_room(self._nodes, bundle, workers, "the cluster")
        return bundle, workers

    def stream(
        self,
        sources: Iterable[Source],
        read: Callable[[Source], Iterable[Block]],
        work: Callable[[Block], Result],
        *,
        model: bool = False,
    ) -> Iterator[Result]:
        """See `Executor`.

        Raises:
            UserError: from `read` or `work`, as it was raised.
            OSError: likewise, where a disk was full.
        """
        from ray import cloudpickle
        from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

        bundle, workers = self._room(model=model)
        named = list(sources)
        if not named:
            return
        context = DataContext.get_current()
        context.target_max_block_size = BLOCK_BYTES
        context.enable_progress_bars = False
        here = os.getcwd()  # noqa: PTH109 (a string, for another machine)
        options: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
        options["num_cpus"] = bundle.cpus
        rows = self._read(named, read, here, workers)
        if model:  # few processes that stay, and a GPU for each
            results = rows.map_batches(
                _Worker,
                fn_constructor_args=(cloudpickle.dumps(work), here),
                compute=ActorPoolStrategy(min_size=1, max_size=workers),
                num_gpus=bundle.gpus or None,
                **options,
            )
        else:
            results = rows.map_batches(
                _Worker(cloudpickle.dumps(work), here), compute=TaskPoolStrategy(size=workers), **options
            )
        for row in results.iter_rows():
            result = pickle.loads(row[COLUMN])
            if isinstance(result, UserError | OSError):
                raise result
            yield result

    def _read(self, sources: list[Any], read: Callable[[Any], Iterable[Any]], here: str, workers: int) -> Any:
        """A Ray data set of blocks.

        Ray would merge readers with as many workers into one operator, and one source would have one worker.
        """
        import ray

        if read is alone:
            return ray.data.from_arrow([_table(source) for source in sources])
        readers = self._readers + (self._readers == workers > 1)
        return ray.data.read_datasource(
            _datasource(sources, read, here), override_num_blocks=len(sources), concurrency=readers
        )


def _datasource(sources: list[Any], read: Callable[[Any], Iterable[Any]], here: str) -> Any:
    """A Ray data source with one reading task for each of ours."""
    from ray.data import Datasource
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    class Sources(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(_Reader(source, read, here), unknown) for source in sources]

    return Sources()


class _Reader:
    """Blocks of one source as tables of one row; an error of the user is the last one."""

    def __init__(self, source: Any, read: Callable[[Any], Iterable[Any]], here: str) -> None:
        self._source, self._read, self._here = source, read, here

    def __call__(self) -> Iterator[pa.Table]:
        go_to(self._here)
        try:
            for block in self._read(self._source):
                yield _table(block)
        except UserError as error:
            yield _table(error)


class _Worker:
    """Unpickles the work once in a process, and does it to tables of one row."""

    def __init__(self, work: bytes, here: str) -> None:
        self._work, self._here = work, here
        self._key = xxhash.xxh3_128_hexdigest(work)

    def __call__(self, batch: pa.Table) -> pa.Table:
        go_to(self._here)
        if self._key not in _works:
            _works.clear()
            _works[self._key] = pickle.loads(self._work)
        block = pickle.loads(batch[COLUMN][0].as_py())
        if isinstance(block, UserError):
            return _table(block)
        try:
            return _table(_works[self._key](block))
        except UserError as error:
            return _table(error)
        except OSError as error:
            if error.errno in FULL:  # the storage is shared: another node would meet the same
                return _table(error)
            raise


def _table(value: Any) -> pa.Table:
    import pyarrow as pa

    return pa.table({COLUMN: pa.array([pickle.dumps(value)], pa.large_binary())})
