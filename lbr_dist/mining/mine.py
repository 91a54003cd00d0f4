"""`lbr mine`: hard negatives for a prepared set, found with the model at hand.

Questions and answers of the cl side are embedded in blocks, each committed by itself; the nearest passages of each
question are searched, again block by block; what the rule leaves becomes `negatives` in a new prepared set, which
`lbr train` reads like any other. Vectors lie on disk, so memory grows by some hundred bytes a record; a run that was
killed goes on at the first missing block.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lbr_dist.data.execute import Executor, Here, current
from lbr_dist.data.progress import Progress
from lbr_dist.data.publish import check_target, finished, publish, resumable, workspace
from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.data.shards import PreparedSet, open_set
from lbr_dist.disk import file_xxh128
from lbr_dist.errors import UserError, printable
from lbr_dist.inference.text_blocks import BLOCK_TEXTS
from lbr_dist.mining.candidates import SIDE, Candidates, survey
from lbr_dist.mining.choose import Chosen, Rule, choose, commit, is_committed
from lbr_dist.mining.given import GivenNegatives
from lbr_dist.mining.nearest import Exact, Inverted, Lexical, Nearest, kind_for
from lbr_dist.mining.notes import Notes
from lbr_dist.mining.report import example_queries, markdown
from lbr_dist.mining.vectors import embed, texts
from lbr_dist.mining.write import write_mined

VERSION = 5
"""Raised when the same input and settings give other output."""
QUERIES = 2048
"""Queries whose negatives are committed together,"""
SCORES = 1 << 22
"""and scores that are held of them at a time: one question may have very many known answers."""
SHARE = 0.95
"""Share of the positive's score below which a negative lies, where the user sets neither share nor margin."""


@dataclass(frozen=True)
class MineReport:
    """What was done; `data` is report.json."""

    out: Path
    data: dict[str, Any]
    unchanged: bool

    @property
    def lines(self) -> list[str]:
        """A few lines for people."""
        if self.unchanged:
            return [f"{self.out}: up to date (same model, set and settings); nothing to do"]
        counts = self.data["mined"]["counts"]
        lines = [
            f"{self.out}: {counts['negatives']} negatives for {counts['queries']} queries",
            f"with fewer than asked for: {counts['without_enough']}, with none: {counts['without_any']}",
            f"too near to the positive: {counts['too_near']} passages; known answers met: {counts['known_answers']}, "
            f"negatives that were there: {counts['present_negatives']}",
            f"read the examples: {self.out}/report.md",
        ]
        if 2 * counts["without_any"] > counts["queries"] and counts["too_near"] > counts["negatives"]:
            lines.append(f"most have none: {self._why_none}")
        return lines

    @property
    def _why_none(self) -> str:
        """What was too near, and what helps."""
        mined = self.data["mined"]
        depth, passages, counts = mined["depth"], mined["passages"], mined["counts"]
        if mined["search"] == "bm25" and 2 * counts["zero_positives"] > counts["queries"]:
            return "answers share no words with their questions, so all that share one are too near; use another model"
        if depth >= passages:
            return f"of all {passages} passages nearly all are too near, and no --depth helps; use another model"
        return f"of {depth} passages nearly all are too near; look further with --depth"


