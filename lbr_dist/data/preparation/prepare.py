"""`lbr prepare`: raw files to isolated GL / CL / eval shards, in two passes.

The first pass reads every row once, to a spool of checked records on disk and hashes in memory; the sides are decided
from the hashes; the second pass writes the spool's records in their final order and then reads the shards back to prove
that the sides share nothing. So memory does not grow with the text, and the output depends on the input, the settings
and the seed alone. Nothing is in place until everything is.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr_dist.data.execute import current
from lbr_dist.data.preparation.components import ALIKE, NEAR
from lbr_dist.data.preparation.pipeline import Pipeline, Settings
from lbr_dist.data.preparation.row_blocks import BLOCK_CHARACTERS, BLOCK_ROWS, TOGETHER
from lbr_dist.data.preparation.split import SIDES, parse_sizes, shown_size
from lbr_dist.data.progress import Progress
from lbr_dist.data.publish import check_target, finished, publish, resumable, workspace
from lbr_dist.data.record import exact
from lbr_dist.data.sources.entity import Entity
from lbr_dist.data.sources.field_names import check_fields
from lbr_dist.data.sources.parts import Part, Source, expand
from lbr_dist.disk import mark
from lbr_dist.errors import UserError, printable

if TYPE_CHECKING:
    from lbr_dist.model.tokenizer import Tokenization

VERSION = 14
"""Raised when the same input and settings give other output, so that a second run is not taken for a repetition."""
NOT_GIVEN = "not given"


@dataclass(frozen=True)
class PrepareReport:
    """What a run did; `data` is report.json."""

    out: Path
    data: dict[str, Any]
    unchanged: bool
    """The set was there already, made from the same input and settings: nothing was done."""

    @property
    def lines(self) -> list[str]:
        """A few lines for people."""
        if self.unchanged:
            return [f"{self.out}: up to date (same sources, settings and tokenizer); nothing to do"]
        records, rows = self.data["records"], self.data["rows"]
        sides = ", ".join(f"{side} {records[side]['records']}" for side in SIDES)
        lines = [f"{self.out}: {sides} records, from {rows['read']} rows"]
        for flag, files in (
            ("", self.data["read_as"]["sources"]),
            ("--decontaminate ", self.data["read_as"]["decontaminate"]),
        ):
            lines += [f"{flag}{file['first']}{_more(file['files'] - 1)}: {file['as']}" for file in files]
        lines += [f"bad rows: {entry['count']} {reason} (first: {entry['first']})" for reason, entry in self._bad()]
        lines += [f"dropped: {count} {reason}" for reason, count in self.data["dropped"].items() if count]
        lines += [f"note: {note}" for note in self._notes()]
        if passed := self.data["passed_over"]:
            listed = ", ".join(f"{count} {ending}" for ending, count in passed.items())
            hint = " (a .json file is read if it is named, or a quoted glob matches it)" * (".json" in passed)
            most = sum(passed.values()) > sum(file["files"] for file in self.data["read_as"]["sources"])
            told = f"{'warning' if most else 'note'}: passed over in folders: {listed}{hint}"
            lines.insert(0 if most else len(lines), told)
        lines.append("isolation: no shared question, answer or near-duplicate between sides (report.json)")
        return lines

    def _notes(self) -> Iterator[str]:
        if empty := self.data["empty_sources"]:
            yield f"sources without a row: {len(empty)} (first: {empty[0]})"
        for side, found in self.data.get("short_sides", {}).items():
            yield (
                f"{side} has {found['records']} of the {found['asked_for']} records asked for: the largest group of "
                f"records that belong together has {found['largest_component']} of {found['of']}"
            )
        found = self.data["components"]
        if link := found["largest_linked_by"]:
            yield (
                f"the largest group of records that belong together has {found['largest']} of {found['of']}, most of "
                f"them linked by {link}" + f": {ALIKE}" * (link == NEAR)
            )
        if common := self.data["isolation"]["shared_common_texts"]:
            first = f"{printable(common[0]['text'])!r}, in {common[0]['records']} records"
            yield f"short answers too common to link records, so perhaps on two sides: {len(common)} (first: {first})"
        if alone := self.data["components"]["without_entity"]:
            yield f"{alone} question-answer records have no --entity and stand alone"
        if questions := self.data["decontaminate"]["by_question_alone"]:
            yield f"{questions} --decontaminate rows have no usable answer: their question alone counts"

    def _bad(self) -> list[tuple[str, dict[str, Any]]]:
        return list(self.data["rows"]["bad"]["by_reason"].items())


def prepare(
    sources: Sequence[str | Source],
    out: str | Path,
    *,
    tokenizer: str | Tokenization,
    kind: str | None = None,
    fields: Mapping[str, str] | None = None,
    sizes: Mapping[str, str | int | float] | None = None,
    entity: str | None = None,
    decontaminate: Sequence[str | Source] = (),
    paragraphs: bool = False,
    similarity: float = 0.7,
    max_chars: int = 100_000,
    max_bad_share: float = 0.01,
    domain: str = "",
    name: str | None = None,
    seed: int = 0,
    shard_records: int = 8192,
    shard_mib: float = 256,
    overwrite: bool = False,
) -> PrepareReport:
    """Turn source files into a prepared set.

    Args:
        sources: files, folders, globs, addresses, saved data sets (`FOLDER[@SPLIT]`) or hub ones
            (`hub:NAME[:CONFIG][@SPLIT]`); `KIND=PATH` gives one a kind of its own.
        out: folder to make.
        tokenizer: folder or name of the model whose tokenizer the token counts are for.
        kind: one of `field_names.KINDS`; None: recognised from the fields of each file.
        fields: role to field name, for fields whose names are not recognised (`{"question": "prompt"}`).
        sizes: "gl", "cl", "eval" to a count ("5000"), a share ("0.2") of the question-answer records, or "rest";
            None: eval 0.05, cl 0.25, gl the rest. Plain texts always go to gl.
        entity: `FIELD` or `FIELD~REGEX`: rows of the same group share a side.
        decontaminate: evaluation sets from elsewhere; training records connected to them are dropped. `kind` says
            nothing of them: a corpus is often cleaned of questions.
        paragraphs: plain-text files hold documents separated by blank lines, not one per line.
        similarity: estimated Jaccard similarity (word shingles) from which texts are near-duplicates, 0.5 to 1.
        max_chars: longest field in characters; longer ones are bad rows.
        max_bad_share: more bad rows than this share stop the run.
        domain: for records that name none.
        name: of the set, for tables; default: the folder's name.
        seed: of the order and of the choice of sides.
        shard_records, shard_mib: bounds of one shard.
        overwrite: replace a set made from other input.

    Raises:
        UserError: bad sources, settings or rows, a source that is changed while it is read, an `out` that holds
            something else, or a full disk.
    """
    from lbr_dist.model.tokenizer import Tokenization

    check_fields(fields or {})
    _check_bounds(similarity, shard_records, shard_mib, max_chars, max_bad_share)
    if not sources:
        raise UserError("no sources: name at least one file, folder, glob or data set")
    if entity is not None:
        Entity.parse(entity)
    place = check_target(Path(out))
    settings = Settings(
        parse_sizes(sizes or {}), entity, paragraphs, similarity, max_chars, max_bad_share, exact(printable(domain)),
        printable(name or place.name), seed, shard_records, shard_mib,
    )  # fmt: skip
    tokens = Tokenization.load(tokenizer) if isinstance(tokenizer, str) else tokenizer
    with workspace(place) as work, Progress() as progress:
        passed_over = Counter[str]()
        parts = _parts(sources, kind, fields or {}, work, passed_over)
        outside = _parts(decontaminate, None, fields or {}, work, passed_over)
        if paragraphs and not any(part.format == "text" for part in (*parts, *outside)):
            raise UserError("--paragraphs: has no effect, for no source is plain text (.txt); leave it out")
        before = _states((*parts, *outside))
        with progress.phase("fingerprinting sources", len(parts) + len(outside)) as advance:
            origin: dict[str, Any] = {"version": VERSION, "tokenizer": tokens.fingerprint, "settings": asdict(settings)}
            origin["sources"], origin["decontaminate"] = _sorted(parts, advance), _sorted(outside, advance)
        made = partial(finished, place, origin, overwrite, partial(_difference, new=origin))
        if (done := made()) is not None:
            return PrepareReport(Path(out), done, unchanged=True)
        folder = resumable(work.absolute(), {**origin, "blocks": [BLOCK_ROWS, BLOCK_CHARACTERS, TOGETHER]})
        pipeline = Pipeline(folder, settings, tokens, origin, progress, current())
        report = pipeline.run(parts, outside, passed_over, partial(_check_unchanged, before))
        if made() is None:  # nobody put a set there meanwhile
            publish(folder / "set", place)
    return PrepareReport(Path(out), report, unchanged=False)


def _check_bounds(
    similarity: float, shard_records: int, shard_mib: float, max_chars: int, max_bad_share: float
) -> None:
    if not 0.5 <= similarity <= 1:
        raise UserError(f"--similarity {similarity}: must lie between 0.5 and 1")
    for flag, bound in (("shard-records", shard_records), ("shard-mib", shard_mib), ("max-chars", max_chars)):
        if not 0 < bound < math.inf:
            raise UserError(f"--{flag} {bound}: must be a number of more than 0")
    if not 0 <= max_bad_share <= 1:
        raise UserError(f"--max-bad-share {max_bad_share}: must lie between 0 and 1")


def _more(count: int) -> str:
    return f" and {count} more" * bool(count)


def _parts(
    sources: Sequence[str | Source],
    kind: str | None,
    fields: Mapping[str, str],
    work: Path,
    passed_over: Counter[str],
) -> list[Part]:
    downloads = work / "downloads"
    downloads.mkdir(exist_ok=True)
    parts = []
    for source in sources:
        named = source if isinstance(source, Source) else Source.parse(source, kind, fields)
        parts += expand(named, downloads, passed_over)
    return parts


def _sorted(parts: list[Part], advance: Callable[[int], None]) -> list[Any]:
    """Put parts into the order of their fingerprints, which are returned: of equal rows the first file's stays."""
    known = []
    for part in parts:
        known.append((part.fingerprint(), part))
        advance(1)
    known.sort(key=lambda pair: json.dumps(pair[0], sort_keys=True))
    parts[:] = [part for _, part in known]
    return [fingerprint for fingerprint, _ in known]


