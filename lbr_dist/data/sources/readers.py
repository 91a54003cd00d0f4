"""Rows of one file, one at a time, with the number that names each in a message.

Every format becomes plain dicts here, so that everything after knows one form. Nothing is unpickled: of a tar only JSON
and text members are read. A row that cannot be decoded is handed on as a `RowError`, to be counted; a file that cannot
be read at all stops the run.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

from lbr_dist.data.sources import beir, compressed
from lbr_dist.data.sources.arrow_rows import BATCH, arrow_rows, parquet_rows
from lbr_dist.data.sources.csv_rows import csv_rows
from lbr_dist.data.sources.field_names import composed
from lbr_dist.data.sources.json_rows import Numbered, Row, is_line, json_lines, json_object, json_rows
from lbr_dist.data.sources.parts import Part
from lbr_dist.data.sources.row_values import CONVERT, RowError, unseen
from lbr_dist.errors import UserError

FOREIGN = {
    b"\xff\xfe\0\0": "is UTF-32: convert it to UTF-8 (iconv -f UTF-32 -t UTF-8)",
    b"\xff\xfe": "is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "is compressed with gzip: let its name end in .gz",
    b"\x28\xb5": "is compressed with zstd: let its name end in .zst",
    b"BZh91AY&SY": "is compressed with bzip2: let its name end in .bz2",
    b"\xfd7zXZ": "is compressed with xz: let its name end in .xz",
    b"PK\x03\x04": "is a zip archive, as Excel's files are too: unpack it, or save its sheet as CSV",
    b"PAR1\x15": "is Parquet: let its name end in .parquet",
    b"ARROW1\0\0": "is an Arrow file (Feather): save it as Parquet",
    b"SQLite format 3\0": "is an SQLite database: export its table as CSV",
    b"%PDF-": "is a PDF: export its text",
}
"""First bytes of a text file that is none."""
WIDE = ((0, 1, "UTF-16BE"), (1, 0, "UTF-16LE"))
"""Of two bytes of a text without a byte order mark: the one that is null, the one that is not, and the encoding."""
START = 1 << 16
"""Most bytes of a text file that tell how its lines end."""
FIRST = 3
"""Lines of a plain text that tell whether it is one."""
HEAD = 64
"""Bytes of a line that mostly tell whether it is blank."""
LONGEST = 1 << 28
"""Bytes of the longest block of text."""
TOO_LONG = (
    f"a block of more than {LONGEST >> 20} MiB: are there no blank lines? Without --paragraphs a line is a document"
)
WIDE_WINDOW = "requires too much memory"
"""What zstd says of a frame whose window is larger than it takes unasked."""
POINTER = b"version https://git-lfs"
"""First bytes of what a clone without Git LFS holds instead of a file."""

DAMAGE: tuple[type[Exception], ...] = (
    *compressed.DAMAGE,
    tarfile.TarError,
    ValueError,
    OverflowError,
    RecursionError,
)
"""What reading a damaged file raises."""


def rows(part: Part, *, paragraphs: bool = False) -> Numbered:
    """Rows of a part, the names of their fields in Unicode's NFC.

    Args:
        paragraphs: plain text holds documents separated by blank lines; otherwise one document per line.

    Raises:
        UserError: the file is damaged.
    """
    if part.format == "text" and part.source.kind not in (None, "corpus"):
        raise UserError(f"{part.name}: plain text has no fields, so it cannot be of kind {part.source.kind}")
    if part.format == "beir":
        yield from beir.rows(part, rows)
        return
    for place, row in _rows(part, paragraphs):
        yield place, row if isinstance(row, RowError) else composed(row)


def _rows(part: Part, paragraphs: bool) -> Numbered:
    try:
        _refuse_pointer(part)
        if part.dataset is not None:
            yield from arrow_rows(part.dataset.with_format("arrow").iter(BATCH))  # nothing hidden, no image decoded
        elif part.format == "parquet":
            yield from parquet_rows(part.path)
        elif part.format == "tar":
            yield from _tar(part)
        else:
            with part.open() as file:
                start = file.peek(START)[:START]  # type: ignore[attr-defined]
                if foreign := _foreign(start[:32]) or _old(start, part.format):
                    if foreign.startswith("is compressed") and part.compression:
                        foreign = "is compressed twice: decompress it once"
                    raise UserError(f"{part.name}: the content {foreign}")
                if part.format == "jsonl":
                    yield from json_lines(file)
                elif part.format == "json":
                    yield from json_rows(part)
                elif part.format == "text":
                    first = list(islice(file, FIRST))
                    _refuse_json(part, first)
                    lines = chain(first, file)
                    yield from _paragraphs(lines) if paragraphs else _lines(lines)
                else:
                    yield from csv_rows(file, "\t" if part.format == "tsv" else ",")
    except DAMAGE as error:
        if WIDE_WINDOW in str(error):
            raise UserError(
                f"{part.name}: was compressed with a window of more than 128 MiB (zstd --long=28 and more): decompress "
                "it (zstd -d --long=31), or compress it anew without --long"
            ) from error
        raise UserError(f"{part.name}: damaged or not a {part.format} file ({error})") from error


def _foreign(start: bytes) -> str | None:
    """What a text file is instead of UTF-8, by its first bytes."""
    if found := next((what for magic, what in FOREIGN.items() if start.startswith(magic)), None):
        return found
    for null, other, name in WIDE:  # as Windows writes it without a mark, each byte and null would be a character
        if len(start) > 3 and not any(start[null::2]) and all(start[other::2]):
            return f"is {name}: convert it to UTF-8 (iconv -f {name} -t UTF-8)"
    return None


def _old(start: bytes, form: str) -> str | None:
    """What is wrong with the ends of lines: by carriage returns alone, a file of texts would be one text."""
    if form in ("text", "jsonl") and b"\r" in start.rstrip(b"\r") and b"\n" not in start:
        return "has lines that end in carriage returns alone, as old Macs wrote them: convert it (tr '\\r' '\\n')"
    return None


def _refuse_pointer(part: Part) -> None:
    if part.dataset is None:
        with part.path.open("rb") as raw:
            if raw.read(len(POINTER)) == POINTER:
                raise UserError(f"{part.name}: is a pointer to a file in Git LFS: fetch the file (git lfs pull)")


def _refuse_json(part: Part, first: list[bytes]) -> None:
    """See that the first lines of a plain text are no JSON lines: their braces and names would be texts to learn."""
    seen = [line for line in first if not line.isspace()]
    if seen and all(map(is_line, seen)):
        raise UserError(f"{part.name}: holds JSON lines: let its name end in .jsonl, so that its fields are read")


def _decoded(data: bytes) -> Row:
    try:
        return {"text": data.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return RowError("invalid_utf8", f"byte {error.start}{CONVERT}")


def _blank(line: bytes) -> bool:
    """Whether nothing is seen of a line: in HTML U+00A0 stands on those between paragraphs, in Chinese U+3000."""
    if line.isascii():
        return line.isspace()
    return unseen(line[:HEAD].decode("utf-8", "ignore")) and unseen(line.decode("utf-8", "replace"))


def _lines(file: Iterable[bytes]) -> Numbered:
    for number, line in enumerate(file, 1):
        if not _blank(line):
            yield number, _decoded(line.rstrip(b"\r\n"))


def _paragraphs(file: Iterable[bytes]) -> Numbered:
    first, size, block = 0, 0, list[bytes]()
    for number, line in enumerate(chain(file, (b"\n",)), 1):
        if not _blank(line):
            first = first or number
            size += len(line)
            if size <= LONGEST:
                block.append(line)
        elif first:
            yield first, _decoded(b"".join(block).rstrip()) if size <= LONGEST else RowError("too_long", TOO_LONG)
            first, size = 0, 0
            block.clear()


class _Member(tarfile.TarInfo):
    """A member of a tar in which only its end mark ends the archive: tarfile takes damage and truncation for it too."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            what = "its end mark is missing: it was cut short" if isinstance(error, _CUT) else error
            raise tarfile.ReadError(f"{what}, at byte {tarfile_.offset}") from None


