"""Open a prepared set: check it, and look up lengths in its index.

Everything that can be wrong with a set is found when it is opened (sizes, index, tokenizer), or by `verify` (every
byte), and named by file; what is read later is then trusted. Only JSON is ever decoded, never pickles.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lbr_dist.data import remote
from lbr_dist.data.shard_reader import REMEDY
from lbr_dist.data.shard_writer import FORMAT, SPLITS, ShardInfo, SplitInfo, manifest_fingerprint
from lbr_dist.data.split_index import SplitIndex, read_table
from lbr_dist.disk import cache_folder, file_xxh128, usable_folder
from lbr_dist.errors import UserError


@dataclass(frozen=True)
class PreparedSet:
    """An opened prepared set. Cheap to pickle: the index is read on demand."""

    root: str
    """Local folder, URL prefix, or `pipe:` command with `{}`."""
    manifest: dict[str, Any] = field(repr=False)
    splits: dict[str, SplitInfo] = field(repr=False)

    @property
    def name(self) -> str:
        """Name that the set was prepared with."""
        return self.manifest["name"]

    @property
    def fingerprint(self) -> str:
        """Hash of everything in the set, whatever its path."""
        return self.manifest["fingerprint"]

    @property
    def is_remote(self) -> bool:
        """Whether the set is read through webdataset's openers."""
        return remote.is_url(self.root)

    def address(self, name: str) -> str:
        """Path or URL of a file of the set."""
        return remote.join(self.root, name) if self.is_remote else str(Path(self.root) / name)

    def urls(self, split: str) -> list[str]:
        """Paths or URLs of the split's tars, as `webdataset.WebDataset` takes them."""
        return [self.address(shard.name) for shard in self._split(split).shards]

    def index(self, split: str) -> SplitIndex:
        """Index of a split.

        Raises:
            UserError: the split is unknown or empty, or an index file is damaged or not that of its shard.
        """
        info = self._split(split)
        if info.records == 0:
            raise UserError(f"prepared set {self.root}: its {split} split is empty: prepare it again with --{split}")
        paths = tuple(self._index_path(shard) for shard in info.shards)
        tables = [self._read_index(path, shard) for path, shard in zip(paths, info.shards, strict=True)]
        whole = pa.concat_tables(tables)
        # by DLPack, since `to_numpy` first imports pandas
        columns = {name: np.from_dlpack(whole.column(name).combine_chunks()) for name in whole.column_names}
        shard = np.repeat(np.arange(len(tables), dtype=np.int32), [table.num_rows for table in tables])
        return SplitIndex(shard=shard, tables=paths, **columns)

    def _split(self, split: str) -> SplitInfo:
        if split not in self.splits:
            raise UserError(f"prepared set {self.root}: no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    def _index_path(self, shard: ShardInfo) -> Path:
        if not self.is_remote:
            return Path(self.address(shard.index))
        folder = cache_folder("indexes")
        usable_folder(folder, f"cache of indexes {folder} (XDG_CACHE_HOME)")
        path = folder / f"{shard.index_xxh128}.parquet"
        if not path.is_file() or file_xxh128(path) != shard.index_xxh128:
            remote.fetch(self.address(shard.index), path, size=shard.index_bytes, xxh128=shard.index_xxh128)
        return path

    def _read_index(self, path: Path, shard: ShardInfo) -> pa.Table:
        columns = ["offset", "size", "question_tokens", "answer_tokens", "text_tokens", "answer_hash"]
        try:
            table = read_table(path, columns)
        except PermissionError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: damaged index ({error}): {REMEDY}") from error
        metadata = table.schema.metadata or {}
        if metadata.get(b"tar_xxh128", b"").decode() != shard.xxh128 or table.num_rows != shard.records:
            raise UserError(f"{path}: this index is not that of {shard.name}: {REMEDY}")
        if metadata.get(b"tokenizer", b"").decode() != self.manifest["tokenizer"]["fingerprint"]:
            raise UserError(f"{path}: this index was made with another tokenizer than its set: {REMEDY}")
        if file_xxh128(path) != shard.index_xxh128:
            raise UserError(f"{path}: damaged index (its checksum differs from the manifest's): {REMEDY}")
        return table


def open_set(path_or_url: str | Path) -> PreparedSet:
    """Open a prepared set and check its manifest and, where it is local, that every file has its size.

    Args:
        path_or_url: the folder that `lbr prepare --out` wrote, a URL prefix, or `pipe:` with `{}` for the file name.

    Raises:
        UserError: not a prepared set, one of a newer version, or a file of it is missing, truncated or changed.
    """
    root = str(path_or_url)
    manifest = _read_manifest(root)
    splits = {}
    for split in SPLITS:
        info = manifest["splits"][split]
        splits[split] = SplitInfo(info["records"], info["texts"], [ShardInfo(**shard) for shard in info["shards"]])
    opened = PreparedSet(root, manifest, splits)
    if not opened.is_remote:
        for name, size, _ in _files(opened):
            path = Path(opened.address(name))
            if not path.is_file():
                raise UserError(f"{path}: missing from the prepared set: {REMEDY}")
            if path.stat().st_size != size:
                raise UserError(f"{path}: {path.stat().st_size} bytes instead of {size}: {REMEDY}")
    return opened


def verify(opened: PreparedSet, deep: bool = True) -> int:
    """Check the files of a set; returns the bytes checked.

    Args:
        deep: read every byte and compare checksums; otherwise sizes only (and remote sets not at all).

    Raises:
        UserError: names the first damaged file.
    """
    open_set(opened.root)
    total = 0
    for name, size, xxh128 in _files(opened):
        total += size
        if deep and opened.is_remote:
            with tempfile.TemporaryDirectory() as folder:
                remote.fetch(opened.address(name), Path(folder) / "file", size=size, xxh128=xxh128)
        elif deep:
            check_file(Path(opened.address(name)), xxh128)
    return total


def check_tokenizer(opened: PreparedSet, tokenization: Any) -> None:
    """Check that the set's token counts are those of this tokenizer.

    Args:
        tokenization: a `lbr_dist.model.tokenizer.Tokenization`.

    Raises:
        UserError: names both tokenizers.
    """
    made_with = opened.manifest["tokenizer"]
    if made_with["fingerprint"] != tokenization.fingerprint:
        where = f" ({made_with['path']})" if made_with["path"] else ""
        raise UserError(
            f"prepared set {opened.root}: its index was made with tokenizer {made_with['fingerprint'][:12]}{where}, "
            f"the model has {tokenization.fingerprint[:12]}: prepare the set again with the model's tokenizer"
        )


def check_file(path: Path, xxh128: str) -> None:
    """Read a file of a set and compare its checksum.

    Raises:
        UserError: it is another, or the file cannot be read.
    """
    try:
        found = file_xxh128(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {REMEDY}") from None
    if found != xxh128:
        raise UserError(f"{path}: its checksum changed: {REMEDY}")


def _files(opened: PreparedSet) -> Iterator[tuple[str, int, str]]:
    for info in opened.splits.values():
        for shard in info.shards:
            yield from shard.files


def _read_manifest(root: str) -> dict[str, Any]:
    if remote.is_url(root):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "manifest.json"
            remote.fetch(remote.join(root, "manifest.json"), path)
            data = path.read_bytes()
    else:
        path = Path(root) / "manifest.json"
        if not path.is_file():
            what = "no manifest.json in it" if Path(root).is_dir() else "no such folder"
            raise UserError(f"{root}: not a prepared set ({what}): give the folder that `lbr prepare --out` wrote")
        data = path.read_bytes()
    try:
        manifest = json.loads(data)
        version, recorded = manifest["format"], manifest["fingerprint"]
        intact = version > FORMAT or manifest_fingerprint(manifest) == recorded
    except (ValueError, KeyError, TypeError) as error:
        remedy = "see what the address gives (a login page?)" if remote.is_url(root) else REMEDY
        raise UserError(f"{root}/manifest.json: not the manifest of a prepared set: {remedy}") from error
    if version > FORMAT:
        raise UserError(f"{root}: prepared by a newer lbr (format {version}, this one reads {FORMAT}): update lbr")
    if not intact or set(manifest["splits"]) != set(SPLITS):
        raise UserError(f"{root}/manifest.json: it was changed after the set was prepared: {REMEDY}")
    return manifest
