"""First pass of a preparation: every source row once, to checked records on disk and a few numbers for each.

Rows are read as a stream of blocks; a block's rows are converted, hashed and sketched wherever the executor likes, and
what comes of it is committed as two files, the records and (last, by a rename) the numbers. Joined in the order of the
sources, the blocks are the same whoever made them, and those that a killed run committed need not be made again.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lbr_dist.data.collect import NO_ENTITY, BadRows, Numbers, TextDigest, Texts, TextTable, compared_texts
from lbr_dist.data.entity import Entity
from lbr_dist.data.execute import Executor
from lbr_dist.data.fields import Converter
from lbr_dist.data.minhash import Sketches
from lbr_dist.data.readers import Row, rows
from lbr_dist.data.record import Record, batches, normalised_hash
from lbr_dist.data.row_values import RowError
from lbr_dist.data.sources import Part
from lbr_dist.data.spool import Spool, commit, is_committed, records_file
from lbr_dist.errors import UserError

BLOCK_ROWS = 8192
"""Rows in a block at most,"""
BLOCK_CHARACTERS = 8 << 20
"""and about so many characters, unless a single row has more."""
HOPELESS = 1000
"""A source whose first so many rows are all bad stops the run at once: its fields were not understood."""
COLUMNS = {"is_text": np.bool_, "id_hash": np.uint64, "content_hash": np.uint64, "entity": np.uint64,
           "order": np.uint64, "line": np.int64}  # fmt: skip
"""The numbers of a record that its row decides, with their types; see `Numbers`."""


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


@dataclass(frozen=True)
class RowBlock:
    """Neighbouring rows of a part; none where the block has been committed."""

    part: int
    number: int
    name: str
    """Of the part, for messages, with its unit."""
    kind: str | None
    """Kind of the part's rows as far as it is known before the first row of the block."""
    detected: bool
    """The rows tell the kind, not the user."""
    fields: Mapping[str, str]
    base: str
    cells: bool
    """The rows are of a CSV file."""
    external: bool
    rows: list[tuple[int, Row]]


@dataclass(frozen=True)
class BlockSummary:
    """What came of a block."""

    part: int
    number: int
    records: int
    bad: BadRows
    hopeless: bool = False


@dataclass(frozen=True)
class FirstPass:
    """All that the first pass leaves."""

    bad: BadRows
    """Of the sources."""
    outside: dict[str, BadRows]
    """Of each external evaluation set, by what the user named it."""
    parts: list[Part]
    empty: list[str]
    """Names of the sources without a row."""
    spool: Spool
    numbers: Numbers
    texts: Texts
    sketches: Sketches
    negative_owner: np.ndarray
    """int64 [negatives]: record that each hard negative belongs to."""
    negative_hash: np.ndarray
    """int64 [negatives]: hash of its normal form."""


def row_blocks(job: PartJob, *, paragraphs: bool, folder: Path, most: int) -> Iterator[RowBlock]:
    """Rows of a part in blocks of at most `most`, the same every time.

    Raises:
        UserError: the file is damaged.
    """
    part, kind, number = job.part, job.kind, 0
    teller = Converter(None, part.source.fields, max_chars=0, external=job.external)
    known, held, characters = kind, list[tuple[int, Row]](), 0

    def block() -> RowBlock:
        name = f"{part.name} {part.unit}"
        kept = [] if is_committed(numbers_file(folder, job.number, number)) else held
        return RowBlock(
            job.number, number, name, known, job.kind is None, part.source.fields, part.base,
            part.format in ("csv", "tsv"), job.external, kept,
        )  # fmt: skip

    def numbered() -> Iterator[tuple[int, Row]]:
        for place, row in rows(part, paragraphs=paragraphs):
            for one in [row] if isinstance(row, RowError) or job.kind == "corpus" else teller.questions(row):
                yield place, one

    for place, row in numbered():
        held.append((place, row))
        characters += _characters(row)
        if kind is None and not isinstance(row, RowError):
            with contextlib.suppress(RowError):
                kind = teller.detect(row)
        if len(held) == most or characters >= BLOCK_CHARACTERS:
            yield block()
            known, held, characters, number = kind, [], 0, number + 1
    if held:
        yield block()