_CUT = (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError)  # type: ignore[attr-defined]


def _tar(part: Part) -> Numbered:
    """Samples: neighbouring members with the same name up to the first dot, as WebDataset groups them.

    A `.json` member gives fields, `.txt` gives `text`, and `question.txt` a field of that name. Hidden members are left
    aside: macOS adds one to each file.
    """
    number, key, other = 0, "", ""
    row: Row | None = None
    with part.open() as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if not stem or extension.rpartition(".")[2].lower() not in ("json", "txt"):
                other = other or member.name * bool(stem)
                continue
            if folder + slash + stem != key:
                if row is not None:
                    yield number, row
                number, key, row = number + 1, folder + slash + stem, {}
            content = tar.extractfile(member)
            assert content is not None
            row = _join(row, _member(content.read(), extension), member.name)
        assert tar.fileobj is not None
        while padding := tar.fileobj.read(1 << 20):  # to the end of the file, where a checksum is
            if padding.strip(b"\0"):
                raise tarfile.ReadError(
                    f"more than zeros follows its end mark, at byte {tar.offset}: were tars joined with cat? name each"
                )
    if row is not None:
        yield number, row
    elif other:
        raise UserError(
            f"{part.name}: no member is a .json or .txt file (one is {other}): unpack it, and name the folder"
        )


def _member(data: bytes, extension: str) -> Row:
    field_name, _, last = extension.rpartition(".")
    if last.lower() == "json":
        return json_object(data)
    text = _decoded(data)
    return text if isinstance(text, RowError) else {field_name or "text": text["text"]}


def _join(row: Row | None, more: Row, name: str) -> Row:
    """The sample with its member `name`."""
    if row is None or isinstance(row, RowError):
        return row if row is not None else more
    if isinstance(more, RowError):
        return more
    if twice := [key for key in more if key in row and not _same(row[key], more[key])]:
        return RowError(
            "wrong_type",
            f"{name} has another {twice[0]} than the members before it, which are of the same sample, as its name ends "
            "at its first dot: rename them, or unpack the tar and name the folder",
        )
    return {**row, **more}


def _same(a: Any, b: Any) -> bool:
    return a == b or (isinstance(a, str) and isinstance(b, str) and a.strip() == b.strip())
