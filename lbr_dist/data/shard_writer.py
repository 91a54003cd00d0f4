"""Write shards: standard WebDataset tars, each with a Parquet index beside it.

The tar is what any WebDataset user expects; the index is what lets the plan know every length, and the reader every
offset, without touching the tar. Bytes depend on nothing but the records: no times, no owners, sorted keys. The writer
knows nothing of atomicity: `prepare` points it at a temporary folder and renames that whole.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from lbr_dist.data.record import Record, batches, normalised_hash
from lbr_dist.data.split_index import record_digest
from lbr_dist.data.token_counter import TokenCounter, Tokens
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
        ("positive_tokens", pa.list_(pa.int32())),
        ("domain", pa.string()),
        ("digest", pa.uint32()),
    ]
)


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

    @property
    def files(self) -> tuple[tuple[str, int, str], tuple[str, int, str]]:
        """Name, size and hash of its two files: the tar and the index."""
        return (self.name, self.bytes, self.xxh128), (self.index, self.index_bytes, self.index_xxh128)


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

    def __init__(
        self,
        root: Path,
        split: str,
        tokenizer: str,
        *,
        shard_records: int,
        shard_bytes: int,
        first_shard: int = 0,
        first_record: int = 0,
    ) -> None:
        """Start writing.

        Args:
            tokenizer: fingerprint of the one that the token counts are of.
            first_shard, first_record: shards and records of the split that others write before these.
        """
        self.root, self.split, self.tokenizer = root, split, tokenizer
        self._first_shard, self._first_record = first_shard, first_record
        self.shard_records, self.shard_bytes = shard_records, shard_bytes
        self.info = SplitInfo()
        self._tar: IO[bytes] | None = None
        self._rows: dict[str, list[Any]] = {}
        self._hash = xxhash.xxh3_128()
        self._bytes = 0
        (root / split).mkdir(parents=True, exist_ok=True)

    def write(self, records: Sequence[Record], tokens: Sequence[dict[str, Any]]) -> None:
        """Append a batch of records with the token columns of each, as `TokenCounter.columns` gives them."""
        for record, columns in zip(records, tokens, strict=True):
            self._append(record, columns)

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
        padded = _padded(len(data))
        if self._tar is not None:
            full = len(self._rows["id"]) >= self.shard_records
            if full or self._bytes + BLOCK + padded + 2 * BLOCK > self.shard_bytes:
                self._close_shard()
        if self._tar is None:
            self._open_shard()
        self._put(_header(f"{self._first_record + self.info.records:09d}.json", len(data)))
        row = {"id": record.id, "offset": self._bytes, "size": len(data), **tokens}
        row["answer_hash"] = normalised_hash(record.document)
        row["domain"] = record.domain
        row["digest"] = record_digest(data)
        for name, value in row.items():
            self._rows[name].append(value)
        self._put(data + b"\0" * (padded - len(data)))
        self.info.records += 1
        self.info.texts += record.is_text

    def _open_shard(self) -> None:
        self._name = f"{self.split}/{self._first_shard + len(self.info.shards):06d}"
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
        table = table.replace_schema_metadata({"tokenizer": self.tokenizer, "tar_xxh128": digest})
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


def shard_starts(sizes: Sequence[int], *, shard_records: int, shard_bytes: int) -> list[int]:
    """First record of each shard that `ShardWriter` makes of records with JSON of these sizes in bytes."""
    starts, used = list[int](), 0
    for record, size in enumerate(sizes):
        member = BLOCK + _padded(size)
        if not starts or record - starts[-1] >= shard_records or used + member + 2 * BLOCK > shard_bytes:
            starts.append(record)
            used = 0
        used += member
    return starts


def write_set(
    root: Path,
    splits: Mapping[str, Iterable[Record]],
    tokens: Tokens,
    *,
    name: str,
    tokenizer_path: str = "",
    shard_records: int = 8192,
    shard_bytes: int = 256 << 20,
) -> dict[str, Any]:
    """Write every split and then the manifest into `root`, in the order given; returns the manifest.

    For tests and benchmarks, which have records: `lbr prepare` isolates the sides.
    """
    counter = TokenCounter(tokens)
    infos: dict[str, SplitInfo] = {}
    for split in SPLITS:
        writer = ShardWriter(root, split, tokens.fingerprint, shard_records=shard_records, shard_bytes=shard_bytes)
        try:
            for batch in batches(splits.get(split, ())):
                writer.write(batch, counter.columns(batch))
            infos[split] = writer.close()
        finally:
            writer.abandon()
    tokenizer = {"fingerprint": tokens.fingerprint, "path": tokenizer_path}
    return write_manifest(root, infos, name=name, seed=0, source=None, tokenizer=tokenizer)


def write_manifest(
    root: Path, infos: dict[str, SplitInfo], *, name: str, seed: int, source: Any, tokenizer: dict[str, str]
) -> dict[str, Any]:
    """Write the manifest of a set whose shards are in place; returns it."""
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "seed": seed,
        "input": source,
        "tokenizer": tokenizer,
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


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _template() -> bytes:
    """A USTAR header of an empty member with no name, its checksum field blank (as the checksum is computed)."""
    header = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
    return header[:148] + b" " * 8 + header[156:]


_TEMPLATE = _template()
_TEMPLATE_SUM = sum(_TEMPLATE) - sum(_TEMPLATE[124:135])


def _header(name: str, size: int) -> bytes:
    """Tar header of a file: what `tarfile` makes, some ten times faster, with the three fields that change filled in.

    Name at byte 0, size at 124 in 11 octal digits, checksum (the sum of all other bytes) at 148 (POSIX.1-1988).
    """
    name_bytes, digits = name.encode(), b"%011o" % size
    header = bytearray(_TEMPLATE)
    header[: len(name_bytes)] = name_bytes
    header[124:135] = digits
    header[148:156] = b"%06o\0 " % (_TEMPLATE_SUM + sum(name_bytes) + sum(digits))
    return bytes(header)
