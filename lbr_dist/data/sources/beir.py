"""Queries, a corpus and relevance judgements in the layout of BEIR, a retrieval benchmark's usual form.

    FOLDER/corpus.jsonl       {"_id": "d1", "title": "...", "text": "..."}
    FOLDER/queries.jsonl      {"_id": "q1", "text": "..."}
    FOLDER/qrels/test.tsv     query-id, corpus-id and score, under these names in the first line

Each of the three may be of any format that has fields, compressed or not, and a folder of such files instead of one. A
split is a file (or several, as `test-00000-of-00002.parquet`) in `qrels`.

As a source of `lbr prepare`, a row is a query that the split judges: its relevant documents, best first, are its
answers, and those that were judged and are not relevant (a score of 0 or less) its hard negatives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr_dist.data.remote import is_url
from lbr_dist.data.sources.field_names import listed
from lbr_dist.data.sources.formats import ENDING, format_of
from lbr_dist.data.sources.row_values import RowError, blank, identifier
from lbr_dist.errors import UserError

if TYPE_CHECKING:
    from lbr_dist.data.sources.json_rows import Numbered
    from lbr_dist.data.sources.parts import Part

    Read = Callable[[Part], Numbered]

NUMBERED = re.compile(r"-\d+-of-\d+$")
"""What follows the name of a split in one of several files."""
ID = ("_id", "id")
QUERY = ("query-id", "query_id", "qid")
DOCUMENT = ("corpus-id", "corpus_id", "doc_id", "docid", "pid")
SCORE = ("score", "relevance", "rel")

Judgements = dict[str, dict[str, int]]
"""Query, to document, to score."""


def find_beir(path: str) -> tuple[Path, str] | None:
    """The folder and the split (empty: not named) of `FOLDER` or `FOLDER@SPLIT`; None: it is no benchmark."""
    if is_url(path):
        return None
    for name, split in ((path, ""), path.rpartition("@")[::2]):
        folder = Path(name)
        if name and (folder / "qrels").is_dir() and any(_found(folder, part) for part in ("corpus", "queries")):
            return folder, split
    return None


def find_unjudged(folder: Path) -> Path | None:
    """The corpus of a folder that has queries beside it and no judgements; None: it is no such folder."""
    corpus, queries = _files_of(folder, "corpus"), _files_of(folder, "queries")
    if not corpus or not queries or (folder / "qrels").is_dir():
        return None
    return corpus[0] if corpus[0].parent == folder else corpus[0].parent


def find_files(folder: Path, split: str) -> dict[str, list[Path]]:
    """The files of `corpus`, `queries` and (of the split) `qrels`; `split` may be empty where there is one.

    Raises:
        UserError: one is missing or there twice, or there is no such split.
    """
    splits: dict[str, list[Path]] = {}
    for file in _files_in(folder / "qrels"):
        splits.setdefault(NUMBERED.sub("", file.name[: _ending(file.name)]), []).append(file)
    if not split and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        example = (
            f"name one, for example {folder}@{next(iter(splits))}" if splits else "it needs one, as qrels/test.tsv"
        )
        raise UserError(f"{folder}: has the splits {', '.join(splits) or '(none)'} in qrels: {example}")
    found = {name: _found(folder, name) for name in ("corpus", "queries")} | {"qrels": splits[split]}
    for name, files in found.items():
        if not files:
            raise UserError(f"{folder}: has judgements (qrels) and no {name}: put them beside, as {name}.jsonl")
    return found


def _found(folder: Path, name: str) -> list[Path]:
    files = _files_of(folder, name)
    if len(files) > 1 and files[0].parent == folder:
        raise UserError(f"{folder}: has {' and '.join(file.name for file in files)}: leave one of them")
    return files


def _files_of(folder: Path, name: str) -> list[Path]:
    if (folder / name).is_dir():
        return _files_in(folder / name)
    return [file for file in _files_in(folder, name) if file.name[: _ending(file.name)] == name]


def _files_in(folder: Path, start: str = "") -> list[Path]:
    named = (file for file in folder.iterdir() if file.name.startswith(start) and _ending(file.name) > 0)
    return sorted(file for file in named if file.is_file())


def _ending(name: str) -> int:
    """Where the ending of a source file's name starts; -1: it is none, or hidden."""
    match = None if name.startswith(".") else ENDING.search(name)
    return match.start() if match and match.end() == len(name) and format_of(name) not in ("text", "tar") else -1


def load(part: Part, read: Read, *, every: bool) -> tuple[Judgements, dict[str, str], dict[str, dict[str, str]]]:
    """What a split judges, the texts of its queries, and the judged documents (or `every` one), all by id.

    Raises:
        UserError: an id or a text is missing, there twice or of the wrong type, a judged query or document is not
            there, there are no judgements, or a file is damaged.
    """
    judged = _judgements(part.members["qrels"], read)
    asked = _queries(part.members["queries"], read, judged, part.name)
    return judged, asked, _documents(part.members["corpus"], read, judged, part.name, every=every)


