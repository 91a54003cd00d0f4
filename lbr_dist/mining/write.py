"""The mined set: every side of the given one, the mined side's records with their negatives.

Nothing is tokenized again. A mined negative is another record's answer, so its token count is in the given set's index;
that is why a set can be mined with a model of any tokenizer and still be one for the tokenizer it was prepared with.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lbr_dist.data import remote
from lbr_dist.data.record import Record
from lbr_dist.data.shard_reader import REMEDY, ShardReader
from lbr_dist.data.shard_writer import SPLITS, ShardWriter, SplitInfo, write_manifest
from lbr_dist.data.shards import PreparedSet
from lbr_dist.data.split_index import SplitIndex
from lbr_dist.disk import file_xxh128
from lbr_dist.errors import UserError
from lbr_dist.mining.candidates import SIDE, Candidates

BATCH = 256
"""Records written at a time; each is held with its negatives."""
SHARD_RECORDS, SHARD_BYTES = 8192, 256 << 20


@dataclass(frozen=True)
class Mined:
    """One record with what was mined for it."""

    query: int
    record: Record
    negatives: list[Record]
    """Records whose answers are the negatives, best first."""


def write_mined(
    opened: PreparedSet,
    target: Path,
    candidates: Candidates,
    passages: Iterator[np.ndarray],
    *,
    name: str,
    source: Any,
    note: Callable[[Mined], None],
) -> dict[str, Any]:
    """Write the set into the empty folder `target`; returns its manifest.

    Args:
        passages: the negatives of the queries in order, int64 [any, N] at a time, -1 for none.
        name: of the set.
        source: what it was made from, for the manifest.
        note: called with every record, in order.
    """
    infos = {side: _copy(opened, side, target) for side in SPLITS if side != SIDE}
    tokenizer = opened.manifest["tokenizer"]
    writer = ShardWriter(target, SIDE, tokenizer["fingerprint"], shard_records=SHARD_RECORDS, shard_bytes=SHARD_BYTES)
    reader = ShardReader(opened, SIDE)
    index, first = reader.index, 0
    try:
        for passage_QN in passages:
            for start in range(0, len(passage_QN), BATCH):
                batch = list(_mined(reader, candidates, passage_QN[start : start + BATCH], first + start))
                records, columns = [], []
                for mined in batch:
                    note(mined)
                    texts = tuple(str(negative.answer) for negative in mined.negatives)
                    rows = candidates.passage_rows_P[[p for p in passage_QN[mined.query - first] if p >= 0]]
                    records.append(replace(mined.record, negatives=mined.record.negatives + texts))
                    counts = [*index.negative_tokens[mined.query].tolist(), *index.answer_tokens[rows].tolist()]
                    columns.append(
                        {
                            "question_tokens": int(index.question_tokens[mined.query]),
                            "answer_tokens": int(index.answer_tokens[mined.query]),
                            "text_tokens": -1,
                            "negative_tokens": counts,
                            "positive_tokens": _positive_tokens(opened, index, mined),
                        }
                    )
                writer.write(records, columns)
            first += len(passage_QN)
        infos[SIDE] = writer.close()
    finally:
        writer.abandon()
        reader.close()
    return write_manifest(
        target,
        {side: infos[side] for side in SPLITS},
        name=name,
        seed=opened.manifest["seed"],
        source=source,
        tokenizer=tokenizer,
    )


def _positive_tokens(opened: PreparedSet, index: SplitIndex, mined: Mined) -> list[int]:
    known = index.positive_tokens
    if known is not None:
        return known[mined.query].tolist()
    if mined.record.positives:
        raise UserError(f"prepared set {opened.root}: its index does not count `positives`: prepare the set again")
    return []


def _mined(reader: ShardReader, candidates: Candidates, passage_BN: np.ndarray, first: int) -> Iterator[Mined]:
    for query, passage_N in enumerate(passage_BN, first):
        rows = candidates.passage_rows_P[passage_N[passage_N >= 0]]
        record, *negatives = map(Record.from_dict, reader.read([query, *rows.tolist()]))
        yield Mined(query, record, negatives)


def _copy(opened: PreparedSet, side: str, target: Path) -> SplitInfo:
    """Copy a side's shards as they are.

    Raises:
        UserError: one is damaged.
    """
    (target / side).mkdir()
    for shard in opened.splits[side].shards:
        for name, size, xxh128 in shard.files:
            if opened.is_remote:
                remote.fetch(opened.address(name), target / name, size=size, xxh128=xxh128)
            else:
                shutil.copyfile(opened.address(name), target / name)
                if file_xxh128(target / name) != xxh128:
                    raise UserError(f"{opened.address(name)}: its checksum changed: {REMEDY}")
    return opened.splits[side]
