"""How many bits each text of a prepared set holds, by a language model: a table beside the set's own files.

`lbr surprisal` measures; a run whose `bottleneck.surprisal` asks for it plans |Z| from the table, as it plans |X| from
the index. Each shard's part is a file of its own that appears whole, so that a killed measurement goes on where it was:

    SET/surprisal/MODEL/SPLIT/000000.parquet     MODEL: hash of the model's weights
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from lbr_dist.data.shard_writer import ShardInfo
from lbr_dist.data.shards import PreparedSet
from lbr_dist.data.split_index import Ragged, read_table
from lbr_dist.disk import file_xxh128, replacing
from lbr_dist.errors import UserError

SCHEMA = pa.schema(
    [
        ("question", pa.float32()),
        ("answer", pa.float32()),
        ("text", pa.float32()),
        ("negatives", pa.list_(pa.float32())),
        ("positives", pa.list_(pa.float32())),
    ]
)
"""Bits of a record's texts; 0 for one that it does not have."""


@dataclass(frozen=True)
class Information:
    """Bits in the texts of each record of a split, float32; row i is row i of the split's index."""

    question: np.ndarray
    answer: np.ndarray
    text: np.ndarray
    negatives: Ragged
    positives: Ragged
    model: str
    """Fingerprint of the model that measured."""

    @property
    def fingerprint(self) -> str:
        """Hash of the bits."""
        lists = (array for ragged in (self.negatives, self.positives) for array in (ragged.offsets, ragged.values))
        digest = xxhash.xxh3_128()
        for array in (self.question, self.answer, self.text, *lists):
            digest.update(array.tobytes())
        return digest.hexdigest()


def known_bits(bits_N: np.ndarray, tokens_N: np.ndarray, kept_N: np.ndarray) -> np.ndarray:
    """Bits in the first `kept_N` of `tokens_N` tokens, taken as spread evenly over the text."""
    return bits_N * np.clip(kept_N / np.maximum(tokens_N, 1), 0, 1)


@lru_cache
def model_fingerprint(path: str) -> str:
    """Hash of a model folder's configuration and weights.

    Raises:
        UserError: there is no model in it.
    """
    folder = Path(path)
    files = sorted(file for ending in ("*.safetensors", "*.bin") for file in folder.glob(ending))
    if not files or not (folder / "config.json").is_file():
        raise UserError(
            f"surprisal model {path}: there is no model folder (config.json and *.safetensors or *.bin): name that of "
            "a causal language model (`lbr export` makes one of a run), or put it back there if a run was trained by it"
        )
    hashes = [f"{file.name} {file_xxh128(file)}" for file in (folder / "config.json", *files)]
    return xxhash.xxh3_128_hexdigest("\n".join(hashes).encode())


def part_path(opened: PreparedSet, split: str, shard: ShardInfo, model: str) -> Path:
    """Where the bits of a shard's texts are, as measured by the model with this fingerprint.

    Raises:
        UserError: the set is remote.
    """
    if opened.is_remote:
        raise UserError(f"prepared set {opened.root}: surprisal is kept beside a set on a disk: copy the set to one")
    return Path(opened.root) / "surprisal" / model / split / f"{Path(shard.name).stem}.parquet"


def read_part(path: Path, shard: ShardInfo) -> pa.Table | None:
    """One shard's table; None where it is missing, damaged, of another shard or without a hash of its bits (older
    ones), and has to be measured."""
    try:
        table = read_table(path, SCHEMA.names)
        found, expected = table.schema.metadata or {}, _metadata(table, shard)
    except (OSError, pa.ArrowException, KeyError):
        return None
    sound = table.num_rows == shard.records and all(found.get(key) == value for key, value in expected.items())
    return table if sound else None


def write_part(path: Path, shard: ShardInfo, rows: dict[str, list[Any]]) -> None:
    """Write one shard's table; it appears whole or not at all."""
    table = pa.table(rows, schema=SCHEMA)
    table = table.replace_schema_metadata(_metadata(table, shard))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): the set's folder has to be writable") from None


def read_information(opened: PreparedSet, split: str, model_path: str) -> Information:
    """Bits in the texts of a split.

    Args:
        model_path: folder of the model that measured them.

    Raises:
        UserError: they were not measured by this model, or not for all shards.
    """
    model = model_fingerprint(model_path)
    tables = [read_part(part_path(opened, split, shard, model), shard) for shard in opened.splits[split].shards]
    known = [table for table in tables if table is not None]
    if len(known) < len(tables):
        raise UserError(
            f"prepared set {opened.root}: the bits in the texts of {len(tables) - len(known)} of the {split} split's "
            f"{len(tables)} shards are not known by bottleneck.surprisal.model={model_path}: run lbr surprisal "
            f"{opened.root} --model {model_path}"
        )
    return _joined(known, model)


def _joined(tables: Sequence[pa.Table], model: str) -> Information:
    question, answer, text = (np.concatenate([t.column(name).to_numpy() for t in tables]) for name in SCHEMA.names[:3])
    negatives, positives = (Ragged.join([t.column(name).combine_chunks() for t in tables]) for name in SCHEMA.names[3:])
    return Information(question, answer, text, negatives, positives, model)


def _metadata(table: pa.Table, shard: ShardInfo) -> dict[bytes, bytes]:
    """What a part says of its shard and of its bits."""
    return {b"tar_xxh128": shard.xxh128.encode(), b"bits_xxh128": _joined([table], "").fingerprint.encode()}
