"""Vectors of questions and answers on disk: embedded in committed blocks, then one array file to map into memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from lbr_dist.data.execute import Executor
from lbr_dist.data.progress import Progress
from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.data.shards import PreparedSet
from lbr_dist.errors import UserError
from lbr_dist.inference.text_blocks import EncodeBlock, TextBlock, part_file, part_vectors, text_blocks
from lbr_dist.inference.vector_file import read_vectors, write_vectors
from lbr_dist.mining.candidates import SIDE

if TYPE_CHECKING:
    from lbr_dist.inference.encoder import Side


def embed(
    opened: PreparedSet,
    side: Side,
    rows_N: np.ndarray,
    *,
    model: str,
    device: str | None,
    folder: Path,
    block: int,
    executor: Executor,
    progress: Progress,
) -> np.ndarray:
    """Vectors of the questions (`side` query) or answers of some records, memory-mapped float32 [N, D].

    What an earlier attempt left whole in `folder` is used.

    Raises:
        UserError: all are zero. A single one may be: word vectors are, of a text without a word that they know.
    """
    file, parts = folder / f"{side}.npy", folder / side
    if read_vectors(file, len(rows_N)) is None:
        parts.mkdir(exist_ok=True)
        read = partial(_blocks, opened=opened, rows_N=rows_N, parts=parts, most=block)
        work = EncodeBlock(model, side, parts, device)
        blocks = 0
        with progress.phase(f"embedding: {side}", len(rows_N)) as advance:
            for done in executor.stream([side], read, work, model=True):
                blocks += 1
                advance(done.texts)
        files = [part_file(parts, number) for number in range(1, blocks + 1)]
        if not any(part_vectors(pq.read_table(part)).any() for part in files):
            texts = f"{len(rows_N)} {'questions' if side == 'query' else 'answers'}"
            raise UserError(
                f"model {model}: its embeddings of all {texts} are zero: the model is damaged, or knows no word of them"
            )
        _join(files, len(rows_N), file)
    shutil.rmtree(parts, ignore_errors=True)
    return np.load(file, mmap_mode="r")


def texts(opened: PreparedSet, field: str, rows_N: np.ndarray) -> Iterator[tuple[str, str]]:
    """(id, text) of some records of the side."""
    reader = ShardReader(opened, SIDE)
    for row in rows_N.tolist():
        record = reader.read([row])[0]
        yield record["id"], record[field]
    reader.close()


def _blocks(side: Side, *, opened: PreparedSet, rows_N: np.ndarray, parts: Path, most: int) -> Iterator[TextBlock]:
    return text_blocks(texts(opened, "question" if side == "query" else "answer", rows_N), parts, most)


def _join(parts: list[Path], count: int, file: Path) -> None:
    """One array file of all parts."""
    width = part_vectors(pq.read_table(parts[0])).shape[1]
    pieces = (part_vectors(pq.read_table(part)) for part in parts)
    write_vectors(file, (count, width), pieces)