def mine(
    model: str,
    data: str | Path,
    out: str | Path,
    *,
    count: int = 8,
    skip: int = 0,
    depth: int = 100,
    share: float | None = None,
    margin: float | None = None,
    index: str = "auto",
    device: str | None = None,
    overwrite: bool = False,
    block: int = BLOCK_TEXTS,
) -> MineReport:
    """Mine hard negatives for the cl side of a prepared set.

    Args:
        model: as in `inference.loading.load_encoder`, or `bm25`, or a JSONL file of negatives by id (mining/given.py).
        data: prepared set, local or remote.
        out: folder of the set to make: `data`'s sides, the cl records with their mined negatives after those that they
            have, and report.json, report.md and mined.jsonl (ids and scores).
        count, skip, depth, share, margin: see `lbr_dist.mining.choose.Rule`; with neither `share` nor `margin` the
            share is `SHARE`.
        index: exact, ivf, or auto (by size).
        device: default: CUDA where there is one.
        overwrite: replace a set made from other input.
        block: texts embedded and committed at a time.

    Raises:
        UserError: bad settings, no such model or set, nothing to mine in it, or an `out` that holds something else or
            lies in the folder of the model or of a prepared set.
    """
    from lbr_dist.inference.loading import check_output, check_spec, model_fingerprint, pinned
    from lbr_dist.model.plain import usable_device

    rule = _rule(count, skip, depth, share, margin)
    if index not in ("auto", "exact", "ivf"):
        raise UserError(f"--index {index}: expected auto, exact or ivf")
    place = check_target(Path(out))
    if place == Path(data).resolve():
        raise UserError(f"--out {out}: is the set itself, which mining does not change: name another folder")
    given = Path(model).is_file()
    if given:
        _refuse_search(skip=skip, depth=depth, share=share, margin=margin, index=index)
    opened = open_set(data)
    if not given and model != "bm25":
        check_spec(model)
        check_output(model, Path(out))
        model = pinned(model)  # questions and answers are embedded by one checkpoint of a run in training
    identity = file_xxh128(Path(model)) if given else model if model == "bm25" else model_fingerprint(model)
    if device is not None and isinstance(current(), Here):
        usable_device(device)  # before the workspace, which an error would empty of what an earlier run committed
    settings = {**asdict(rule), "index": index, "block": block}
    origin = {"mined": {"version": VERSION, "model": identity, "settings": settings}, "set": opened.fingerprint}
    made = partial(finished, place, origin, overwrite, partial(_difference, new=origin))
    if (done := made()) is not None:
        return MineReport(Path(out), done, unchanged=True)
    with workspace(place, dear=True) as work, Progress() as progress:
        folder = resumable(work.absolute(), {**origin, "queries": QUERIES})
        job = _Job(model, opened, rule, folder, progress, current())
        job.mine("given" if given else index, device, block)
        target = work / "set"
        target.mkdir()
        applied = {"count": count} if given else {name: v for name, v in asdict(rule).items() if v is not None}
        report = job.write(target, name=printable(place.name), origin=origin, applied=applied)
        if made() is None:  # nobody put a set there meanwhile
            publish(target, place)
    return MineReport(Path(out), report, unchanged=False)


