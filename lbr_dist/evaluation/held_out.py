"""The held-out side of a prepared set, or a benchmark, as a retrieval problem: questions, a corpus, who answers what.

Equal questions are one query, and equal answers one passage; so a query may have several right passages, and no right
passage is ever counted as a miss. Equal means the strict form (`exact`): by case alone two molecules differ, and the
right one must be in the corpus. Distractors from the training splits make the corpus as large as a real one: the model
has seen them, which makes them harder, not easier, to push away. A benchmark is taken as it is: its own corpus, its own
queries, its grades.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lbr_dist.data.record import exact, normalised_hash
from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.data.shards import PreparedSet, open_set
from lbr_dist.data.sources import beir
from lbr_dist.data.sources.parts import Source, expand
from lbr_dist.data.sources.readers import rows
from lbr_dist.errors import UserError


@dataclass
class HeldOut:
    """Questions and the corpus they are asked of.

    Attributes:
        name: of the prepared set or benchmark.
        fingerprint: of the prepared set or benchmark.
        queries: unique questions.
        passages: unique answers of the evaluation split, then distractors; or the corpus of the benchmark.
        positives: for each query the rows of its right passages; at least one.
        references: for each query the answer text of its first record.
        answers: number of passages that answer a question of this split.
        grades: for each query how relevant each of its right passages is, from 1 up; empty: 1.
        itself: for a query that is a document too, by its id in a benchmark, that passage: neither right nor wrong, as
            BEIR has it.
    """

    name: str
    fingerprint: str
    queries: list[str] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)
    positives: list[list[int]] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    answers: int = 0
    grades: list[list[int]] = field(default_factory=list)
    itself: dict[int, int] = field(default_factory=dict)


def load_held_out(data: str | Path, *, distractors: int = 0) -> HeldOut:
    """Read the evaluation split of a prepared set, or a benchmark.

    Args:
        data: the prepared set; or a folder in the layout of BEIR, `FOLDER` or `FOLDER@SPLIT`.
        distractors: passages to add from the gl and cl splits, drawn at random, always the same; fewer where there
            are fewer.

    Raises:
        UserError: not a prepared set, no evaluation split, or no questions in it; or what `data.beir` says.
    """
    if beir.find_beir(str(data)) is not None:
        if distractors:
            raise UserError(
                f"--distractors {distractors}: {data} is a benchmark, with a corpus of its own: leave it out"
            )
        return load_benchmark(str(data))
    opened = open_set(data)
    held_out = HeldOut(opened.name, opened.fingerprint)
    reader = ShardReader(opened, "eval")
    query_of: dict[str, int] = {}
    passage_of: dict[str, int] = {}
    try:
        for row in range(len(reader.index)):
            _add(held_out, reader.read([row])[0], query_of, passage_of)
    finally:
        reader.close()
    if not held_out.queries:
        raise UserError(f"prepared set {data}: its eval split has no questions, only texts: nothing to retrieve with")
    held_out.answers = len(held_out.passages)
    if distractors:
        held_out.passages += _distractors(opened, set(passage_of), distractors)
    return held_out


def load_benchmark(path: str) -> HeldOut:
    """Read a benchmark: its whole corpus, titles in front of texts, and the queries that have a relevant document.

    Raises:
        UserError: what `data.beir` says, or no query has one.
    """
    [part] = expand(Source(path), Path())
    judged, asked, found = beir.load(part, rows, every=True)
    held_out = HeldOut(part.base, xxhash.xxh3_128_hexdigest(json.dumps(part.fingerprint()).encode()))
    held_out.passages = [f"{document['title']} {document['text']}".strip() for document in found.values()]
    row_of = {name: row for row, name in enumerate(found)}
    for query, scores in judged.items():
        relevant = {row_of[name]: score for name, score in scores.items() if score > 0}
        if relevant:
            if query in row_of and row_of[query] not in relevant:
                held_out.itself[len(held_out.queries)] = row_of[query]
            held_out.queries.append(asked[query])
            held_out.positives.append(list(relevant))
            held_out.grades.append(list(relevant.values()))
            held_out.references.append(held_out.passages[max(relevant, key=lambda row: relevant[row])])
    if not held_out.queries:
        raise UserError(f"{path}: no query has a relevant document: no score is above 0")
    held_out.answers = len({row for relevant in held_out.positives for row in relevant})
    return held_out


def _add(held_out: HeldOut, record: dict[str, Any], query_of: dict[str, int], passage_of: dict[str, int]) -> None:
    if "text" in record:
        return
    query = query_of.setdefault(exact(record["question"]), len(held_out.queries))
    if query == len(held_out.queries):
        held_out.queries.append(record["question"])
        held_out.positives.append([])
        held_out.references.append(record["answer"])
    for answer in [record["answer"], *record.get("positives", [])]:
        passage = passage_of.setdefault(exact(answer), len(held_out.passages))
        if passage == len(held_out.passages):
            held_out.passages.append(answer)
        if passage not in held_out.positives[query]:
            held_out.positives[query].append(passage)


def _distractors(opened: PreparedSet, taken: set[str], count: int) -> list[str]:
    """Answers (or texts) of the training splits, drawn from both, unlike each other and unlike `taken`: by the coarse
    form, as all that keeps the sides apart."""
    readers = [ShardReader(opened, split) for split in ("gl", "cl") if opened.splits[split].records]
    hashes = np.concatenate([np.zeros(0, np.int64), *(reader.index.answer_hash for reader in readers)])
    seen = {normalised_hash(text) for text in taken}
    drawn: list[int] = []
    for row in np.random.default_rng(0).permutation(len(hashes)):
        if len(drawn) == count:
            break
        if int(hashes[row]) not in seen:
            seen.add(int(hashes[row]))
            drawn.append(int(row))
    found: list[str] = []
    start = 0
    for reader in readers:
        stop = start + len(reader.index)
        for row in sorted(row for row in drawn if start <= row < stop):
            record = reader.read([row - start])[0]
            found.append(record["text"] if "text" in record else record["answer"])
        reader.close()
        start = stop
    return found
