"""`lbr encode`: a file of texts to a Parquet file of vectors, in bounded memory, and resumable.

The input is embedded in blocks (see blocks.py), each of which becomes a part in a folder beside the output. At the end
the parts become one file, which appears by a rename: an output that exists is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import xxhash

from lbr_dist.blocks import BLOCK_TEXTS, EncodeBlock, TextBlock, part_file, text_blocks
from lbr_dist.data.execute import Executor, current
from lbr_dist.errors import UserError
from lbr_dist.rows import read_texts

if TYPE_CHECKING:
    from lbr_dist.evaluation.encoder import Side


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
    progress: bool = True,
    executor: Executor | None = None,
) -> EncodeReport:
    """Embed every row of a file.

    Args:
        model: as in `lbr_dist.loading.load_encoder`.
        source: a file that `lbr prepare` reads: JSONL, CSV, Parquet, text (a text per line) ..., also compressed.
        out: Parquet file to make, with the columns `id` (the row's own, or its number) and `embedding` (float32 list of
            fixed size, unit length), in the order of the input.
        side: query or passage: which instruction the texts get.
        field: field that holds the text; default: by side the first of question, query, text, or of answer, text,
            passage, document that the first row has.
        device: default: CUDA where there is one.
        block: texts in a part.
        progress: a bar on a terminal.
        executor: where blocks are embedded; default: the current one.

    Raises:
        UserError: no such file or field, a damaged file, a row without a text (its line is named), `out` exists,
            or the parts beside it belong to another input, model or setting.
    """
    from lbr_dist.loading import model_fingerprint

    source, out = Path(source), Path(out)
    if out.exists():
        raise UserError(f"encode: {out} exists already; remove it, or name another file")
    read_texts(source, side, field)
    parts = out.absolute().with_name(f"{out.name}.parts")
    job = {
        "model": model_fingerprint(model),
        "input": _fingerprint(source),
        "side": side,
        "field": field,
        "block": block,
    }
    _open_parts(parts, job, out)
    read = partial(_blocks, side=side, field=field, parts=parts, most=block)
    resumed = total = count = cut = 0
    with _Bar(progress, source) as advance:
        work = EncodeBlock(model, side, parts, device)
        for done in (executor or current()).stream([source.absolute()], read, work, model=True):
            resumed += done.texts * done.resumed
            total, count, cut = total + done.texts, count + 1, cut + done.cut
            advance(done.texts)
    width = _join([part_file(parts, number) for number in range(1, count + 1)], out)
    shutil.rmtree(parts)
    return EncodeReport(total, resumed, cut, width)


def _blocks(source: Path, *, side: Side, field: str | None, parts: Path, most: int) -> Iterator[TextBlock]:
    return text_blocks(read_texts(source, side, field), parts, most)


def _open_parts(parts: Path, job: dict[str, Any], out: Path) -> None:
    """Make the folder of parts, or check that the one that is there is of the same job."""
    description = parts / "job.json"
    if description.is_file():
        known = json.loads(description.read_text(encoding="utf-8"))
        changed = [name for name in job if known.get(name) != job[name]]
        if changed:
            raise UserError(
                f"encode: {parts} holds an unfinished run with another {' and '.join(changed)}; remove that folder to "
                f"start {out.name} anew, or repeat the earlier command to finish it"
            )
        return
    parts.mkdir(parents=True, exist_ok=True)
    temporary = parts / "job.tmp"
    temporary.write_text(json.dumps(job), encoding="utf-8")
    temporary.replace(description)


def _join(parts: list[Path], out: Path) -> int:
    """One file of all parts, a row group each; returns the width of a vector."""
    temporary = out.with_name(f".{out.name}.tmp")
    schema = pq.read_schema(parts[0])
    with pq.ParquetWriter(temporary, schema) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))
    temporary.replace(out)
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


class _Bar:
    """Progress in texts, on a terminal; the total is not known without reading the file first."""

    def __init__(self, show: bool, source: Path) -> None:
        from tqdm import tqdm

        self._tqdm = tqdm(disable=None if show else True, desc=f"encoding {source.name}", unit="text", unit_scale=True)

    def __enter__(self) -> Any:
        return self._tqdm.update

    def __exit__(self, *_: object) -> None:
        self._tqdm.close()