def rows(part: Part, read: Read) -> Numbered:
    """The judged queries of a split as rows with `question`, `answer` and `negatives`.

    Raises:
        UserError: as `load` does.
    """
    judged, asked, texts = load(part, read, every=False)
    for number, (query, scores) in enumerate(judged.items(), 1):
        best_first = sorted(scores, key=lambda name: -scores[name])
        row: dict[str, Any] = {"id": f"{part.path.resolve().name}:{query}", "question": asked[query]}
        row["answer"] = [texts[name] for name in best_first if scores[name] > 0]
        row["negatives"] = [texts[name] for name in best_first if scores[name] <= 0 and any(texts[name].values())]
        yield number, row


def _judgements(parts: Sequence[Part], read: Read) -> Judgements:
    """What the split judges, in the order of its files.

    Raises:
        UserError: a row without an id or with a score that is no whole number, a pair that is judged twice and
            differently, or none at all.
    """
    found: Judgements = {}
    for place, row in _rows(parts, read):
        query, document = _id(row, QUERY, place), _id(row, DOCUMENT, place)
        score = _score(row, place)
        before = found.setdefault(query, {}).setdefault(document, score)
        if before != score:
            raise UserError(f"{place}: query {query}, document {document} has score {score} here and {before} above")
    if not found:
        raise UserError(f"{parts[0].name}: has no judgements")
    return found


def _queries(parts: Sequence[Part], read: Read, judged: Judgements, split: str) -> dict[str, str]:
    """The texts of the judged queries, in the order of the judgements; `split` is where they are, for messages.

    Raises:
        UserError: one is missing, there twice, or empty.
    """
    found: dict[str, str] = {}
    for place, row in _rows(parts, read):
        if (name := _id(row, ID, place)) in judged:
            if blank(row.get("text")) or not isinstance(row["text"], str):
                raise UserError(f"{place}: query {name} has no text (the row has {listed(row)})")
            if name in found:
                raise UserError(f"{place}: a second query of the id {name}")
            found[name] = row["text"]
    for name in judged:
        if name not in found:
            raise UserError(f"{split}: judges query {name}, which is not in {parts[0].name}: add it, or leave that out")
    return {name: found[name] for name in judged}


def _documents(
    parts: Sequence[Part], read: Read, judged: Judgements, split: str, *, every: bool
) -> dict[str, dict[str, str]]:
    """The judged documents, or `every` one, by id: `text` and, where it has one, `title`.

    A document may be empty where it is not relevant to any query, as in some collections.

    Raises:
        UserError: a judged one is missing, one is there twice, or a text is none.
    """
    wanted = {name for scores in judged.values() for name in scores}
    found: dict[str, dict[str, str]] = {}
    for place, row in _rows(parts, read):
        if (name := _id(row, ID, place)) not in wanted and not every:
            continue
        if name in found:
            raise UserError(f"{place}: a second document of the id {name}")
        if "text" not in row:
            raise UserError(f"{place}: document {name} has no text (the row has {listed(row)})")
        found[name] = {key: _text(row.get(key), key, place) for key in ("title", "text")}
    for query, scores in judged.items():
        for name, score in scores.items():
            if name not in found:
                raise UserError(
                    f"{split}: judges document {name} for query {query}, which is not in {parts[0].name}: add it, or "
                    "leave that out"
                )
            if score > 0 and not any(found[name].values()):
                raise UserError(f"{parts[0].name}: document {name} is empty, and relevant to query {query}")
    return found


def _rows(parts: Sequence[Part], read: Read) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for part in parts:
        for number, row in read(part):
            place = f"{part.name}: {part.unit} {number}"
            if isinstance(row, RowError):
                raise UserError(f"{place}: {row.problem}; repair or remove it")
            yield place, row


def _id(row: Mapping[str, Any], names: Sequence[str], place: str) -> str:
    value = next((row[name] for name in names if name in row), None)
    try:
        found = identifier(value)
    except RowError as error:
        raise UserError(f"{place}: {error.detail}") from None
    if found is None:
        header = "; the first line has to name query-id, corpus-id and score" * (names is not ID)
        raise UserError(f"{place}: has no {names[0]} (the row has {listed(row)}){header}")
    return found


def _score(row: Mapping[str, Any], place: str) -> int:
    """1 where the judgements have no scores: those are of relevant documents alone."""
    value = next((row[name] for name in SCORE if name in row), 1)
    try:
        score = float(value)
        if score.is_integer():
            return int(score)
    except (TypeError, ValueError):
        pass
    raise UserError(f"{place}: score {value!r} is not a whole number")


def _text(value: Any, key: str, place: str) -> str:
    if blank(value):
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place}: {key} is not a text")
    return value