class _Job:
    """One mining; committed blocks lie in `folder`."""

    def __init__(
        self, model: str, opened: PreparedSet, rule: Rule, folder: Path, progress: Progress, executor: Executor
    ) -> None:
        self.model, self.opened, self.rule = model, opened, rule
        self.folder, self.progress, self.executor = folder, progress, executor
        with progress.phase("reading records", opened.splits[SIDE].records) as advance:
            self.candidates: Candidates = survey(opened, advance)
        self.queries, self.passages = len(self.candidates.own_Q), len(self.candidates.passage_rows_P)
        self.search = ""

    def mine(self, index: str, device: str | None, block: int) -> None:
        """Choose the negatives of every query, in files of `QUERIES` queries."""
        chosen = self.folder / "chosen"
        chosen.mkdir(exist_ok=True)
        take = self._taker(index, device, block)
        with self.progress.phase("searching", self.queries) as advance:
            for start in range(0, self.queries, QUERIES):
                query_B = np.arange(start, min(start + QUERIES, self.queries))
                file = chosen / f"{start:010d}.npz"
                if not is_committed(file, len(query_B)):
                    commit(file, take(query_B))
                advance(len(query_B))

    def _taker(self, index: str, device: str | None, block: int) -> Callable[[np.ndarray], Chosen]:
        """The function from query numbers to their negatives."""
        if index == "given":
            self.search = "given by file"
            given = GivenNegatives(Path(self.model), ShardReader(self.opened, SIDE).index.ids, self.candidates)
            return lambda query_B: given.chosen(query_B, self.rule.count)
        nearest = self._nearest(index, device, block)

        def some(query_B: np.ndarray, k: int) -> Chosen:
            found = nearest.search(query_B, self.candidates.own_Q[query_B], k)
            return choose(*found, self.candidates.excluded(query_B), self.passages, self.rule)

        def take(query_B: np.ndarray) -> Chosen:
            k = min(self.passages, self.rule.depth + self.candidates.most_excluded(query_B))
            pieces = np.array_split(query_B, -(-len(query_B) * k // SCORES))
            found = [vars(some(piece_B, k)) for piece_B in pieces]
            return Chosen(**{name: np.concatenate([of_piece[name] for of_piece in found]) for name in found[0]})

        return take

    def _nearest(self, index: str, device: str | None, block: int) -> Nearest:
        if self.model == "bm25":
            from lbr_dist.inference.bm25 import BM25

            self.search = "bm25"
            answers = (text for _, text in texts(self.opened, "answer", self.candidates.passage_rows_P))
            reader = ShardReader(self.opened, SIDE)
            return Lexical(BM25(answers), lambda query: reader.read([query])[0]["question"])
        vectors = partial(
            embed, self.opened, model=self.model, device=device, folder=self.folder, block=block,
            executor=self.executor, progress=self.progress,
        )  # fmt: skip
        queries_QD = vectors("query", np.arange(self.queries))
        passages_PD = vectors("passage", self.candidates.passage_rows_P)
        self.search = kind_for(index, self.queries, self.passages)
        if self.search == "exact":
            return Exact(queries_QD, passages_PD)
        with self.progress.phase("building the index"):
            return Inverted(queries_QD, passages_PD, self.folder / "ivf")

    def write(self, target: Path, *, name: str, origin: dict[str, Any], applied: dict[str, Any]) -> dict[str, Any]:
        """Write set and reports, with the settings that were `applied`, into `target`; returns report.json."""
        files = sorted((self.folder / "chosen").glob("[0-9]*.npz"))
        with (
            (target / "mined.jsonl").open("w", encoding="utf-8") as sink,
            self.progress.phase("writing", self.queries) as advance,
        ):
            notes = Notes(files, example_queries(self.queries), self.candidates, self.opened, sink.write, advance)
            manifest = write_mined(
                self.opened, target, self.candidates, notes.passages(), name=name, source=origin, note=notes.note
            )
        facts = {
            "model": printable(self.model),
            "set": f"{self.opened.name} ({self.opened.fingerprint})",
            "search": self.search,
            "passages": self.passages,
            **applied,
        }
        report = {
            "format": 1,
            "name": name,
            "set": manifest["fingerprint"],
            "mined": {**facts, "counts": notes.counts.as_dict(), "examples": [asdict(e) for e in notes.examples]},
        }
        text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        (target / "report.json").write_text(text, encoding="utf-8")
        (target / "report.md").write_text(markdown(facts, notes.counts, notes.examples), encoding="utf-8")
        return report


def _refuse_search(**settings: float | str | None) -> None:
    """Negatives that a file gives are not searched for.

    Raises:
        UserError: a setting of the search that is not at its default.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(mine).parameters.items()}
    for name, value in settings.items():
        if value != defaults[name]:
            raise UserError(f"--{name} {value}: has no effect on negatives that a file gives; leave it out")


def _rule(count: int, skip: int, depth: int, share: float | None, margin: float | None) -> Rule:
    if count < 1:
        raise UserError(f"--negatives {count}: expected at least 1")
    if skip < 0 or depth < skip + count:
        raise UserError(f"--skip {skip}, --depth {depth}: the window must hold at least --negatives {count} ranks")
    if share is not None and not 0 < share < math.inf:
        raise UserError(f"--share {share}: must be more than 0, and finite")
    if margin is not None and not 0 <= margin < math.inf:
        raise UserError(f"--margin {margin}: must not be negative, and finite")
    return Rule(count, skip, depth, SHARE if share is None and margin is None else share, margin)


def _difference(old: Any, new: dict[str, Any]) -> str:
    """What differs from the input of another set."""
    if not isinstance(old, dict) or "mined" not in old:
        return "not a mined one"
    parts = ["another set"] * (old["set"] != new["set"])
    parts += [f"another {name}" for name in ("model", "settings") if old["mined"][name] != new["mined"][name]]
    return "; ".join(parts) or "an older version of lbr"