def _states(parts: Iterable[Part]) -> dict[Path, tuple[str, tuple[int, int] | None]]:
    """Name, and size and time of the last change, of every file that is read; None where there is none."""
    found = {}
    for part in parts:
        files = [(member.name, member.path) for members in part.members.values() for member in members]
        if part.dataset is not None:
            files = [(part.name, Path(entry["filename"])) for entry in part.dataset.cache_files]
        for name, file in files or [(part.name, part.path)]:
            found[file] = name, mark(file)
    return found


def _check_unchanged(before: Mapping[Path, tuple[str, tuple[int, int] | None]]) -> None:
    """See that what was read is what was fingerprinted.

    Raises:
        UserError: a file was changed, replaced or removed meanwhile.
    """
    for file, (name, state) in before.items():
        if mark(file) != state:
            raise UserError(f"{name}: was changed while it was read; prepare it again when nothing writes it")


def _difference(old: Any, new: dict[str, Any]) -> str:
    """Which parts of the input differ."""
    if not isinstance(old, dict):
        return "made without lbr prepare"
    parts = [name for name in ("sources", "decontaminate", "tokenizer") if old.get(name) != new[name]]
    before, after = _flags(old.get("settings", {})), _flags(new["settings"])
    parts += [
        f"--{flag} was {before.get(flag, NOT_GIVEN)}, is {value}"
        for flag, value in after.items()
        if before.get(flag, NOT_GIVEN) != value
    ]
    return "; ".join(parts) or "an older version of lbr"


def _flags(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings by their flags, as the user gives them."""
    found = {side: shown_size(size) for side, size in settings.get("sizes", {}).items()}
    for name, value in settings.items():
        if isinstance(value, bool):
            found[name] = "on" if value else "off"
        elif name != "sizes":
            found[name.replace("_", "-")] = NOT_GIVEN if value in (None, "") else str(value)
    return found
