"""`lbr encode`: a file of texts to a Parquet file of vectors, in bounded memory, and resumable.

The input is embedded in blocks (see text_blocks.py), each of which becomes a part in a folder beside the output. At
the end the parts become one file, which appears by a rename: an output that exists is complete.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import xxhash

from lbr_dist.data.execute import current
from lbr_dist.data.progress import bar
from lbr_dist.disk import locked, replacing, room, sync
from lbr_dist.errors import UserError
from lbr_dist.inference.rows import read_texts
from lbr_dist.inference.text_blocks import BLOCK_CHARACTERS, BLOCK_TEXTS, EncodeBlock, TextBlock, part_file, text_blocks

if TYPE_CHECKING:
    from lbr_dist.inference.encoder import Side

OTHER_ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".npy", ".npz", ".arrow", ".feather", ".gz", ".zst")
"""What a reader would not open as Parquet."""
VERSION = 7
"""Raised when the same input and settings give other blocks, ids or texts: parts of two versions are not joined."""


@dataclass(frozen=True)
class EncodeReport:
    """What was done: texts in the output, texts taken over from an earlier attempt, texts cut, width of a vector."""

    texts: int
    resumed: int
    cut: int
    width: int


def encode_file(
    model: str,
    source: str | Path,
    out: str | Path,
    *,
    side: Side = "passage",
    field: str | None = None,
    device: str | None = None,
    block: int = BLOCK_TEXTS,
) -> EncodeReport:
    """Embed every row of a file.

    Args:
        model: as in `lbr_dist.inference.loading.load_encoder`.
        source: a file that `lbr prepare` reads: JSONL, CSV, Parquet, text (a text per line) ..., also compressed.
        out: Parquet file to make, with the columns `id` (the row's own, or its number) and `embedding` (float32 list of
            fixed size, unit length), in the order of the input.
        side: query or passage: which instruction the texts get.
        field: field that holds the text, named as in `read_texts`; default: by side the question, or the answer or
            text, that `lbr prepare` reads in the row.
        device: default: CUDA where there is one.
        block: texts in a part.

    Raises:
        UserError: no such file or field, a damaged file, a row without a text (its line is named), an input that is
            changed while it is read, an `out` that has the ending of another format, exists or is being written by
            another process or lies in the model's own folder, parts beside it of another input, model or setting, or a
            full disk (finished parts are kept for the next attempt).
    """
    from lbr_dist.inference.loading import check_output, model_fingerprint, pinned

    source, out = Path(source), Path(out)
    if out.suffix.lower() in OTHER_ENDINGS:
        raise UserError(f"encode: {out}: what is written is Parquet; name it {out.with_suffix('.parquet').name}")
    _check_absent(out)
    check_output(model, out)
    read_texts(source, side, field)
    model = pinned(model)  # a run in training may have another checkpoint by the next block
    job = {
        "version": VERSION,
        "model": model_fingerprint(model),
        "input": _fingerprint(source),
        "side": side,
        "field": field,
        "block": [block, BLOCK_CHARACTERS],
    }
    resumed = total = count = cut = 0
    with _open_parts(out, job) as parts, bar(f"encoding {source.name}", None) as advance:
        read = partial(_blocks, side=side, field=field, parts=parts, most=block)
        work = EncodeBlock(model, side, parts, device)
        for done in current().stream([source.absolute()], read, work, model=True):
            resumed += done.texts * done.resumed
            total, count, cut = total + done.texts, count + 1, cut + done.cut
            advance(done.texts)
        if _fingerprint(source) != job["input"]:
            shutil.rmtree(parts)
            raise UserError(f"{source}: was changed while it was read; encode it again")
        width = _join([part_file(parts, number) for number in range(1, count + 1)], parts / "joined.tmp", out)
    return EncodeReport(total, resumed, cut, width)


def _blocks(source: Path, *, side: Side, field: str | None, parts: Path, most: int) -> Iterator[TextBlock]:
    return text_blocks(read_texts(source, side, field), parts, most)


def _check_absent(out: Path) -> None:
    try:
        if out.exists():
            raise UserError(f"encode: {out} exists already; remove it, or name another file")
    except OSError as error:
        raise UserError(f"encode: {out} cannot be made ({error.strerror}); name another file") from None


@contextlib.contextmanager
def _open_parts(out: Path, job: dict[str, Any]) -> Iterator[Path]:
    """The folder of parts, of this job and for this process alone; removed at the end, or where it holds no part."""
    parts = out.absolute().with_name(f"{out.name}.parts")
    with contextlib.ExitStack() as held:
        try:
            parts.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(parts, f"encode: {parts}"))
            held.callback(_remove_unless_begun, parts)
            _check_absent(out)  # another process may have finished it since
            _check_job(parts, job, out)
        except OSError as error:
            raise UserError(f"encode: {parts}: cannot be written ({error.strerror}); name another output") from None
        with room(f"encode: {out}", f"free space and repeat the command: finished parts, if any, are kept in {parts}"):
            yield parts
        shutil.rmtree(parts, ignore_errors=True)


def _check_job(parts: Path, job: dict[str, Any], out: Path) -> None:
    """Take the folder for `job`, or check that the parts in it are of the same one."""
    description = parts / "job.json"
    if _finished(parts):
        try:
            known = json.loads(description.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = None
        if not isinstance(known, dict):
            raise UserError(
                f"encode: {description} is missing or cannot be read, and nothing else tells what the parts are of: "
                f"remove {parts} to start {out.name} anew"
            )
        changed = [name for name in job if known.get(name) != job[name]]
        if changed:
            raise UserError(
                f"encode: {parts} holds an unfinished run with another {' and '.join(changed)}; remove that folder to "
                f"start {out.name} anew, or repeat the earlier command to finish it"
            )
        return
    with replacing(description) as temporary:
        temporary.write_text(json.dumps(job), encoding="utf-8")


def _remove_unless_begun(parts: Path) -> None:
    if not _finished(parts):
        shutil.rmtree(parts, ignore_errors=True)


def _finished(parts: Path) -> list[Path]:
    return list(parts.glob("[0-9]*.parquet"))


def _join(parts: list[Path], temporary: Path, out: Path) -> int:
    """One file of all parts, a row group each; returns the width of a vector."""
    schema = pq.read_schema(parts[0]).remove_metadata()
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            for part in parts:
                writer.write_table(pq.read_table(part))
        sync(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(out)
    sync(out.parent)  # the parts go next
    return schema.field("embedding").type.list_size


def _fingerprint(source: Path) -> str:
    """Size, time and both ends of a file: a different input is found without reading it twice."""
    status = source.stat()
    digest = xxhash.xxh3_128(f"{status.st_size} {status.st_mtime_ns}".encode())
    with source.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, status.st_size - (1 << 20)))
        digest.update(file.read(1 << 20))
    return digest.hexdigest()
