"""Write shards: standard WebDataset tars, each with a Parquet index beside it.

The tar is what any WebDataset user expects; the index is what lets the plan know every length, and the reader every
offset, without touching the tar. Bytes depend on nothing but the records: no times, no owners, sorted keys. The writer
knows nothing of atomicity: `prepare` points it at a temporary folder and renames that whole.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from lbr_dist.data.record import Record, normalised_hash
from lbr_dist.errors import UserError

FORMAT = 1
"""Version of the layout of a prepared set; a reader refuses a newer one."""
SPLITS = ("gl", "cl", "eval")
"""Stage 1 (generative learning), stage 2 (contrastive learning) and evaluation."""
BLOCK = 512
"""Tar block size in bytes."""
LARGEST_MEMBER = 8 << 30
"""A USTAR header holds sizes below 8 GiB."""

INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int32()),
        ("question_tokens", pa.int32()),
        ("answer_tokens", pa.int32()),
        ("text_tokens", pa.int32()),
        ("negative_tokens", pa.list_(pa.int32())),
        ("answer_hash", pa.int64()),
    ]
)


class Tokens(Protocol):
    """What writing needs of `lbr_dist.model.tokenizer.Tokenization`."""

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the tokens of a text."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, with no special tokens and no truncation."""


@dataclass(frozen=True)
class ShardInfo:
    """One shard in the manifest; names are relative to the set, sizes in bytes, hashes XXH3-128 in hexadecimal."""

    name: str
    index: str
    records: int
    bytes: int
    xxh128: str
    index_bytes: int
    index_xxh128: str


@dataclass
class SplitInfo:
    """One split in the manifest: its shards, how many records they hold, and how many of these are plain texts."""

    records: int = 0
    texts: int = 0
    shards: list[ShardInfo] = field(default_factory=list)


