"""First pass of a preparation: every source row once, to checked records on disk and a few numbers for each.

Rows are read as a stream of blocks; a block's rows are converted, hashed and sketched wherever the executor likes, and
what comes of it is committed as two files, the records and (last, by a rename) the numbers. Joined in the order of the
sources, the blocks are the same whoever made them, and those that a killed run committed need not be made again.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lbr_dist.data.execute import Executor
from lbr_dist.data.preparation.collect import (
    NO_ENTITY,
    BadRows,
    Numbers,
    TextDigest,
    Texts,
    TextTable,
    compared_texts,
    with_stem,
)
from lbr_dist.data.preparation.minhash import Sketches
from lbr_dist.data.preparation.row_blocks import (
    BLOCK_ROWS,
    PartJob,
    PartRows,
    RowBlock,
    numbers_file,
    read_jobs,
    row_blocks,
)
from lbr_dist.data.preparation.spool import Spool, commit, records_file
from lbr_dist.data.record import Record, batches, normalise, normalised_hash
from lbr_dist.data.sources.entity import Entity
from lbr_dist.data.sources.fields import Converter
from lbr_dist.data.sources.parts import Part
from lbr_dist.data.sources.row_values import RowError
from lbr_dist.errors import UserError, printable

HOPELESS = 1000
"""A source whose first so many rows are all bad stops the run at once: its fields were not understood."""
MOST_READ_AS = 20
"""Forms of files in the report."""
COLUMNS = {"is_text": np.bool_, "external": np.bool_, "id_hash": np.uint64, "content_hash": np.uint64,
           "entity": np.uint64, "order": np.uint64, "part": np.int64, "line": np.int64}  # fmt: skip
"""Types of the `Numbers` of a record."""


@dataclass(frozen=True)
class BlockSummary:
    """What came of a block."""

    job: int
    number: int
    records: int
    bad: dict[int, BadRows]
    """Of each part that has rows in it."""


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
    read_as: dict[str, list[dict[str, Any]]]
    """For the report, what the files of `sources` and `decontaminate` were read as."""
    spool: Spool
    numbers: Numbers
    texts: Texts
    sketches: Sketches
    negative_owner: np.ndarray
    """int64 [negatives]: record that each hard negative belongs to."""
    negative_hash: np.ndarray
    """int64 [negatives]: hash of its normal form."""


class DigestRows:
    """Makes records of a block's rows, and commits them with their numbers; picklable."""

    def __init__(self, folder: Path, *, seed: int, entity: str | None, max_chars: int, domain: str) -> None:
        """`folder` must be seen by every process; the rest as in `prepare`."""
        self._folder, self._seed, self._max_chars, self._domain = folder, seed, max_chars, domain
        self._entity = Entity.parse(entity) if entity else None

    def __call__(self, block: RowBlock) -> BlockSummary:
        """Digest one block."""
        target = numbers_file(self._folder, block.job, block.number)
        if not block.parts:
            with np.load(target) as known:
                return BlockSummary(block.job, block.number, len(known["sizes"]), _from_json(known["bad"]))
        bad = {part.part: BadRows() for part in block.parts}
        columns = {name: list[int]() for name in COLUMNS}
        sizes, digests, negatives = array("q"), list[TextDigest](), list[tuple[int, int]]()
        with records_file(target).open("wb", buffering=1 << 20) as spool:
            try:
                for batch in batches(self._records(block, bad, columns)):
                    digests.append(TextDigest.of(batch, first=len(sizes)))
                    for owner, record in enumerate(batch, len(sizes)):
                        negatives += [(owner, normalised_hash(text)) for text in record.negatives]
                    sizes.extend(spool.write(record.to_json()) for record in batch)
            except _HopelessError:
                return BlockSummary(block.job, block.number, 0, bad)
        arrays: dict[str, Any] = {
            "bad": _to_json(bad),
            "sizes": np.frombuffer(sizes, np.int64),
            "negatives": np.array(negatives, np.int64).reshape(-1, 2),
            **{name: np.array(values, COLUMNS[name]) for name, values in columns.items()},
            **TextDigest.join(digests).arrays(),
        }
        commit(target, arrays)
        return BlockSummary(block.job, block.number, len(sizes), bad)

    def _records(self, block: RowBlock, bad: dict[int, BadRows], columns: dict[str, list[int]]) -> Iterator[Record]:
        """The block's good rows; numbers and bad rows are taken down.

        Raises:
            _HopelessError: the first rows of a part are all bad.
        """
        for part in block.parts:
            convert = Converter(
                part.kind, part.fields, max_chars=self._max_chars, domain=self._domain, source=part.base,
                cells=part.cells, detected=part.detected, external=part.external,
            )  # fmt: skip
            for record, numbers in self._part_records(part, convert, bad[part.part]):
                for name, value in numbers.items():
                    columns[name].append(value)
                yield record
            bad[part.part].met, bad[part.part].indices = sorted(convert.met), sorted(convert.indices)

    def _part_records(
        self, part: PartRows, convert: Converter, bad: BadRows
    ) -> Iterator[tuple[Record, dict[str, int]]]:
        """The good rows of a part, each with its numbers."""
        field = self._entity.field if self._entity else None
        for place, row in part.rows:
            bad.rows += 1
            try:
                if isinstance(row, RowError):
                    raise row
                record = convert(row)
                if part.external and not record.is_text:
                    record = with_stem(record)
            except RowError as error:
                whole = None if isinstance(row, RowError) or not part.external else row
                if whole is not None and (question := convert.question_alone(whole)) is not None:
                    bad.questions_alone += 1
                    bad.read_as = bad.read_as or printable(convert.read_as(whole, field))
                    question = with_stem(question)
                    yield question, {**self._numbers(question, row, place, part), "is_text": False}
                    continue
                bad.add(error.reason, f"{part.name} {place}", error.detail)
                if part.first and bad.misread == bad.rows == HOPELESS:
                    raise _HopelessError from None
            else:
                bad.read_as = bad.read_as or printable(convert.read_as(row, field))
                yield record, self._numbers(record, row, place, part)

    def _numbers(self, record: Record, row: Any, place: int, part: PartRows) -> dict[str, int]:
        name = record.id.encode()
        group = self._entity.of(row, record) if self._entity else None
        form = None if group is None else normalise(group).encode("utf-8", "replace")
        content = "\0".join((*compared_texts(record), "", *record.negatives))
        return {
            "is_text": record.is_text,
            "external": part.external,
            "id_hash": xxhash.xxh3_64_intdigest(name),
            "content_hash": xxhash.xxh3_64_intdigest(content.encode()),
            "entity": NO_ENTITY if form is None else xxhash.xxh3_64_intdigest(form),
            "order": xxhash.xxh3_64_intdigest(name, self._seed),
            "part": part.part,
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
        UserError: a file is damaged, its first rows are all bad, or its options are counted from 1.
    """
    summaries, bad_so_far, understood, indices = [], dict[int, BadRows](), set[int](), defaultdict[int, set[str]](set)
    read = partial(row_blocks, paragraphs=paragraphs, folder=folder, most=BLOCK_ROWS)
    for summary in _in_order(executor.stream(read_jobs(jobs), read, work)):
        for number, found in summary.bad.items():
            indices[number].update(found.indices)
            if found.misread < found.rows:
                understood.add(number)
                bad_so_far.pop(number, None)
            elif number not in understood:
                bad = bad_so_far.setdefault(number, BadRows())
                bad.merge(found)
                if bad.rows >= HOPELESS:
                    raise UserError(
                        f"the first {bad.rows} rows of {jobs[number].part.name} are bad, so it is not read further: "
                        f"{bad}"
                    )
        summaries.append(summary)
        advance(summary.records)
    _refuse_from_one(jobs, indices)
    summaries.sort(key=lambda summary: (summary.job, summary.number))
    return _join(jobs, summaries, folder, sketches)


def _refuse_from_one(jobs: list[PartJob], indices: Mapping[int, set[str]]) -> None:
    """See that no source counts its options from 1; `indices`: of each part, as `Converter.indices` has them."""
    for number, met in sorted(indices.items()):
        if met == {"inside", "past"} and not jobs[number].external:
            raise UserError(
                f"{jobs[number].part.name}: gives right options by numbers that count from 1 (0 never occurs, and that "
                "of the last option + 1 does), so that each would be read as the one after it: write letters (A for 1) "
                "or the texts of the options instead"
            )


def _in_order(summaries: Iterator[BlockSummary]) -> Iterator[BlockSummary]:
    """Those of each job in order, in which they need not come."""
    waiting, following = dict[tuple[int, int], BlockSummary](), Counter[int]()
    for summary in summaries:
        waiting[summary.job, summary.number] = summary
        while (found := waiting.pop((summary.job, following[summary.job]), None)) is not None:
            following[summary.job] += 1
            yield found


def _join(jobs: list[PartJob], summaries: list[BlockSummary], folder: Path, sketches: Path) -> FirstPass:
    """The blocks in order, as if they were one."""
    bad, read, table, first = BadRows(), dict[int, str](), TextTable(sketches), 0
    outside = {job.part.source.name: BadRows() for job in jobs if job.external}
    columns: dict[str, list[np.ndarray]] = {name: [np.zeros(0, kind)] for name, kind in COLUMNS.items()}
    sizes, files, negatives = list[np.ndarray](), list[Path](), [np.zeros((0, 2), np.int64)]
    for summary in summaries:
        for number, found in summary.bad.items():
            (outside[jobs[number].part.source.name] if jobs[number].external else bad).merge(found)
            read[number] = read.get(number) or found.read_as
        file = numbers_file(folder, summary.job, summary.number)
        with np.load(file) as arrays:
            for name, blocks in columns.items():
                blocks.append(arrays[name])
            sizes.append(arrays["sizes"])
            negatives.append(arrays["negatives"] + [first, 0])
            table.append(first, TextDigest.from_arrays(arrays))
        files.append(records_file(file))
        first += summary.records
    owner_hash = np.concatenate(negatives)
    return FirstPass(
        bad,
        outside,
        [job.part for job in jobs],
        [job.part.name for job in jobs if not (job.external or job.number in read)],
        {"sources": _read_as(jobs, read, external=False), "decontaminate": _read_as(jobs, read, external=True)},
        Spool(files, sizes),
        Numbers(**{name: np.concatenate(blocks) for name, blocks in columns.items()}),
        table.finish(),
        table.sketches,
        owner_hash[:, 0],
        owner_hash[:, 1],
    )


def _read_as(jobs: list[PartJob], read: Mapping[int, str], *, external: bool) -> list[dict[str, Any]]:
    """What files were read as, in their order: the first of those that were read alike, and how many these are."""
    found: dict[str, list[str]] = {}
    for job in jobs:
        if job.external == external and read.get(job.number):
            found.setdefault(read[job.number], []).append(printable(job.part.name))
    groups = list(found.items())
    if len(groups) > MOST_READ_AS:
        alike = [name for _, names in groups[MOST_READ_AS - 1 :] for name in names]
        groups[MOST_READ_AS - 1 :] = [(f"{len(groups) - MOST_READ_AS + 1} other forms", alike)]
    return [{"as": what, "files": len(names), "first": names[0]} for what, names in groups]


class _HopelessError(Exception):
    """The first rows of a part are all bad."""


def _to_json(bad: Mapping[int, BadRows]) -> np.ndarray:
    """Bad rows by part, as bytes."""
    return np.frombuffer(json.dumps({part: found.to_dict() for part, found in bad.items()}).encode(), np.uint8)


def _from_json(data: np.ndarray) -> dict[int, BadRows]:
    """Inverse of `_to_json`."""
    return {int(part): BadRows.from_dict(found) for part, found in json.loads(data.tobytes()).items()}
