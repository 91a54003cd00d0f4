"""Prove the isolation of a finished set from its written bytes alone.

Everything is computed again from what the shards hold: texts, hashes, sketches, and the comparison of all sides. That
the split meant to keep the sides apart counts for nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lbr_dist.data.collect import TextTable, compared_texts
from lbr_dist.data.isolation import Containment, crossings
from lbr_dist.data.record import Record, batches
from lbr_dist.data.shards import PreparedSet, ShardReader, open_set
from lbr_dist.data.split import EXTERNAL, GL, SIDES, TEXT, CommonText

External = Callable[[], Iterable[list[Record]]]
"""Gives the records of external evaluation sets, in batches, each time it is called."""


def prove(
    root: Path, folder: Path, external: External, *, similarity: float, common: list[CommonText]
) -> dict[str, Any]:
    """Compare the sides of the set in `root`.

    Args:
        folder: for sketches; may be removed afterwards.
        external: the evaluation sets that were given from outside.

    Returns:
        The `isolation` part of report.json: counts of what is shared, all zero.

    Raises:
        RuntimeError: something is shared: a bug in the split, so the set must not be used.
    """
    opened = open_set(root)
    evaluation = chain(_batches(opened, "eval"), external())
    containment = Containment([text for record in batch for text in compared_texts(record)] for batch in evaluation)
    table = TextTable(folder)
    sides: list[int] = []
    containing = 0
    for side, batch in _everything(opened, external):
        table.add(len(sides), batch)
        sides += [TEXT if record.is_text and side != EXTERNAL else side for record in batch]
        if side == GL:
            containing += int(containment.holds([record.text for record in batch if record.text is not None]).sum())
    hashes = np.array([text.hash for text in common], np.uint64)
    texts = table.finish()
    found = crossings(np.array(sides, np.int8), texts, table.sketches, similarity=similarity, common=hashes)
    if len(found.losers) or containing:
        raise RuntimeError(f"the sides of {root} are not isolated: {found.equal} {found.near} {containing}")
    return {
        "compared_records": len(sides),
        "shared_texts": found.equal,
        "near_duplicates": found.near,
        "texts_containing_evaluation": containing,
        "shared_common_texts": [{"text": text.text, "records": text.records} for text in common],
    }


def _everything(opened: PreparedSet, external: External) -> Iterator[tuple[int, list[Record]]]:
    for side, split in enumerate(SIDES):
        for batch in _batches(opened, split):
            yield side, batch
    for batch in external():
        yield EXTERNAL, batch


def _batches(opened: PreparedSet, split: str) -> Iterator[list[Record]]:
    if opened.splits[split].records:
        reader = ShardReader(opened, split)
        yield from batches(Record.from_dict(reader.read([row])[0]) for row in range(opened.splits[split].records))
        reader.close()
