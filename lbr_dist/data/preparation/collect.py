"""What memory holds of the records of a preparation: hashes and numbers in flat arrays, never the texts.

Some 400 bytes a record at the peak, so memory grows with the number of records and not with the text. A `TextDigest` is
the part that is made for one block, by whichever process; `TextTable` joins them in order.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from lbr_dist.data.preparation.minhash import MIN_WORDS, SketchBlock, Sketches, word_hashes
from lbr_dist.data.record import Record, normalise
from lbr_dist.data.sources.fields import FIRST_OPTION
from lbr_dist.data.sources.row_values import REASONS
from lbr_dist.errors import UserError, printable

if TYPE_CHECKING:
    from pathlib import Path

NO_ENTITY = 0


class BadRows:
    """Rows read, and the bad ones among them by reason, with where the first of each was."""

    def __init__(self) -> None:
        self.rows = 0
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}
        self.questions_alone = 0
        """Rows of an evaluation set from elsewhere whose answer cannot be used: no bad rows, their question counts."""
        self.met: list[str] = []
        """Roles of --field whose field a row had."""
        self.indices: list[str] = []
        """Which indices of right options rows had, as `Converter.indices` has them."""
        self.read_as = ""
        """What the first row that gave a record was read as; empty: none did, or these are of several files."""

    def add(self, reason: str, where: str, detail: str, count: int = 1) -> None:
        """Count `count` bad rows; the first of a reason is remembered."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.first.setdefault(reason, printable(f"{where}: {detail}"))

    def merge(self, other: BadRows) -> None:
        """Count those of rows that come after."""
        self.rows += other.rows
        self.questions_alone += other.questions_alone
        self.met = sorted({*self.met, *other.met})
        self.indices = sorted({*self.indices, *other.indices})
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.first.setdefault(reason, other.first[reason])

    @property
    def total(self) -> int:
        """Bad rows of all reasons."""
        return sum(self.counts.values())

    @property
    def misread(self) -> int:
        """Bad rows but for those that were understood: their label calls the answer wrong."""
        return self.total - self.counts.get("wrong_answer", 0)

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
            raise UserError(
                f"{self.total} of {self.rows} rows are bad, more than --max-bad-share {max_share:g} allows: {self}"
            )

    def __str__(self) -> str:
        ordered = sorted(self.counts.items(), key=lambda item: -item[1])
        return "; ".join(f"{count} {reason} (first: {self.first[reason]})" for reason, count in ordered)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for `from_dict`."""
        return vars(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BadRows:
        """Inverse of `to_dict`."""
        bad = cls()
        vars(bad).update(values)
        return bad


@dataclass(frozen=True)
class Texts:
    """The texts that records are compared by: questions, answers, further positives, plain texts.

    Arrays [texts], those of a record beside each other, as `compared_texts` has them.
    """

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

    @property
    def first(self) -> np.ndarray:
        """bool: a record's question, or its plain text."""
        return np.diff(self.record, prepend=-1) != 0

    def linking(self, common: np.ndarray) -> np.ndarray:
        """bool: all but the answers with one of these hashes (uint64)."""
        return self.first | ~np.isin(self.hash, common)


@dataclass(frozen=True)
class TextDigest:
    """`Texts` of some records, counted from 0, with the sketches themselves."""

    owner: np.ndarray
    """int64: number of the record in the block."""
    hash: np.ndarray
    """uint64: hash of its normal form."""
    sketches: SketchBlock

    @classmethod
    def of(cls, batch: Sequence[Record], first: int = 0) -> TextDigest:
        """Digest a batch of records, the first of which counts as record `first`."""
        owners, forms = [], []
        for owner, record in enumerate(batch, first):
            for text in compared_texts(record):
                owners.append(owner)
                forms.append(normalise(text))
        hashes = [xxhash.xxh64_intdigest(form.encode()) for form in forms]
        return cls(np.array(owners, np.int64), np.array(hashes, np.uint64), SketchBlock.of(forms))

    @classmethod
    def join(cls, digests: Sequence[TextDigest]) -> TextDigest:
        """One digest of several batches."""
        parts = [cls.of([]), *digests]
        before = np.cumsum([0, *(len(part.sketches.signatures) for part in parts)])
        rows = [
            np.where(part.sketches.rows >= 0, part.sketches.rows + base, -1)
            for part, base in zip(parts, before, strict=False)
        ]
        sketches = SketchBlock(
            np.concatenate(rows),
            np.concatenate([part.sketches.signatures for part in parts]),
            np.concatenate([part.sketches.keys for part in parts], axis=1),
        )
        return cls(
            np.concatenate([part.owner for part in parts]), np.concatenate([part.hash for part in parts]), sketches
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """As named arrays, for a file."""
        sketches = {item.name: getattr(self.sketches, item.name) for item in fields(self.sketches)}
        return {"text_owner": self.owner, "text_hash": self.hash, **sketches}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> TextDigest:
        """Inverse of `arrays`."""
        sketches = SketchBlock(**{item.name: arrays[item.name] for item in fields(SketchBlock)})
        return cls(arrays["text_owner"], arrays["text_hash"], sketches)


class TextTable:
    """Collects `Texts` block by block."""

    def __init__(self, folder: Path) -> None:
        self.sketches = Sketches(folder)
        self._record, self._hash, self._sketch = array("q"), array("Q"), array("q")

    def append(self, first: int, digest: TextDigest) -> None:
        """Add what a digest holds, its record 0 being record `first`."""
        self._record.frombytes((digest.owner + first).tobytes())
        self._hash.frombytes(digest.hash.tobytes())
        self._sketch.frombytes(self.sketches.append(digest.sketches).tobytes())

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


def evaluated_texts(record: Record) -> tuple[str, ...]:
    """Texts of an evaluation record of which no plain text may hold one, or lie in one."""
    return (*compared_texts(record), *_stem(record))


def with_stem(record: Record) -> Record:
    """A question to be evaluated on, with its stem as a further text to compare: elsewhere it may have no options."""
    stem = _stem(record)
    if record.text is not None:
        return Record(id=record.id, question=record.text, answer=stem[0]) if stem else record
    return replace(record, positives=record.positives + stem)


def _stem(record: Record) -> tuple[str, ...]:
    """The stem of a multiple-choice question; one of fewer than `MIN_WORDS` words says too little."""
    stem, options, _ = compared_texts(record)[0].partition(FIRST_OPTION)
    return (stem,) if options and word_hashes([normalise(stem)]).counts[0] >= MIN_WORDS else ()


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
