"""Texts with ids out of JSONL, Parquet or plain text files, one row at a time, for encode and search."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lbr_dist.errors import UserError

FIELDS = {
    "query": ("question", "query", "text"),
    "passage": ("answer", "text", "passage", "document"),
}
"""Fields tried in order where the user names none."""


def read_texts(source: Path, side: str, field: str | None = None) -> Iterator[tuple[str, str]]:
    """(id, text) of every row; the id is the row's `id`, else its number from 0.

    The first row is read at once, so that a missing file or field is known before anything else is done.

    Raises:
        UserError: no such file, an unknown ending, no such field, or (while iterating) a row without a text.
    """
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    rows = _rows(source)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{source}: has no rows")
    chosen = _choose(first[1], side, field, source)
    return _texts(first, rows, chosen, source)


def _texts(
    first: tuple[str, dict[str, Any]], rows: Iterator[tuple[str, dict[str, Any]]], field: str, source: Path
) -> Iterator[tuple[str, str]]:
    number, item = 0, first
    while item is not None:
        place, row = item
        text = row.get(field)
        if not isinstance(text, str):
            what = "missing" if field not in row else f"a {type(text).__name__}, not a text"
            raise UserError(f"{source}: {place}: field {field!r} is {what}; repair the row, or name another --field")
        yield str(row.get("id", number)), text
        number += 1
        following = next(rows, None)
        if following is None:
            return
        item = following


def _choose(row: dict[str, Any], side: str, field: str | None, source: Path) -> str:
    tried = (field,) if field is not None else FIELDS[side]
    for name in tried:
        if name in row:
            return name
    raise UserError(
        f"{source}: no field {' or '.join(repr(name) for name in tried)} in its first row, which has "
        f"{', '.join(map(repr, row))}; name one with --field"
    )


def _rows(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row; the place is for messages."""
    name = source.name.lower()
    if name.endswith(".parquet"):
        return _parquet(source)
    plain = name.removesuffix(".gz").removesuffix(".zst")
    if plain.endswith((".jsonl", ".json", ".ndjson")):
        return _jsonl(source)
    if plain.endswith(".txt"):
        return _lines(source)
    raise UserError(f"{source}: unknown kind of file; expected .jsonl or .txt (also .gz, .zst), or .parquet")


def _parquet(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(source).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{source}: cannot be read as Parquet ({' '.join(str(error).split())[:120]})") from None


def _jsonl(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, line in _numbered(source):
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{source}: {place}: not JSON; every line must be one JSON object") from None
        if not isinstance(row, dict):
            raise UserError(f"{source}: {place}: a {type(row).__name__}; every line must be one JSON object")
        yield place, row


def _lines(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, line in _numbered(source):
        yield place, {"text": line.rstrip("\n")}


def _numbered(source: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank."""
    try:
        with _open(source) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"line {number}", line
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 ({error.reason})") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{source}: cannot be read ({error})") from None


def _open(source: Path) -> IO[str]:
    if source.name.endswith(".gz"):
        return gzip.open(source, "rt", encoding="utf-8")
    if source.name.endswith(".zst"):
        import zstandard

        return io.TextIOWrapper(zstandard.open(source, "rb"), encoding="utf-8")
    return source.open(encoding="utf-8")
