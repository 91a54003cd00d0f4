"""Rows of one file, one at a time, with the number that names each in a message.

Every format becomes plain dicts here, so that everything after knows one form. Nothing is unpickled: of a tar only JSON
and text members are read. A row that cannot be decoded is handed on as a `RowError`, to be counted; a file that cannot
be read at all stops the run.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from lbr_dist.data.row_values import RowError
from lbr_dist.data.sources import ENDING, Part
from lbr_dist.errors import UserError

BATCH = 1000
"""Rows decoded at once from columnar formats."""
ARRAYS = ("data", "rows", "examples", "records", "items")
"""Names under which a JSON file's object may hold its array of rows."""
SEPARATORS = ";\t|"
"""Taken for the comma of a CSV file (or the tab of a TSV file) whose header has none."""
FOREIGN = {
    b"\xff\xfe": "is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "is compressed with gzip: let its name end in .gz",
    b"\x28\xb5": "is compressed with zstd: let its name end in .zst",
}
"""First bytes of a text file that is none."""

Row = Mapping[str, Any] | RowError
Numbered = Iterator[tuple[int, Row]]
"""Rows, or what is wrong with them, each with its line, row or sample number (from 1)."""


def rows(part: Part, *, paragraphs: bool = False) -> Numbered:
    """Rows of a part.

    Args:
        paragraphs: plain text holds documents separated by blank lines; otherwise one document per line.

    Raises:
        UserError: the file is damaged.
    """
    if part.format == "text" and part.source.kind not in (None, "corpus"):
        raise UserError(f"{part.name}: plain text has no fields, so it cannot be of kind {part.source.kind}")
    try:
        if part.dataset is not None:
            yield from _columns(part.dataset.iter(BATCH))
        elif part.format == "parquet":
            yield from _parquet(part.path)
        elif part.format == "tar":
            yield from _tar(part)
        else:
            with _open(part) as file:
                if (start := file.peek(2)[:2]) in FOREIGN:  # type: ignore[attr-defined]
                    raise UserError(f"{part.name}: the content {FOREIGN[start]}")
                if part.format == "jsonl":
                    yield from _jsonl(file)
                elif part.format == "json":
                    yield from _json(file)
                elif part.format == "text":
                    yield from _paragraphs(file) if paragraphs else _lines(file)
                else:
                    yield from _csv(file, "\t" if part.format == "tsv" else ",")
    except _damage() as error:
        raise UserError(f"{part.name}: damaged or not a {part.format} file ({error})") from error


def _open(part: Part) -> IO[bytes]:
    compression = ENDING.findall(part.name)[-1][1]
    if compression == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.open(part.path, "rb"), 1 << 20)
    if compression == ".gz":
        return cast(IO[bytes], gzip.open(part.path, "rb"))
    if compression == ".bz2":
        return bz2.open(part.path, "rb")
    if compression == ".xz":
        return lzma.open(part.path, "rb")
    return part.path.open("rb", buffering=1 << 20)


def _damage() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    import zstandard

    compression = zlib.error, lzma.LZMAError, zstandard.ZstdError
    return EOFError, OSError, tarfile.TarError, csv.Error, ValueError, *compression


def _jsonl(file: IO[bytes]) -> Numbered:
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        yield number, _json_object(line)


def _json(file: IO[bytes]) -> Numbered:
    """An array of objects, or one under a name of `ARRAYS`, held in memory; else JSON lines, as many named so do."""
    lines = (start for line in file if (start := line.removeprefix(b"\xef\xbb\xbf").strip()))
    first, alone = next(lines, b""), next(lines, None) is None
    file.seek(0)
    items: Any = None
    if first[:1] == b"[":
        items = json.loads(file.read().decode("utf-8-sig"))
    elif first[:1] == b"{" and (alone or isinstance(_json_object(first), RowError)):  # one object, over lines or not?
        row = _json_object(file.read())
        file.seek(0)
        if not isinstance(row, RowError):
            items = next((row[name] for name in ARRAYS if isinstance(row.get(name), list)), [row])
    if items is None:
        yield from _jsonl(file)
        return
    for number, item in enumerate(items, 1):
        yield number, item if isinstance(item, dict) else RowError("wrong_type", "the item is not a JSON object")


def _json_object(data: bytes) -> Row:
    try:
        row = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError("invalid_utf8", f"byte {error.start}")
    except (ValueError, RecursionError) as error:
        return RowError("invalid_json", str(error))
    return row if isinstance(row, dict) else RowError("wrong_type", "the line is not a JSON object")


def _decoded(data: bytes) -> Row:
    try:
        return {"text": data.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return RowError("invalid_utf8", f"byte {error.start}")


def _lines(file: IO[bytes]) -> Numbered:
    for number, line in enumerate(file, 1):
        if not line.isspace():
            yield number, _decoded(line.rstrip(b"\r\n"))


def _paragraphs(file: IO[bytes]) -> Numbered:
    first, block = 1, b""
    for number, line in enumerate(file, 1):
        if not line.isspace():
            if not block:
                first = number
            block += line
        elif block:
            yield first, _decoded(block.rstrip())
            block = b""
    if block:
        yield first, _decoded(block.rstrip())


def _csv(file: IO[bytes], delimiter: str) -> Numbered:
    csv.field_size_limit(1 << 30)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    header = file.peek(1 << 16).split(b"\n", 1)[0].decode("utf-8", "replace")  # type: ignore[attr-defined]
    if delimiter not in header:
        delimiter = next((other for other in SEPARATORS if other in header), delimiter)
    reader = csv.DictReader(text, delimiter=delimiter)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    for row in reader:
        if None in row:
            yield reader.line_num, RowError("wrong_type", "the line has more cells than the header")
        else:
            yield reader.line_num, {name: cell for name, cell in row.items() if cell is not None}


def _parquet(path: Path) -> Numbered:
    import pyarrow.parquet as pq

    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _columns(batches: Iterator[Mapping[str, list[Any]]]) -> Numbered:
    number = 0
    for batch in batches:
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield number, dict(zip(batch, values, strict=True))


def _tar(part: Part) -> Numbered:
    """Samples: neighbouring members with the same name up to the first dot, as WebDataset groups them.

    A `.json` member gives fields, `.txt` gives `text`, and `question.txt` a field of that name.
    """
    number, key = 0, ""
    row: Row | None = None
    with tarfile.open(part.path, "r|*") as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if extension.rpartition(".")[2] not in ("json", "txt"):
                continue
            if folder + slash + stem != key:
                if row is not None:
                    yield number, row
                number, key, row = number + 1, folder + slash + stem, {}
            file = tar.extractfile(member)
            assert file is not None
            row = _join(row, _member(file.read(), extension))
    if row is not None:
        yield number, row


def _member(data: bytes, extension: str) -> Row:
    field_name, _, last = extension.rpartition(".")
    if last == "json":
        return _json_object(data)
    text = _decoded(data)
    return text if isinstance(text, RowError) else {field_name or "text": text["text"]}


def _join(row: Row | None, more: Row) -> Row:
    if row is None or isinstance(row, RowError):
        return row if row is not None else more
    return more if isinstance(more, RowError) else {**row, **more}
