"""First pass: every source row once, to a file of checked records and a few numbers for each.

The text goes to a spool file on disk; what stays in memory are hashes and offsets in flat arrays, about 100 bytes a
record, so memory grows with the number of records and not with the text. Bad rows are counted by reason here.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lbr_dist.data.fields import REASONS, Converter, Entity, RowError
from lbr_dist.data.minhash import Sketches
from lbr_dist.data.readers import rows
from lbr_dist.data.record import Record, batches, normalise
from lbr_dist.data.sources import Part
from lbr_dist.errors import UserError

HOPELESS = 1000
"""A source whose first so many rows are all bad stops the run at once: its fields were not understood."""
NO_ENTITY = 0


class BadRows:
    """Bad rows counted by reason, with where the first of each was."""

    def __init__(self) -> None:
        self.rows = 0
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def add(self, reason: str, where: str, detail: str, count: int = 1) -> None:
        """Count `count` bad rows; the first of a reason is remembered."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.first.setdefault(reason, f"{where}: {detail}")

    @property
    def total(self) -> int:
        """Bad rows of all reasons."""
        return sum(self.counts.values())

    def report(self) -> dict[str, Any]:
        """JSON-able counts."""
        reasons = {
            reason: {"count": count, "meaning": REASONS[reason], "first": self.first[reason]}
            for reason, count in sorted(self.counts.items())
        }
        return {"total": self.total, "share": self.total / max(1, self.rows), "by_reason": reasons}

    def check(self, max_share: float) -> None:
        """Stop when more than `max_share` of all rows are bad.

        Raises:
            UserError: names the count and the first row of each reason.
        """
        if self.total > max_share * self.rows:
            shown = "; ".join(f"{count} {reason} (first: {self.first[reason]})" for reason, count in self._sorted())
            raise UserError(
                f"{self.total} of {self.rows} rows are bad, more than --max-bad-share {max_share:g} allows: {shown}"
            )

    def _sorted(self) -> list[tuple[str, int]]:
        return sorted(self.counts.items(), key=lambda item: -item[1])


@dataclass(frozen=True)
class Texts:
    """The texts that records are compared by: questions, answers, further positives, plain texts. Arrays [texts]."""

    record: np.ndarray
    """int64: number of the record it belongs to."""
    hash: np.ndarray
    """uint64: hash of its normal form."""
    sketch: np.ndarray
    """int64: row of its MinHash sketch, -1 where it is too short for one."""

    def of(self, keep: np.ndarray) -> Texts:
        """Those texts whose record is kept; `keep` is a mask over records."""
        mask = keep[self.record]
        return Texts(self.record[mask], self.hash[mask], self.sketch[mask])


class TextTable:
    """Collects `Texts` batch by batch."""

    def __init__(self, folder: Path) -> None:
        self.sketches = Sketches(folder)
        self._record, self._hash, self._sketch = array("q"), array("Q"), array("q")

    def add(self, first: int, records: list[Record]) -> None:
        """Add the texts of records `first`, `first + 1`, ..."""
        owners, forms = [], []
        for number, record in enumerate(records, first):
            for text in compared_texts(record):
                owners.append(number)
                forms.append(normalise(text))
        self._record.extend(owners)
        self._hash.extend(xxhash.xxh64_intdigest(form.encode()) for form in forms)
        self._sketch.frombytes(self.sketches.add(forms).tobytes())

    def finish(self) -> Texts:
        """All texts; nothing can be added any more."""
        self.sketches.close()
        return Texts(
            np.frombuffer(self._record, np.int64),
            np.frombuffer(self._hash, np.uint64),
            np.frombuffer(self._sketch, np.int64),
        )


def compared_texts(record: Record) -> tuple[str, ...]:
    """Texts of a record that must not be shared between sides. Negatives are no evidence that two records belong
    together: they are other records' answers by design.
    """
    if record.text is not None:
        return (record.text,)
    assert record.question is not None
    assert record.answer is not None
    return (record.question, record.answer, *record.positives)