class DigestRows:
    """Makes records of a block's rows, and commits them with their numbers; picklable."""

    def __init__(self, folder: Path, *, seed: int, entity: str | None, max_chars: int, domain: str) -> None:
        """`folder` must be seen by every process; the rest as in `prepare`."""
        self._folder, self._seed, self._max_chars, self._domain = folder, seed, max_chars, domain
        self._entity = Entity.parse(entity) if entity else None

    def __call__(self, block: RowBlock) -> BlockSummary:
        """Digest one block."""
        target = numbers_file(self._folder, block.part, block.number)
        if not block.rows:
            with np.load(target) as known:
                return _summary(block, known)
        convert = Converter(
            block.kind, block.fields, max_chars=self._max_chars, domain=self._domain, source=block.base,
            cells=block.cells, detected=block.detected, external=block.external,
        )  # fmt: skip
        bad, columns = BadRows(), {name: list[int]() for name in COLUMNS}
        sizes, digests, negatives = array("q"), list[TextDigest](), list[tuple[int, int]]()
        with records_file(target).open("wb", buffering=1 << 20) as spool:
            for batch in batches(self._records(block, convert, bad, columns)):
                digests.append(TextDigest.of(batch, first=len(sizes)))
                for owner, record in enumerate(batch, len(sizes)):
                    negatives += [(owner, normalised_hash(text)) for text in record.negatives]
                sizes.extend(spool.write(record.to_json()) for record in batch)
        bad.met = sorted(convert.met)
        if block.number == 0 and bad.misread == bad.rows == HOPELESS:
            return BlockSummary(block.part, 0, 0, bad, hopeless=True)
        arrays: dict[str, Any] = {
            "bad": np.frombuffer(bad.to_json(), np.uint8),
            "sizes": np.frombuffer(sizes, np.int64),
            "negatives": np.array(negatives, np.int64).reshape(-1, 2),
            **{name: np.array(values, COLUMNS[name]) for name, values in columns.items()},
            **TextDigest.join(digests).arrays(),
        }
        commit(target, arrays)
        return BlockSummary(block.part, block.number, len(sizes), bad)

    def _records(
        self, block: RowBlock, convert: Converter, bad: BadRows, columns: dict[str, list[int]]
    ) -> Iterator[Record]:
        """The block's good rows; numbers and bad rows are taken down. Ends early in a hopeless part."""
        for place, row in block.rows:
            bad.rows += 1
            try:
                if isinstance(row, RowError):
                    raise row
                record = convert(row)
            except RowError as error:
                question = convert.question_alone(row) if block.external and not isinstance(row, RowError) else None
                if question is None:
                    bad.add(error.reason, f"{block.name} {place}", error.detail)
                    if block.number == 0 and bad.misread == bad.rows == HOPELESS:
                        return
                    continue
                record = question
                bad.questions_alone += 1
                links = True
            else:
                links = not record.is_text
            for name, value in self._numbers(record, row, place, links).items():
                columns[name].append(value)
            yield record

    def _numbers(self, record: Record, row: Any, place: int, links: bool) -> dict[str, int]:
        name = record.id.encode()
        group = self._entity.of(row, record) if self._entity else None
        content = "\0".join((*compared_texts(record), "", *record.negatives))
        return {
            "is_text": not links,
            "id_hash": xxhash.xxh3_64_intdigest(name),
            "content_hash": xxhash.xxh3_64_intdigest(content.encode()),
            "entity": NO_ENTITY if group is None else xxhash.xxh3_64_intdigest(group.encode("utf-8", "replace")),
            "order": xxhash.xxh3_64_intdigest(name, self._seed),
            "line": place,
        }


def first_pass(
    jobs: list[PartJob],
    work: DigestRows,
    executor: Executor,
    *,
    folder: Path,
    sketches: Path,
    paragraphs: bool,
    advance: Callable[[int], None],
) -> FirstPass:
    """Read all parts.

    Args:
        folder: for committed blocks, as given to `work`.
        sketches: folder to make, for the joined sketches.

    Raises:
        UserError: a file is damaged, or its first rows are all bad.
    """
    summaries = []
    read = partial(row_blocks, paragraphs=paragraphs, folder=folder, most=BLOCK_ROWS)
    for summary in executor.stream(jobs, read, work):
        if summary.hopeless:
            raise UserError(
                f"the first {HOPELESS} rows of {jobs[summary.part].part.name} are bad, so it is not read further: "
                f"{summary.bad}"
            )
        summaries.append(summary)
        advance(summary.records)
    summaries.sort(key=lambda summary: (summary.part, summary.number))
    return _join(jobs, summaries, folder, sketches)


def _join(jobs: list[PartJob], summaries: list[BlockSummary], folder: Path, sketches: Path) -> FirstPass:
    """The blocks in order, as if they were one."""
    read = {summary.part for summary in summaries}
    bad, table, first = BadRows(), TextTable(sketches), 0
    outside = {job.part.source.path: BadRows() for job in jobs if job.external}
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*COLUMNS, "external", "part")}
    sizes, files, negatives = list[np.ndarray](), list[Path](), [np.zeros((0, 2), np.int64)]
    for summary in summaries:
        job = jobs[summary.part]
        (outside[job.part.source.path] if job.external else bad).merge(summary.bad)
        file = numbers_file(folder, summary.part, summary.number)
        with np.load(file) as arrays:
            for name in COLUMNS:
                columns[name].append(arrays[name])
            sizes.append(arrays["sizes"])
            negatives.append(arrays["negatives"] + [first, 0])
            table.append(first, TextDigest.from_arrays(arrays))
        columns["external"].append(np.full(summary.records, job.external))
        columns["part"].append(np.full(summary.records, summary.part))
        files.append(records_file(file))
        first += summary.records
    types = {**COLUMNS, "external": np.bool_, "part": np.int64}
    joined: dict[str, Any] = {
        name: np.concatenate([np.zeros(0, types[name]), *blocks]) for name, blocks in columns.items()
    }
    owner_hash = np.concatenate(negatives)
    return FirstPass(
        bad,
        outside,
        [job.part for job in jobs],
        [job.part.name for job in jobs if not (job.external or job.number in read)],
        Spool(files, sizes),
        Numbers(**joined),
        table.finish(),
        table.sketches,
        owner_hash[:, 0],
        owner_hash[:, 1],
    )


def numbers_file(folder: Path, part: int, number: int) -> Path:
    """The file that commits a block."""
    return folder / f"{part:06d}-{number:08d}.npz"


def _summary(block: RowBlock, arrays: Mapping[str, np.ndarray]) -> BlockSummary:
    bad = BadRows.from_json(arrays["bad"].tobytes())
    return BlockSummary(block.part, block.number, len(arrays["sizes"]), bad)


def _characters(row: Row) -> int:
    """About how much memory a row's texts take."""
    if isinstance(row, RowError):
        return 0
    return sum(len(value) if isinstance(value, str) else len(str(value)) for value in row.values())
