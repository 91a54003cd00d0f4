"""Second pass of a preparation: the shards, each by itself.

Where shards begin follows from the sizes of the records, which the first pass has counted. So every shard is a task of
its own, done wherever the executor likes, and committed by a small file that is written last: a killed run's shards
stay.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lbr_dist.data.execute import Executor, alone
from lbr_dist.data.preparation.spool import Spool, SpoolSlice
from lbr_dist.data.record import Record, batches, normalised_hash
from lbr_dist.data.shard_writer import ShardInfo, ShardWriter, SplitInfo, shard_starts
from lbr_dist.data.token_counter import TokenCounter, Tokens
from lbr_dist.disk import file_xxh128


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    split: str
    number: int
    first: int
    """Records of the split before it."""
    records: SpoolSlice
    unwanted: frozenset[int]
    """Hashes of hard negatives that are evaluation texts, and must go."""


@dataclass(frozen=True)
class WrittenShard:
    """A shard in its place."""

    split: str
    number: int
    texts: int
    """Plain texts in it."""
    info: ShardInfo


class WriteShard:
    """Writes shards; picklable."""

    def __init__(self, root: Path, marks: Path, tokens: Tokens) -> None:
        """`root` is the set's folder, `marks` that of the files that commit shards; every process must see both."""
        self._root, self._marks, self._tokens = root, marks, tokens
        self._counter: TokenCounter | None = None

    def __call__(self, task: ShardTask) -> WrittenShard:
        """Write one shard, unless it has been committed."""
        mark = self._marks / f"{task.split}-{task.number:06d}.json"
        if (known := self._committed(task, mark)) is not None:
            return known
        if self._counter is None:
            self._counter = TokenCounter(self._tokens)
        writer = ShardWriter(
            self._root, task.split, self._tokens.fingerprint, shard_records=len(task.records), shard_bytes=1 << 62,
            first_shard=task.number, first_record=task.first,
        )  # fmt: skip
        try:
            for batch in batches(without(record, task.unwanted) for record in task.records.records()):
                writer.write(batch, self._counter.columns(batch))
            split = writer.close()
        finally:
            writer.abandon()
        written = WrittenShard(task.split, task.number, split.texts, split.shards[0])
        temporary = mark.with_suffix(".tmp")
        temporary.write_text(json.dumps({"texts": written.texts, "info": asdict(written.info)}), encoding="utf-8")
        temporary.replace(mark)
        return written

    def _committed(self, task: ShardTask, mark: Path) -> WrittenShard | None:
        """A shard that an earlier run committed; None where it has not, or its files are not as they were."""
        try:
            known = json.loads(mark.read_bytes())
            written = WrittenShard(task.split, task.number, known["texts"], ShardInfo(**known["info"]))
            whole = all(file_xxh128(self._root / name) == xxh128 for name, _, xxh128 in written.info.files)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return written if whole else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_counter": None}


def without(record: Record, unwanted: frozenset[int]) -> Record:
    """The record without the hard negatives that have one of these hashes."""
    if not unwanted or not record.negatives:
        return record
    kept = tuple(text for text in record.negatives if normalised_hash(text) not in unwanted)
    return dataclasses.replace(record, negatives=kept)


def write_shards(
    spool: Spool,
    splits: dict[str, np.ndarray],
    work: WriteShard,
    executor: Executor,
    *,
    unwanted: dict[int, frozenset[int]],
    shard_records: int,
    shard_bytes: int,
    advance: Callable[[int], None],
) -> dict[str, SplitInfo]:
    """Write all splits.

    Args:
        splits: records of each split in order, int64.
        unwanted: for the records that have any: hashes of hard negatives that must go.

    Returns:
        What the manifest says of each split.
    """
    sizes = spool.sizes
    for number, hashes in unwanted.items():
        sizes[number] = len(without(spool[number], hashes).to_json())

    def tasks() -> Iterator[ShardTask]:
        for split, members in splits.items():
            limits = [
                *shard_starts(sizes[members].tolist(), shard_records=shard_records, shard_bytes=shard_bytes),
                len(members),
            ]
            for number, (first, last) in enumerate(pairwise(limits)):
                chosen = members[first:last]
                hashes = [unwanted[record] for record in chosen.tolist() if record in unwanted]
                yield ShardTask(split, number, first, spool.take(chosen), frozenset().union(*hashes))

    infos = {split: SplitInfo() for split in splits}
    written = []
    for shard in executor.stream(tasks(), alone, work):
        written.append(shard)
        advance(shard.info.records)
    for shard in sorted(written, key=lambda shard: shard.number):
        info = infos[shard.split]
        info.shards.append(shard.info)
        info.records += shard.info.records
        info.texts += shard.texts
    return infos