@dataclass(frozen=True)
class Numbers:
    """What memory holds of each record; arrays [records]."""

    is_text: np.ndarray
    """bool: a plain text."""
    external: np.ndarray
    """bool: of an external evaluation set: compared with, never written."""
    id_hash: np.ndarray
    content_hash: np.ndarray
    entity: np.ndarray
    """uint64: hash of the group, `NO_ENTITY` for none."""
    order: np.ndarray
    """uint64: hash of id and seed: sorting by it is the shuffle."""
    part: np.ndarray
    """int64: number of the file."""
    line: np.ndarray
    """int64: line, row or sample in it."""


class Collector:
    """Reads parts one after the other; `finish` ends the pass."""

    def __init__(self, folder: Path, *, seed: int, entity: Entity | None, paragraphs: bool) -> None:
        self.bad = BadRows()
        self.parts: list[Part] = []
        self.table = TextTable(folder / "sketches")
        self._seed, self._entity, self._paragraphs = seed, entity, paragraphs
        self._path = folder / "spool"
        self._file = self._path.open("wb", buffering=1 << 20)
        self._offsets = array("q", [0])
        self._columns: dict[str, array[int]] = {
            name: array(code)
            for name, code in zip(Numbers.__dataclass_fields__, ("b", "b", "Q", "Q", "Q", "Q", "q", "q"), strict=True)
        }

    def read(self, part: Part, convert: Converter, *, external: bool, advance: Callable[[int], None]) -> None:
        """Read all rows of a part.

        Raises:
            UserError: the file is damaged, or its first rows are all bad.
        """
        self.parts.append(part)
        for batch in batches(self._records(part, convert, external)):
            self.table.add(len(self._offsets) - 1 - len(batch), batch)
            advance(len(batch))

    def _records(self, part: Part, convert: Converter, external: bool) -> Iterator[Record]:
        """The part's good rows, each already in the spool when it is handed on."""
        bad_before, rows_before = self.bad.total, self.bad.rows
        for number, row in rows(part, paragraphs=self._paragraphs):
            self.bad.rows += 1
            try:
                if isinstance(row, RowError):
                    raise row
                record = convert(row)
            except RowError as error:
                self.bad.add(error.reason, f"{part.name} {part.unit} {number}", error.detail)
                if self.bad.total - bad_before == self.bad.rows - rows_before == HOPELESS:
                    self.bad.check(0)
                continue
            self._add(record, row, number, external)
            yield record

    def finish(self) -> tuple[Spool, Numbers, Texts]:
        """End of the pass."""
        self._file.close()
        types = {"b": np.bool_, "Q": np.uint64, "q": np.int64}
        columns: dict[str, Any] = {
            name: np.frombuffer(data, types[data.typecode]) for name, data in self._columns.items()
        }
        return Spool(self._path, np.frombuffer(self._offsets, np.int64)), Numbers(**columns), self.table.finish()

    def close(self) -> None:
        """Close all files, after an error."""
        self._file.close()
        self.table.sketches.close()

    def _add(self, record: Record, row: Any, number: int, external: bool) -> None:
        data = record.to_json()
        self._file.write(data)
        self._offsets.append(self._offsets[-1] + len(data))
        name = record.id.encode()
        group = self._entity.of(row, record) if self._entity else None
        content = "\0".join((*compared_texts(record), "", *record.negatives))
        values = {
            "is_text": record.is_text,
            "external": external,
            "id_hash": xxhash.xxh3_64_intdigest(name),
            "content_hash": xxhash.xxh3_64_intdigest(content.encode()),
            "entity": NO_ENTITY if group is None else xxhash.xxh3_64_intdigest(group.encode("utf-8", "replace")),
            "order": xxhash.xxh3_64_intdigest(name, self._seed),
            "part": len(self.parts) - 1,
            "line": number,
        }
        for column, value in values.items():
            self._columns[column].append(value)


class Spool:
    """The records of the first pass, by number."""

    def __init__(self, path: Path, offsets: np.ndarray) -> None:
        self._offsets = offsets
        self._descriptor = os.open(path, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> Record:
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        return Record.from_dict(json.loads(os.pread(self._descriptor, end - start, start)))

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
