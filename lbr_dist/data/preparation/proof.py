"""Prove the isolation of a finished set from its written bytes alone.

Everything is computed again from what the shards hold: texts, hashes, sketches, and the comparison of all sides. That
the split meant to keep the sides apart counts for nothing here. Shards are digested one by one, wherever the executor
likes; all sides are compared in one place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from lbr_dist.data.execute import Executor, alone
from lbr_dist.data.preparation.collect import TextDigest, TextTable, evaluated_texts
from lbr_dist.data.preparation.components import CommonText
from lbr_dist.data.preparation.isolation import Containment, crossings
from lbr_dist.data.preparation.split import EVAL, EXTERNAL, GL, SIDES, TEXT
from lbr_dist.data.preparation.spool import SpoolSlice
from lbr_dist.data.record import Record, batches
from lbr_dist.data.shard_writer import ShardInfo
from lbr_dist.data.shards import open_set


@dataclass(frozen=True)
class ProofTask:
    """Records of one side to digest: a shard, or a piece of an external evaluation set."""

    number: int
    side: int
    shard: ShardInfo | None = None
    external: SpoolSlice | None = None

    def records(self, root: Path) -> Iterator[Record]:
        """The records; a shard's are read where its index says."""
        if self.external is not None:
            yield from self.external.records()
        if self.shard is not None:
            places = pq.read_table(root / self.shard.index, columns=["offset", "size"]).to_pydict()
            with (root / self.shard.name).open("rb") as tar:
                for offset, size in zip(places["offset"], places["size"], strict=True):
                    yield Record.from_dict(json.loads(os.pread(tar.fileno(), size, offset)))


@dataclass(frozen=True)
class ProofBlock:
    """What was found: a file with the digest, the side of each record, and how many plain texts hold an evaluation text
    or lie in one."""

    number: int
    file: Path
    sides: np.ndarray
    containing: int


class DigestShard:
    """Digests shards of the set in `root` into files in `folder`; picklable."""

    def __init__(self, root: Path, folder: Path, containment: Containment) -> None:
        self._root, self._folder, self._containment = root, folder, containment

    def __call__(self, task: ProofTask) -> ProofBlock:
        """Digest one."""
        digests, sides, containing = list[TextDigest](), list[int](), 0
        for batch in batches(task.records(self._root)):
            digests.append(TextDigest.of(batch, first=len(sides)))
            sides += [TEXT if record.is_text and task.side != EXTERNAL else task.side for record in batch]
            if task.side == GL:
                plain = [record.text for record in batch if record.text is not None]
                containing += int(self._containment.of(plain).sum())
        file = self._folder / f"{task.number:08d}.npz"
        temporary = file.with_suffix(".tmp.npz")
        arrays: dict[str, Any] = {**TextDigest.join(digests).arrays()}
        np.savez(temporary, **arrays)
        temporary.replace(file)
        return ProofBlock(task.number, file, np.array(sides, np.int8), containing)


def prove(
    root: Path,
    folder: Path,
    external: list[tuple[np.ndarray, SpoolSlice]],
    executor: Executor,
    *,
    similarity: float,
    common: list[CommonText],
) -> dict[str, Any]:
    """Compare the sides of the set in `root`.

    Args:
        folder: for digests; may be removed afterwards.
        external: the evaluation sets that were given from outside, in pieces.

    Returns:
        The `isolation` part of report.json: counts of what is shared, all zero.

    Raises:
        RuntimeError: something is shared: a bug in the split, so the set must not be used.
    """
    folder.mkdir(exist_ok=True)
    splits = open_set(root).splits
    tasks = [(side, shard, None) for side, name in enumerate(SIDES) for shard in splits[name].shards]
    pieces = [(EXTERNAL, None, records) for _, records in external]
    numbered = [ProofTask(number, *task) for number, task in enumerate((*tasks, *pieces))]
    work = DigestShard(root, folder, Containment(_evaluation(root, numbered)))
    blocks = sorted(executor.stream(numbered, alone, work), key=lambda block: block.number)
    table, first = TextTable(folder / "joined"), 0
    for block in blocks:
        with np.load(block.file) as arrays:
            table.append(first, TextDigest.from_arrays(arrays))
        block.file.unlink()
        first += len(block.sides)
    sides = np.concatenate([block.sides for block in blocks])
    containing = sum(block.containing for block in blocks)
    hashes = np.array([text.hash for text in common], np.uint64)
    texts = table.finish()
    found = crossings(sides, texts, table.sketches, similarity=similarity, common=hashes)
    if len(found.losers) or containing:
        raise RuntimeError(f"the sides of {root} are not isolated: {found.equal} {found.near} {containing}")
    return {
        "compared_records": len(sides),
        "shared_texts": found.equal,
        "near_duplicates": found.near,
        "texts_containing_evaluation": containing,
        "shared_common_texts": [{"text": text.text, "records": text.records} for text in common],
    }


def _evaluation(root: Path, tasks: Iterable[ProofTask]) -> Iterator[list[str]]:
    for task in tasks:
        if task.side in (EVAL, EXTERNAL):
            for batch in batches(task.records(root)):
                yield [text for record in batch for text in evaluated_texts(record)]
