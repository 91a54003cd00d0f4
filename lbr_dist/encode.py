"""`lbr encode`: a file of texts to a Parquet file of vectors, in bounded memory, and resumable.

The input is read in blocks; a block is sorted by length inside the encoder, so the larger it is, the less is wasted
and the more memory it takes. Each finished block is one Parquet part in a folder beside the output, renamed into place
when complete; a run that was killed therefore starts again at the first missing part. At the end the parts become one
file, which again appears by a rename: an output that exists is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from lbr_dist.errors import UserError
from lbr_dist.rows import read_texts

if TYPE_CHECKING:
    from lbr_dist.evaluation.encoder import Side

BLOCK_TEXTS = 16_384
"""Texts in a block at most."""
BLOCK_CHARACTERS = 32 << 20
"""Characters in a block at most, unless a single text has more."""


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
) -> EncodeReport:
    """Embed every row of a file.

    Args:
        model: as in `lbr_dist.loading.load_encoder`.
        source: JSONL (also .gz, .zst), Parquet or plain text (a text per line).
        out: Parquet file to make, with the columns `id` (the row's own, or its number) and `embedding` (float32 list of
            fixed size, unit length), in the order of the input.
        side: query or passage: which instruction the texts get.
        field: field that holds the text; default: by side the first of question, query, text, or of answer, text,
            passage, document that the first row has.
        device: default: CUDA where there is one.
        block: texts in a part.
        progress: a bar on a terminal.

    Raises:
        UserError: no such file or field, a row without a text (its line is named), `out` exists, or the parts beside it
            belong to another input, model or setting.
    """
    from lbr_dist.loading import load_encoder, model_fingerprint

    source, out = Path(source), Path(out)
    if out.exists():
        raise UserError(f"encode: {out} exists already; remove it, or name another file")
    rows = read_texts(source, side, field)
    parts = out.with_name(f"{out.name}.parts")
    job = {
        "model": model_fingerprint(model),
        "input": _fingerprint(source),
        "side": side,
        "field": field,
        "block": block,
    }
    done = _open_parts(parts, job, out)
    encoder = load_encoder(model, device)
    resumed = total = number = 0
    with _Bar(progress, source) as advance:
        for number, (ids, texts) in enumerate(_blocks(rows, block), start=1):
            if number in done:
                resumed += len(ids)
            else:
                _write_part(parts / _name(number), ids, encoder.encode(texts, side))
            total += len(ids)
            advance(len(ids))
    if number == 0:
        raise UserError(f"encode: {source} has no rows")
    width = _join([parts / _name(n) for n in range(1, number + 1)], out)
    shutil.rmtree(parts)
    return EncodeReport(total, resumed, encoder.cut, width)


def _open_parts(parts: Path, job: dict[str, Any], out: Path) -> set[int]:
    """Make the folder of parts, or find the numbers of those that are finished."""
    description = parts / "job.json"
    if description.is_file():
        known = json.loads(description.read_text(encoding="utf-8"))
        changed = [name for name in job if known.get(name) != job[name]]
        if changed:
            raise UserError(
                f"encode: {parts} holds an unfinished run with another {' and '.join(changed)}; remove that folder to "
                f"start {out.name} anew, or repeat the earlier command to finish it"
            )
        return {int(file.stem) for file in parts.glob("[0-9]*.parquet")}
    parts.mkdir(parents=True, exist_ok=True)
    temporary = parts / "job.tmp"
    temporary.write_text(json.dumps(job), encoding="utf-8")
    temporary.replace(description)
    return set()


def _blocks(rows: Iterator[tuple[str, str]], most: int) -> Iterator[tuple[list[str], list[str]]]:
    """Ids and texts in blocks, bounded in texts and in characters; the same every time for the same input."""
    ids: list[str] = []
    texts: list[str] = []
    characters = 0
    for name, text in rows:
        if ids and (len(ids) == most or characters + len(text) > BLOCK_CHARACTERS):
            yield ids, texts
            ids, texts, characters = [], [], 0
        ids.append(name)
        texts.append(text)
        characters += len(text)
    if ids:
        yield ids, texts


def _name(number: int) -> str:
    return f"{number:08d}.parquet"


def _write_part(file: Path, ids: list[str], vectors_ND: np.ndarray) -> None:
    flat = pa.array(np.ascontiguousarray(vectors_ND, dtype=np.float32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, vectors_ND.shape[1])
    temporary = file.with_suffix(".tmp")
    pq.write_table(pa.table({"id": pa.array(ids, pa.string()), "embedding": column}), temporary)
    temporary.replace(file)


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
