"""The phases of `lbr prepare`, in order: read, remove repetitions, choose sides, write, prove, report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lbr_dist.data.collect import Collector, Numbers, Spool, Texts, compared_texts
from lbr_dist.data.fields import Converter, Entity
from lbr_dist.data.isolation import Containment, crossings
from lbr_dist.data.progress import Progress
from lbr_dist.data.proof import prove
from lbr_dist.data.record import Record, batches, normalised_hash
from lbr_dist.data.shards import write_set
from lbr_dist.data.sources import Part
from lbr_dist.data.split import CL, EVAL, EXTERNAL, GL, SIDES, TEXT, UNUSED, assign, common_texts, components
from lbr_dist.errors import UserError

if TYPE_CHECKING:
    from lbr_dist.model.tokenizer import Tokenization


@dataclass(frozen=True)
class Settings:
    """Everything but the sources and the tokenizer that decides the output; `prepare` documents each."""

    sizes: dict[str, int | float | None]
    entity: str | None
    paragraphs: bool
    similarity: float
    max_chars: int
    max_bad_share: float
    domain: str
    name: str
    seed: int
    shard_records: int
    shard_mib: float


class Pipeline:
    """One preparation in the folder `work`; the finished set is in `work/set` after `run`."""

    def __init__(
        self, work: Path, settings: Settings, tokens: Tokenization, origin: dict[str, Any], progress: Progress
    ) -> None:
        self.work, self.settings, self.tokens = work, settings, tokens
        self.origin, self.progress = origin, progress
        self.dropped: dict[str, int] = {}

    def run(self, parts: list[Part], outside: list[Part]) -> dict[str, Any]:
        """Prepare the rows of `parts`, kept apart from those of `outside`; returns the report.

        Raises:
            UserError: too many bad rows, no rows, or sizes that cannot be met.
        """
        entity = Entity.parse(self.settings.entity) if self.settings.entity else None
        collector = Collector(self.work, seed=self.settings.seed, entity=entity, paragraphs=self.settings.paragraphs)
        try:
            self._read(collector, parts, outside)
            spool, numbers, texts = collector.finish()
        finally:
            collector.close()
        try:
            alive = self._deduplicate(collector, numbers)
            collector.bad.check(self.settings.max_bad_share)
            if not (alive & ~numbers.external).any():
                raise UserError(f"{', '.join(part.name for part in parts)}: no records: the sources are empty")
            self.common = common_texts(texts.of(alive), numbers, spool)
            side, labels = self._sides(spool, numbers, texts.of(alive), collector)
            evaluation = texts.of((side == EVAL) | (side == EXTERNAL)).hash.astype(np.int64)
            manifest = self._write(spool, numbers, side, set(evaluation.tolist()))
            with self.progress.phase("proving isolation"):
                isolation = prove(
                    self.work / "set",
                    self.work / "proof",
                    lambda: (batch for _, batch in _chunks(spool, side == EXTERNAL)),
                    similarity=self.settings.similarity,
                    common=self.common,
                )
        finally:
            spool.close()
        report = self._report(collector, manifest, isolation, _component_report(numbers, side, labels))
        text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        (self.work / "set" / "report.json").write_text(text, encoding="utf-8")
        return report

    def _read(self, collector: Collector, parts: list[Part], outside: list[Part]) -> None:
        with self.progress.phase("reading rows") as advance:
            for number, part in enumerate((*parts, *outside)):
                convert = Converter(
                    "corpus" if part.format == "text" and part.source.kind is None else part.source.kind,
                    part.source.fields,
                    max_chars=self.settings.max_chars,
                    domain=self.settings.domain,
                    source=part.base,
                )
                collector.read(part, convert, external=number >= len(parts), advance=advance)

    def _deduplicate(self, collector: Collector, numbers: Numbers) -> np.ndarray:
        """Mask of the records that stay: the first of each id. A repetition with other content is a bad row."""
        own = np.flatnonzero(~numbers.external)
        _, first, inverse = np.unique(numbers.id_hash[own], return_index=True, return_inverse=True)
        original = own[first][inverse]
        again = own != original
        conflict = again & (numbers.content_hash[own] != numbers.content_hash[original])
        if conflict.any():
            number = own[conflict][0]
            part = collector.parts[numbers.part[number]]
            where = f"{part.name} {part.unit} {numbers.line[number]}"
            collector.bad.add(
                "duplicate_id", where, "its id came before, with other content", count=int(conflict.sum())
            )
        self.dropped["repeated_row"] = int((again & ~conflict).sum())
        alive = np.ones(len(numbers.is_text), bool)
        alive[own[again]] = False
        return alive

    def _sides(
        self, spool: Spool, numbers: Numbers, texts: Texts, collector: Collector
    ) -> tuple[np.ndarray, np.ndarray]:
        """Side of each record, int8 [records], and its component, int64 [records]."""
        sketches, similarity = collector.table.sketches, self.settings.similarity
        alive = np.zeros(len(numbers.is_text), bool)
        alive[texts.record] = True
        common = np.array([text.hash for text in self.common], np.uint64)
        with self.progress.phase("linking records"):
            labels = components(texts, numbers, sketches, alive=alive, similarity=similarity, common=common)
        usable = alive & ~numbers.is_text & ~numbers.external
        outside = np.zeros(len(labels), bool)
        outside[labels[numbers.external]] = True
        self.dropped["connected_to_external_evaluation"] = int((usable & outside[labels]).sum())
        usable &= ~outside[labels]
        side = assign(labels, usable, numbers.order, self.settings.sizes)
        self.dropped["left_out_by_sizes"] = int((usable & (side == UNUSED)).sum())
        side[alive & numbers.is_text & ~numbers.external] = TEXT
        side[numbers.external] = EXTERNAL
        with self.progress.phase("comparing sides"):
            self.dropped["text_like_evaluation"] = self.dropped["record_like_evaluation"] = 0
            while len(
                losers := crossings(side, texts, sketches, similarity=similarity, common=common).losers
            ):  # one round, unless dropping changes which of very many alike texts are compared
                plain = int((side[losers] == TEXT).sum())
                self.dropped["text_like_evaluation"] += plain
                self.dropped["record_like_evaluation"] += len(losers) - plain
                side[losers] = UNUSED
            self._drop_containing(spool, side)
        return side, labels

    def _drop_containing(self, spool: Spool, side: np.ndarray) -> None:
        """Drop plain texts that quote a whole evaluation question or answer."""
        held = ([text for record in batch for text in compared_texts(record)] for _, batch in
                _chunks(spool, (side == EVAL) | (side == EXTERNAL)))  # fmt: skip
        containment = Containment(held)
        self.dropped["text_contains_evaluation"] = 0
        for members, batch in _chunks(spool, side == TEXT):
            holds = containment.holds([record.document for record in batch])
            side[members[holds]] = UNUSED
            self.dropped["text_contains_evaluation"] += int(holds.sum())

    def _write(self, spool: Spool, numbers: Numbers, side: np.ndarray, evaluation: set[int]) -> dict[str, Any]:
        """Second pass: each side's records in their shuffled order."""
        self.dropped["negative_that_is_evaluation"] = 0
        with self.progress.phase("writing shards", int((side != UNUSED).sum())) as advance:

            def records(chosen: np.ndarray) -> Iterator[Record]:
                members = np.flatnonzero(chosen)
                for number in members[np.argsort(numbers.order[members], kind="stable")]:
                    record = spool[int(number)]
                    yield self._clean(record, evaluation) if side[number] in (GL, CL) and record.negatives else record
                    advance(1)

            target = self.work / "set"
            target.mkdir()
            return write_set(
                target,
                {
                    "gl": records((side == GL) | (side == TEXT)),
                    "cl": records(side == CL),
                    "eval": records(side == EVAL),
                },
                self.tokens,
                name=self.settings.name,
                seed=self.settings.seed,
                source=self.origin,
                tokenizer_path=self.tokens.path,
                shard_records=self.settings.shard_records,
                shard_bytes=int(self.settings.shard_mib * (1 << 20)),
            )

    def _clean(self, record: Record, evaluation: set[int]) -> Record:
        """The record without hard negatives that are an evaluation text."""
        kept = tuple(text for text in record.negatives if normalised_hash(text) not in evaluation)
        self.dropped["negative_that_is_evaluation"] += len(record.negatives) - len(kept)
        return dataclasses.replace(record, negatives=kept)

    def _report(
        self, collector: Collector, manifest: dict[str, Any], isolation: dict[str, Any], components: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "format": 1,
            "name": self.settings.name,
            "seed": self.settings.seed,
            "set": manifest["fingerprint"],
            "rows": {"read": collector.bad.rows, "bad": collector.bad.report()},
            "records": {
                name: {"records": info["records"], "texts": info["texts"], "shards": len(info["shards"])}
                for name, info in manifest["splits"].items()
            },
            "dropped": self.dropped,
            "components": {**components, "similarity": self.settings.similarity},
            "isolation": isolation,
        }


def _component_report(numbers: Numbers, side: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Size of the components over question-answer records, and how many have records on two sides (none)."""
    chosen = np.isin(side, (GL, CL, EVAL))
    if not chosen.any():
        return {"count": 0, "largest": 0, "on_two_sides": 0}
    _, counts = np.unique(labels[chosen], return_counts=True)
    pairs = np.unique(labels[chosen] * len(SIDES) + side[chosen])
    return {"count": len(counts), "largest": int(counts.max()), "on_two_sides": len(pairs) - len(counts)}


def _chunks(spool: Spool, mask: np.ndarray) -> Iterator[tuple[np.ndarray, list[Record]]]:
    """The records of a mask, in batches, with their numbers."""
    members = np.flatnonzero(mask)
    start = 0
    for batch in batches(spool[int(number)] for number in members):
        yield members[start : start + len(batch)], batch
        start += len(batch)
