"""`lbr surprisal`: measure the information in a prepared set's texts, for runs with `bottleneck.surprisal`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lbr_dist.data.information import SCHEMA, model_fingerprint, part_path, read_information, read_part, write_part
from lbr_dist.data.progress import Progress
from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.data.shards import check_tokenizer, open_set
from lbr_dist.disk import usable_folder
from lbr_dist.errors import UserError

if TYPE_CHECKING:
    from lbr_dist.model.surprisal import Scorer
    from lbr_dist.model.tokenizer import Tokenization

SPLITS = ("gl", "cl")
"""What training reads; the texts of an evaluation are measured when they are encoded."""
ROWS = 512
"""Records whose texts are measured together."""


@dataclass(frozen=True)
class Measured:
    """One kind of text on one side of a set."""

    split: str
    kind: str
    """question, answer or text."""
    texts: int
    tokens: int
    bits: float

    def __str__(self) -> str:
        return (
            f"{self.split}: {self.texts} {self.kind}s, {self.bits / self.texts:.1f} bits on average, "
            f"{self.bits / max(1, self.tokens):.2f} a token"
        )


def measure(data: str, model: str, device: str | None = None) -> list[Measured]:
    """Measure every text of a set's training sides; shards that an earlier call measured are not measured again.

    Args:
        data: prepared set on a disk.
        model: folder of a causal language model with the set's tokenizer.
        device: default: CUDA where there is one.

    Raises:
        UserError: no set, no model, no such device, another tokenizer, or a folder that cannot be written.
    """
    from lbr_dist.model.plain import usable_device
    from lbr_dist.model.surprisal import Scorer
    from lbr_dist.model.tokenizer import Tokenization

    place = usable_device(device)
    opened, fingerprint, tokenization = open_set(data), model_fingerprint(model), Tokenization.load(model)
    check_tokenizer(opened, tokenization)
    readers = [ShardReader(opened, split) for split in SPLITS if opened.splits[split].records]
    if not readers:
        raise UserError(
            f"prepared set {data}: its {' and '.join(SPLITS)} splits are empty: there is nothing to measure"
        )
    missing = [
        (reader, number, shard, path)
        for reader in readers
        for number, shard in enumerate(opened.splits[reader.split].shards)
        if read_part(path := part_path(opened, reader.split, shard, fingerprint), shard) is None
    ]
    with (
        Progress() as progress,
        progress.phase("measuring", sum(shard.records for _, _, shard, _ in missing)) as advance,
    ):
        begun = time.time()
        for folder in {path.parent for *_, path in missing}:
            usable_folder(folder, str(folder), "the set's folder has to be writable")
        scorer = Scorer(model, tokenization, place) if missing else None
        for reader, number, shard, path in missing:
            assert scorer is not None
            rows: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
            members = np.flatnonzero(reader.index.shard == number)
            for start in range(0, len(members), ROWS):
                batch = reader.read(members[start : start + ROWS].tolist())
                for name, bits in _columns(batch, tokenization, scorer).items():
                    rows[name] += bits
                advance(len(batch))
            write_part(path, shard, rows)
            for file in path.parent.glob(f".tmp-*-{path.name}"):  # of a start that was killed while it wrote the part
                with contextlib.suppress(OSError):
                    if file.stat().st_mtime < begun:
                        file.unlink()
    return [found for reader in readers for found in _totals(reader, model)]


def _columns(records: list[dict[str, Any]], tokenization: Tokenization, scorer: Scorer) -> dict[str, list[Any]]:
    """Bits of the records' texts, by column of the table."""
    single = SCHEMA.names[:3]
    texts = [[*(r.get(name, "") for name in single), *r.get("negatives", ()), *r.get("positives", ())] for r in records]
    flat = iter(scorer.bits(tokenization.encode([text for of_record in texts for text in of_record])).tolist())
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for record in records:
        for name in single:
            columns[name].append(next(flat))
        for name in SCHEMA.names[3:]:
            columns[name].append([next(flat) for _ in record.get(name, ())])
    return columns


def _totals(reader: ShardReader, model: str) -> Iterator[Measured]:
    known = read_information(reader.opened, reader.split, model)
    for kind in SCHEMA.names[:3]:
        tokens_N = getattr(reader.index, f"{kind}_tokens")
        there = tokens_N >= 0
        if there.any():
            bits = float(getattr(known, kind)[there].sum(dtype=np.float64))
            yield Measured(reader.split, kind, int(there.sum()), int(tokens_N[there].sum()), bits)
