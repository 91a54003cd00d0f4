"""Texts to vectors in blocks that are committed one by one: what `lbr encode` and `lbr mine` share.

A block is sorted by length inside the encoder, so the larger it is, the less is wasted and the more memory it takes.
Its vectors are one Parquet part, renamed into place when complete and with a checksum of what it holds; whoever was
killed starts again at the first part that is missing, and one that was damaged counts as missing. Blocks depend on the
input alone, so it does not matter which process embeds which.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from lbr_dist.disk import replacing

if TYPE_CHECKING:
    from lbr_dist.inference.encoder import Encoder, Side

Item = TypeVar("Item")
BLOCK_TEXTS = 16_384
"""Texts in a block at most."""
BLOCK_CHARACTERS = 32 << 20
"""Characters in a block at most, unless a single text has more."""


@dataclass(frozen=True)
class TextBlock:
    """Some texts to embed; `texts` is empty where the block's part is there already."""

    number: int
    """From 1, in the order of the input."""
    ids: list[str]
    texts: list[str]


@dataclass(frozen=True)
class EncodedBlock:
    """What was done to a block: texts in its part, whether that was there before, texts that were cut."""

    number: int
    texts: int
    resumed: bool
    cut: int


def text_blocks(rows: Iterable[tuple[str, str]], parts: Path, most: int) -> Iterator[TextBlock]:
    """Rows (id, text) in blocks, bounded in texts and in characters; the same every time for the same rows.

    Args:
        parts: folder in which finished parts are looked for.
        most: texts in a block.
    """
    for number, block in enumerate(grouped(rows, lambda row: len(row[1]), most), 1):
        whole = _is_whole(part_file(parts, number))
        yield TextBlock(number, [name for name, _ in block], [] if whole else [text for _, text in block])


def grouped(items: Iterable[Item], characters: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Neighbouring items, at most `most`, and of `BLOCK_CHARACTERS` unless a single one has more."""
    block: list[Item] = []
    total = 0
    for item in items:
        size = characters(item)
        if block and (len(block) == most or total + size > BLOCK_CHARACTERS):
            yield block
            block, total = [], 0
        block.append(item)
        total += size
    if block:
        yield block


class EncodeBlock:
    """Embeds blocks and writes their parts; picklable: every process loads the model at its first block."""

    def __init__(self, model: str, side: Side, parts: Path, device: str | None = None) -> None:
        """`model` and `device` as in `loading.load_encoder`; `parts` must be seen by every process."""
        self._model, self._side, self._parts, self._device = model, side, parts, device
        self._encoder: Encoder | None = None

    def __call__(self, block: TextBlock) -> EncodedBlock:
        """Embed one block.

        Raises:
            UserError: the model cannot be loaded, or gives a vector that is not finite (the text's id is named).
        """
        from lbr_dist.inference.encoder import check_finite

        if not block.texts:
            return EncodedBlock(block.number, len(block.ids), True, _cut(part_file(self._parts, block.number)))
        if self._encoder is None:
            from lbr_dist.inference.loading import load_encoder

            self._encoder = load_encoder(self._model, self._device)
        before = self._encoder.cut
        vectors_ND = self._encoder.encode(block.texts, self._side)
        check_finite(vectors_ND, block.ids, self._model)
        cut = self._encoder.cut - before
        _write_part(part_file(self._parts, block.number), block.ids, vectors_ND, cut)
        return EncodedBlock(block.number, len(block.ids), False, cut)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None}


def part_file(parts: Path, number: int) -> Path:
    """The part of a block."""
    return parts / f"{number:08d}.parquet"


def part_vectors(part: pa.Table) -> np.ndarray:
    """Vectors of a part, float32 [texts, D]."""
    column = part["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(-1, column.type.list_size)


def _cut(part: Path) -> int:
    """Texts of a finished part that were cut."""
    return int((pq.read_schema(part).metadata or {}).get(b"cut", 0))


def _is_whole(part: Path) -> bool:
    """Whether a part is there as it was written."""
    try:
        table = pq.read_table(part, page_checksum_verification=True)
        metadata = table.schema.metadata or {}
        return metadata[b"xxh128"].decode() == _digest(table["id"].to_pylist(), part_vectors(table), _cut(part))
    except (OSError, ValueError, KeyError, AttributeError, pa.ArrowException):
        return False


def _digest(ids: list[str], vectors_ND: np.ndarray, cut: int) -> str:
    digest = xxhash.xxh3_128(json.dumps([ids, vectors_ND.shape, cut]).encode())
    digest.update(np.ascontiguousarray(vectors_ND).data)
    return digest.hexdigest()


def _write_part(file: Path, ids: list[str], vectors_ND: np.ndarray, cut: int) -> None:
    vectors_ND = np.ascontiguousarray(vectors_ND, dtype=np.float32)
    flat = pa.array(vectors_ND.reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, vectors_ND.shape[1])
    known = {"cut": str(cut), "xxh128": _digest(ids, vectors_ND, cut)}
    table = pa.table({"id": pa.array(ids, pa.string()), "embedding": column}, metadata=known)
    with replacing(file) as temporary:  # two nodes may have been given the block
        pq.write_table(table, temporary, write_page_checksum=True)