class ShardWriter:
    """Append records to the shards of one split.

    A shard is closed before it would exceed `shard_records` records or `shard_bytes` bytes; a single record larger than
    `shard_bytes` gets a shard of its own.
    """

    def __init__(self, root: Path, split: str, tokens: Tokens, *, shard_records: int, shard_bytes: int) -> None:
        self.root, self.split, self.tokens = root, split, tokens
        self.shard_records, self.shard_bytes = shard_records, shard_bytes
        self.info = SplitInfo()
        self._tar: IO[bytes] | None = None
        self._rows: dict[str, list[Any]] = {}
        self._hash = xxhash.xxh3_128()
        self._bytes = 0
        (root / split).mkdir(parents=True, exist_ok=True)

    def write(self, records: Sequence[Record]) -> None:
        """Append a batch: one call of the tokenizer for all its texts, then one tar member for each record."""
        counts = _token_counts(records, self.tokens)
        for record, tokens in zip(records, counts, strict=True):
            self._append(record, tokens)

    def close(self) -> SplitInfo:
        """Close the last shard; returns the split's part of the manifest."""
        if self._tar is not None:
            self._close_shard()
        return self.info

    def abandon(self) -> None:
        """Close the open file, after an error, without finishing the shard."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def _append(self, record: Record, tokens: dict[str, Any]) -> None:
        data = record.to_json()
        if len(data) >= LARGEST_MEMBER:
            raise UserError(f"record {record.id}: {len(data)} bytes do not fit in a tar member: lower --max-chars")
        padded = -(-len(data) // BLOCK) * BLOCK
        if self._tar is not None:
            full = len(self._rows["id"]) >= self.shard_records
            if full or self._bytes + BLOCK + padded + 2 * BLOCK > self.shard_bytes:
                self._close_shard()
        if self._tar is None:
            self._open_shard()
        self._put(_header(f"{self.info.records:09d}.json", len(data)))
        row = {"id": record.id, "offset": self._bytes, "size": len(data), **tokens}
        row["answer_hash"] = normalised_hash(record.document)
        for name, value in row.items():
            self._rows[name].append(value)
        self._put(data + b"\0" * (padded - len(data)))
        self.info.records += 1
        self.info.texts += record.is_text

    def _open_shard(self) -> None:
        self._name = f"{self.split}/{len(self.info.shards):06d}"
        self._tar = (self.root / f"{self._name}.tar").open("wb", buffering=1 << 20)
        self._rows = {name: [] for name in INDEX_SCHEMA.names}
        self._hash.reset()
        self._bytes = 0

    def _put(self, data: bytes) -> None:
        assert self._tar is not None
        self._tar.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def _close_shard(self) -> None:
        assert self._tar is not None
        self._put(b"\0" * (2 * BLOCK))
        self._tar.close()
        self._tar = None
        digest = self._hash.hexdigest()
        table = pa.table(self._rows, schema=INDEX_SCHEMA)
        table = table.replace_schema_metadata({"tokenizer": self.tokens.fingerprint, "tar_xxh128": digest})
        index = self.root / f"{self._name}.parquet"
        pq.write_table(table, index, compression="zstd")
        index_data = index.read_bytes()
        self.info.shards.append(
            ShardInfo(
                name=f"{self._name}.tar",
                index=f"{self._name}.parquet",
                records=table.num_rows,
                bytes=self._bytes,
                xxh128=digest,
                index_bytes=len(index_data),
                index_xxh128=xxhash.xxh3_128_hexdigest(index_data),
            )
        )


def write_set(
    root: Path,
    splits: dict[str, Iterable[Record]],
    tokens: Tokens,
    *,
    name: str,
    seed: int = 0,
    source: Any = None,
    tokenizer_path: str = "",
    shard_records: int = 8192,
    shard_bytes: int = 256 << 20,
) -> dict[str, Any]:
    """Write every split and then the manifest into `root`, in the order given; returns the manifest.

    Args:
        source: what the set was made from, JSON-able; it becomes the manifest's `input`.
    """
    infos: dict[str, SplitInfo] = {}
    for split in SPLITS:
        writer = ShardWriter(root, split, tokens, shard_records=shard_records, shard_bytes=shard_bytes)
        try:
            for batch in _batches(splits.get(split, ()), 1024):
                writer.write(batch)
            infos[split] = writer.close()
        finally:
            writer.abandon()
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "seed": seed,
        "input": source,
        "tokenizer": {"fingerprint": tokens.fingerprint, "path": tokenizer_path},
        "splits": {split: asdict(info) for split, info in infos.items()},
    }
    manifest["fingerprint"] = manifest_fingerprint(manifest)
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (root / "manifest.json").write_text(text, encoding="utf-8")
    return manifest


def manifest_fingerprint(manifest: dict[str, Any]) -> str:
    """Hash of a manifest without its own fingerprint and without the tokenizer's path, which differs by machine."""
    content = {key: value for key, value in manifest.items() if key != "fingerprint"}
    content["tokenizer"] = {"fingerprint": manifest["tokenizer"]["fingerprint"]}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def _token_counts(records: Sequence[Record], tokens: Tokens) -> list[dict[str, Any]]:
    """The token columns of each record's index row; a text that occurs twice in the batch is tokenized once."""
    texts: dict[str, int] = {}
    for record in records:
        for text in (record.question, record.answer, record.text, *record.negatives):
            if text is not None:
                texts[text] = 0
    for text, ids in zip(texts, tokens.encode(list(texts)), strict=True):
        texts[text] = len(ids)
    return [
        {
            "question_tokens": -1 if record.question is None else texts[record.question],
            "answer_tokens": -1 if record.answer is None else texts[record.answer],
            "text_tokens": -1 if record.text is None else texts[record.text],
            "negative_tokens": [texts[text] for text in record.negatives],
        }
        for record in records
    ]


def _batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    iterator = iter(records)
    while batch := list(islice(iterator, size)):
        yield batch
