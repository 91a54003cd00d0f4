"""The phases of `lbr prepare`, in order: read, remove repetitions, choose sides, write, prove, report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lbr_dist.data.execute import Executor, alone
from lbr_dist.data.preparation.checks import check_entity, check_left, check_named_fields, check_outside, counted, named
from lbr_dist.data.preparation.collect import Numbers, Texts, evaluated_texts
from lbr_dist.data.preparation.components import common_texts, components, link_of_largest
from lbr_dist.data.preparation.first_pass import DigestRows, FirstPass, first_pass
from lbr_dist.data.preparation.isolation import Containment, InContainment, crossings
from lbr_dist.data.preparation.proof import prove
from lbr_dist.data.preparation.row_blocks import PartJob
from lbr_dist.data.preparation.second_pass import WriteShard, write_shards
from lbr_dist.data.preparation.split import (
    CL,
    EVAL,
    EXTERNAL,
    GL,
    SIDES,
    TEXT,
    UNUSED,
    assign,
    shortfalls,
)
from lbr_dist.data.preparation.spool import SpoolSlice
from lbr_dist.data.progress import Progress
from lbr_dist.data.record import batches
from lbr_dist.data.shard_writer import write_manifest
from lbr_dist.data.sources.parts import Part
from lbr_dist.errors import UserError, printable

if TYPE_CHECKING:
    from lbr_dist.model.tokenizer import Tokenization


SLICE = 8192
"""Records that are compared with the evaluation side in one task."""


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
    """One preparation; after `run` the finished set is in `folder / "set"`."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        tokens: Tokenization,
        origin: dict[str, Any],
        progress: Progress,
        executor: Executor,
    ) -> None:
        """`folder` may hold the committed blocks and shards of an earlier run of the same preparation."""
        self.folder, self.settings, self.tokens = folder, settings, tokens
        self.origin, self.progress, self.executor = origin, progress, executor
        self.dropped: dict[str, int] = {}
        self.short: dict[str, dict[str, int]] = {}
        self.ungrouped = 0
        self.link: str | None = None

    def run(
        self,
        parts: list[Part],
        outside: list[Part],
        passed_over: Mapping[str, int],
        check_unchanged: Callable[[], None],
    ) -> dict[str, Any]:
        """Prepare the rows of `parts`, kept apart from those of `outside`; returns the report.

        Args:
            passed_over: for the report, counts the files of folders that are no part, by ending.
            check_unchanged: called when all are read, for the last time; raises where one is not what it was.

        Raises:
            UserError: too many bad rows, no rows, or sizes that cannot be met.
        """
        self.read = self._read(parts, outside)
        spool, numbers, texts = self.read.spool, self.read.numbers, self.read.texts
        try:
            check_unchanged()
            alive = self._deduplicate()
            self.read.bad.check(self.settings.max_bad_share)
            if not (alive & ~numbers.external).any():
                why = f"all rows are bad: {self.read.bad}" if self.read.bad.total else "the sources are empty"
                raise UserError(f"{named(parts)}: no records: {why}")
            for name, found in self.read.outside.items():
                check_outside(name, found)
            check_named_fields(self.read, alive, parts)
            self.ungrouped = check_entity(self.read, alive, parts, self.settings.entity)
            self.common = common_texts(texts.of(alive), numbers, spool)
            self.common_hashes = np.array([text.hash for text in self.common], np.uint64)
            side, labels = self._sides(texts.of(alive))
            check_left(side, parts, self.dropped)
            shutil.rmtree(self.folder / "sketches")  # room for those of the proof
            held = texts.of((side == EVAL) | (side == EXTERNAL))
            manifest = self._write(side, held.hash[held.linking(self.common_hashes)].astype(np.int64))
            with self.progress.phase("proving isolation"):
                isolation = prove(
                    self.folder / "set",
                    self.folder / "proof",
                    list(self._slices(side == EXTERNAL)),
                    self.executor,
                    similarity=self.settings.similarity,
                    common=self.common,
                )
        finally:
            spool.close()
        report = self._report(manifest, isolation, _component_report(numbers, side, labels), passed_over)
        text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        (self.folder / "set" / "report.json").write_text(text, encoding="utf-8")
        return report

    def _read(self, parts: list[Part], outside: list[Part]) -> FirstPass:
        settings, blocks = self.settings, self.folder / "blocks"
        blocks.mkdir(exist_ok=True)
        jobs = [PartJob(number, part, number >= len(parts)) for number, part in enumerate((*parts, *outside))]
        work = DigestRows(
            blocks, seed=settings.seed, entity=settings.entity, max_chars=settings.max_chars, domain=settings.domain
        )
        with self.progress.phase("reading rows") as advance:
            return first_pass(
                jobs, work, self.executor, folder=blocks, sketches=self.folder / "sketches",
                paragraphs=settings.paragraphs, advance=advance,
            )  # fmt: skip

    def _deduplicate(self) -> np.ndarray:
        """Mask of the records that stay: the first of each id. A repetition with other content is a bad row."""
        numbers = self.read.numbers
        own = np.flatnonzero(~numbers.external)
        _, first, inverse = np.unique(numbers.id_hash[own], return_index=True, return_inverse=True)
        original = own[first][inverse]
        again = own != original
        conflict = again & (numbers.content_hash[own] != numbers.content_hash[original])
        if conflict.any():
            number = own[conflict][0]
            part = self.read.parts[numbers.part[number]]
            where = f"{part.name} {part.unit} {numbers.line[number]}"
            self.read.bad.add(
                "duplicate_id",
                where,
                "its id came before, with other content: mend it, name the field of the ids (--field id=FIELD), or "
                "leave the ids aside (--field id=)",
                count=int(conflict.sum()),
            )
        self.dropped["repeated_row"] = int((again & ~conflict).sum())
        alive = np.ones(len(numbers.is_text), bool)
        alive[own[again]] = False
        self.original = np.arange(len(alive))  # of each record the one that it repeats whole, else itself
        self.original[own[again & ~conflict]] = original[again & ~conflict]
        return alive

    def _sides(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        """Side of each record, int8 [records], and its component, int64 [records]."""
        numbers, sketches, similarity = self.read.numbers, self.read.sketches, self.settings.similarity
        alive = np.zeros(len(numbers.is_text), bool)
        alive[texts.record] = True
        common = self.common_hashes
        with self.progress.phase("linking records"):
            labels = components(
                texts, numbers, sketches, alive=alive, original=self.original, similarity=similarity, common=common
            )
        usable = alive & ~numbers.is_text & ~numbers.external
        outside = np.zeros(len(labels), bool)
        outside[labels[numbers.external]] = True
        self.dropped["connected_to_external_evaluation"] = int((usable & outside[labels]).sum())
        usable &= ~outside[labels]
        self.link = link_of_largest(texts, numbers, labels, usable, common=common)
        try:
            side = assign(labels, usable, numbers.order, self.settings.sizes, self.link)
        except UserError as error:
            more = f"; dropped before that: {counted(self.dropped)}" * any(self.dropped.values())
            raise UserError(f"{error}{more}") from None
        self.short = shortfalls(side, labels, usable, self.settings.sizes)
        self.dropped["left_out_by_sizes"] = int((usable & (side == UNUSED)).sum())
        side[alive & numbers.is_text & ~numbers.external] = TEXT
        side[numbers.external] = EXTERNAL
        with self.progress.phase("comparing sides"):
            self._keep_apart(side, texts)
        return side, labels

    def _keep_apart(self, side: np.ndarray, texts: Texts) -> None:
        """Drop what is like an evaluation record."""
        self.dropped["text_like_evaluation"] = self.dropped["record_like_evaluation"] = 0
        self._drop_alike(side, texts)
        contained = self._contained(side)
        self.dropped["text_contains_evaluation"] = len(contained)
        side[contained] = UNUSED
        if len(contained):  # dropping changes which of very many alike texts are compared
            self._drop_alike(side, texts)

    def _drop_alike(self, side: np.ndarray, texts: Texts) -> None:
        """Drop near-duplicates of evaluation records: in one round, but of very many alike texts."""
        sketches, similarity, common = self.read.sketches, self.settings.similarity, self.common_hashes
        while len(losers := crossings(side, texts, sketches, similarity=similarity, common=common).losers):
            plain = int((side[losers] == TEXT).sum())
            self.dropped["text_like_evaluation"] += plain
            self.dropped["record_like_evaluation"] += len(losers) - plain
            side[losers] = UNUSED

    def _contained(self, side: np.ndarray) -> np.ndarray:
        """Plain texts that quote a whole evaluation question or answer, or are a part of one."""
        held = self._slices((side == EVAL) | (side == EXTERNAL))
        containment = Containment(
            [text for record in batch for text in evaluated_texts(record)]
            for _, records in held
            for batch in batches(records.records())
        )
        found = self.executor.stream(self._slices(side == TEXT), alone, InContainment(containment))
        return np.concatenate([np.zeros(0, np.int64), *found])

    def _write(self, side: np.ndarray, evaluation: np.ndarray) -> dict[str, Any]:
        """Second pass: each side's records in shuffled order; `evaluation` are hashes that no negative may have."""
        settings, order = self.settings, self.read.numbers.order
        owner, hashes = self.read.negative_owner, self.read.negative_hash
        leak = np.isin(hashes, evaluation) & np.isin(side[owner], (GL, CL))
        self.dropped["negative_that_is_evaluation"] = int(leak.sum())
        unwanted: dict[int, frozenset[int]] = {}
        for number, name in zip(owner[leak].tolist(), hashes[leak].tolist(), strict=True):
            unwanted[number] = unwanted.get(number, frozenset()) | {name}
        masks = {"gl": (side == GL) | (side == TEXT), "cl": side == CL, "eval": side == EVAL}
        members = {split: np.flatnonzero(mask) for split, mask in masks.items()}
        target, marks = self.folder / "set", self.folder / "shards"
        for folder in (marks, *(target / split for split in masks)):
            folder.mkdir(parents=True, exist_ok=True)
        with self.progress.phase("writing shards", int((side != UNUSED).sum())) as advance:
            infos = write_shards(
                self.read.spool,
                {split: found[np.argsort(order[found], kind="stable")] for split, found in members.items()},
                WriteShard(target, marks, self.tokens),
                self.executor,
                unwanted=unwanted,
                shard_records=settings.shard_records,
                shard_bytes=int(settings.shard_mib * (1 << 20)),
                advance=advance,
            )
        tokenizer = {"fingerprint": self.tokens.fingerprint, "path": self.tokens.path}
        return write_manifest(
            target, infos, name=settings.name, seed=settings.seed, source=self.origin, tokenizer=tokenizer
        )

    def _slices(self, mask: np.ndarray) -> Iterator[tuple[np.ndarray, SpoolSlice]]:
        """The records of a mask in pieces: their numbers, and where they are."""
        members = np.flatnonzero(mask)
        for start in range(0, len(members), SLICE):
            numbers = members[start : start + SLICE]
            yield numbers, self.read.spool.take(numbers)

    def _report(
        self,
        manifest: dict[str, Any],
        isolation: dict[str, Any],
        components: dict[str, Any],
        passed_over: Mapping[str, int],
    ) -> dict[str, Any]:
        return {
            "format": 1,
            "name": self.settings.name,
            "seed": self.settings.seed,
            "set": manifest["fingerprint"],
            "passed_over": {printable(ending): count for ending, count in sorted(passed_over.items())},
            "rows": {"read": self.read.bad.rows, "bad": self.read.bad.report()},
            "read_as": self.read.read_as,
            "empty_sources": [printable(name) for name in self.read.empty],
            "decontaminate": {
                "read": sum(found.rows for found in self.read.outside.values()),
                "by_question_alone": sum(found.questions_alone for found in self.read.outside.values()),
            },
            "records": {
                name: {"records": info["records"], "texts": info["texts"], "shards": len(info["shards"])}
                for name, info in manifest["splits"].items()
            },
            "short_sides": self.short,
            "dropped": self.dropped,
            "components": {
                **components,
                "largest_linked_by": self.link,
                "similarity": self.settings.similarity,
                "without_entity": self.ungrouped,
            },
            "isolation": isolation,
        }


def _component_report(numbers: Numbers, side: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Size of the components over question-answer records, and how many have records on two sides (none)."""
    chosen = np.isin(side, (GL, CL, EVAL))
    if not chosen.any():
        return {"count": 0, "largest": 0, "of": 0, "on_two_sides": 0}
    _, counts = np.unique(labels[chosen], return_counts=True)
    pairs = np.unique(labels[chosen] * len(SIDES) + side[chosen])
    return {
        "count": len(counts),
        "largest": int(counts.max()),
        "of": int(counts.sum()),
        "on_two_sides": len(pairs) - len(counts),
    }
