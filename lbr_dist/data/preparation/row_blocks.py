"""Rows of the sources as a stream of blocks, the unit of work of a preparation's first pass.

A block costs some milliseconds whatever it holds. So a large file is read by itself, in many blocks, and neighbouring
small ones are read together, many to a block.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from lbr_dist.data.preparation.spool import is_committed
from lbr_dist.data.sources.fields import Converter
from lbr_dist.data.sources.parts import Part
from lbr_dist.data.sources.readers import Row, rows
from lbr_dist.data.sources.row_values import RowError
from lbr_dist.disk import mark

BLOCK_ROWS = 8192
"""Rows in a block at most,"""
BLOCK_CHARACTERS = 8 << 20
"""and about so many characters, unless a single row has more."""
TOGETHER = 1 << 20
"""Bytes, as they lie on the disk, of the files that are read together."""


@dataclass(frozen=True)
class PartJob:
    """A part to read."""

    number: int
    part: Part
    external: bool
    """Of an external evaluation set."""

    @property
    def kind(self) -> str | None:
        """Kind of its rows, None where the rows decide."""
        named = self.part.source.kind
        return "corpus" if self.part.format == "text" and named is None else named

    @property
    def size(self) -> float:
        """Bytes of its file; infinite where it is not one file."""
        found = mark(self.part.path) if self.part.path.is_file() else None
        return found[0] if found else math.inf


@dataclass(frozen=True)
class ReadJob:
    """Neighbouring parts that are read together."""

    number: int
    parts: Sequence[PartJob]


@dataclass(frozen=True)
class PartRows:
    """Neighbouring rows of one part."""

    part: int
    first: bool
    """They are its first ones."""
    name: str
    """Of the part, for messages, with its unit."""
    kind: str | None
    """Kind of the part's rows as far as it is known before the first of these."""
    detected: bool
    """The rows tell the kind, not the user."""
    fields: Mapping[str, str]
    base: str
    cells: bool
    """The rows are of a CSV file."""
    external: bool
    rows: list[tuple[int, Row]]


@dataclass(frozen=True)
class RowBlock:
    """Neighbouring rows of the parts of a job; none where the block has been committed."""

    job: int
    number: int
    parts: list[PartRows]


def read_jobs(parts: Sequence[PartJob]) -> list[ReadJob]:
    """The parts in order, neighbours together while they have `TOGETHER` bytes at most."""
    groups, room = list[list[PartJob]](), -math.inf
    for part in parts:
        size = part.size
        if size > room:
            groups.append([])
            room = TOGETHER
        groups[-1].append(part)
        room -= size
    return [ReadJob(number, group) for number, group in enumerate(groups)]


def row_blocks(job: ReadJob, *, paragraphs: bool, folder: Path, most: int) -> Iterator[RowBlock]:
    """Rows of a job in blocks of at most `most`, the same every time.

    Raises:
        UserError: a file is damaged.
    """
    held, characters, number = list[_Held](), 0, 0

    def block() -> RowBlock:
        kept = [] if is_committed(numbers_file(folder, job.number, number)) else held
        parts = [_part_rows(list(rows_of)) for _, rows_of in groupby(kept, lambda row: row.job.number)]
        return RowBlock(job.number, number, parts)

    for part in job.parts:
        for row in _rows(part, paragraphs):
            held.append(row)
            characters += _characters(row.row)
            if len(held) == most or characters >= BLOCK_CHARACTERS:
                yield block()
                held, characters, number = [], 0, number + 1
    if held:
        yield block()


def numbers_file(folder: Path, job: int, number: int) -> Path:
    """The file that commits a block."""
    return folder / f"{job:06d}-{number:08d}.npz"


class _Held(NamedTuple):
    """A row of a part, and where in it."""

    job: PartJob
    first: bool
    """It is the part's first."""
    kind: str | None
    """Of the part's rows, as far as it is known before this one."""
    place: int
    row: Row


def _rows(job: PartJob, paragraphs: bool) -> Iterator[_Held]:
    first, kind = True, job.kind
    teller = Converter(None, job.part.source.fields, max_chars=0, external=job.external)
    for place, row in rows(job.part, paragraphs=paragraphs):
        for one in [row] if isinstance(row, RowError) or job.kind == "corpus" else teller.questions(row):
            yield _Held(job, first, kind, place, one)
            first = False
            if kind is None and not isinstance(one, RowError):
                with contextlib.suppress(RowError):
                    kind = teller.detect(one)


def _part_rows(held: Sequence[_Held]) -> PartRows:
    """Neighbouring rows of one part."""
    start = held[0]
    job, part = start.job, start.job.part
    return PartRows(
        job.number, start.first, f"{part.name} {part.unit}", start.kind, job.kind is None, part.source.fields,
        part.base, part.format in ("csv", "tsv"), job.external, [(row.place, row.row) for row in held],
    )  # fmt: skip


def _characters(row: Row) -> int:
    """About how much memory a row's texts take."""
    if isinstance(row, RowError):
        return 0
    return sum(len(value) if isinstance(value, str) else len(str(value)) for value in row.values())
