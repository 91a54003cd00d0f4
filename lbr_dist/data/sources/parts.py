"""The files behind what the user named: paths, folders, globs, addresses, data sets, benchmarks.

A source is resolved to a sorted list of files before anything is read, so that what was read can be fingerprinted: the
same content and settings need not be prepared twice. Remote files are copied here whole first, for the same reason.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from lbr_dist.data import remote
from lbr_dist.data.manifest import manifest_of
from lbr_dist.data.sources.beir import find_beir, find_files, find_unjudged
from lbr_dist.data.sources.compressed import open_file
from lbr_dist.data.sources.field_names import KINDS
from lbr_dist.data.sources.formats import ENDING, FORMATS, UNITS, format_of, is_source
from lbr_dist.data.sources.patterns import SPECIAL, matches
from lbr_dist.disk import file_xxh128
from lbr_dist.errors import UserError, one_line, printable

MOST_LISTED = 10
"""Endings of files in a message."""
HUB = "hub:"


@dataclass(frozen=True)
class Source:
    """What the user named: a file, a folder, a glob, an address, a data set, or a benchmark."""

    path: str
    kind: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, kind: str | None, fields: Mapping[str, str]) -> Source:
        """`PATH`, or `KIND=PATH` for a source of another kind than the rest.

        Raises:
            UserError: `kind` is none of `KINDS`.
        """
        prefix, equals, rest = text.partition("=")
        if equals and prefix in KINDS:
            text, kind = rest, prefix
        if kind is not None and kind not in KINDS:
            raise UserError(f"--kind {kind}: no such kind; the kinds are {', '.join(KINDS)}")
        return cls(text, kind, fields)

    @property
    def name(self) -> str:
        """How messages name it: an address without query and user, a command by its file, since these may hold keys."""
        if not remote.is_url(self.path):
            return self.path
        if self.path.startswith("pipe:"):
            words = [re.split(r"[?#]", word)[0] for word in re.split(r"[\s'\"|]+", self.path)]
            files = [re.split(r"[/\\:]", word)[-1] for word in words if is_source(word)]
            return f"pipe:.../{files[-1]}" if files else "pipe"
        return re.sub(r"(?<=://)[^/]*@", "", re.split(r"[?#]", self.path)[0])


@dataclass(frozen=True)
class Part:
    """One file (or data set, or benchmark) of a source: what is read and fingerprinted."""

    name: str
    """How messages name it."""
    format: str
    """A value of `FORMATS`, `datasets` or `beir`."""
    path: Path
    """Local file, or folder of a saved data set or of a benchmark."""
    source: Source
    dataset: Any = None
    members: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)
    """Of a benchmark: its corpus, queries and qrels; see `beir`."""

    @property
    def unit(self) -> str:
        """What its numbers count."""
        return UNITS.get(self.format, "row")

    @property
    def base(self) -> str:
        """Its file name without folders: part of the output, where the whole path is not."""
        return printable(re.split(r"[/\\]", self.name.rstrip("/"))[-1])

    @property
    def compression(self) -> str:
        """The ending that says how it is compressed, empty for none; an address may have it in its query."""
        return ENDING.findall(self.source.path if remote.is_url(self.source.path) else self.name)[-1][1]

    def open(self) -> IO[bytes]:
        """The file's content, decompressed; fails as `open_file` does."""
        return open_file(self.path, self.compression)

    def fingerprint(self) -> dict[str, Any]:
        """Identity of the content, with the settings that decide how it is read.

        Raises:
            UserError: the file cannot be read, or a data set is not in files.
        """
        files = [member.path for members in self.members.values() for member in members] or [self.path]
        if self.dataset is not None:
            files = [Path(name) for name in sorted({entry["filename"] for entry in self.dataset.cache_files})]
            if not files and len(self.dataset):
                raise UserError(f"{self.name}: datasets holds it in memory: whether it changed could not be found out")
        try:
            digests = [file_xxh128(file) for file in files]
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read ({error.strerror})") from None
        return {
            "name": self.base,
            "xxh128": digests,
            "kind": self.source.kind,
            "fields": dict(sorted(self.source.fields.items())),
        }


def expand(source: Source, downloads: Path, passed_over: Counter[str] | None = None) -> list[Part]:
    """The files behind a source, sorted by name; remote ones are copied into `downloads` first.

    Args:
        passed_over: counts, by ending, the files of a folder that are not read.

    Raises:
        UserError: there are none, or one has no known format or cannot be read.
    """
    path = source.path
    if path.startswith(HUB):
        return [_dataset_part(source, path, None)]
    if remote.is_url(path):
        return [_remote_part(source, downloads / f"{len(list(downloads.iterdir())):06d}")]
    parts = _local_parts(source, passed_over)
    if not parts and SPECIAL.search(path):
        matched = matches(Path(path))
        for place in sorted(place for place in matched if matched.isdisjoint(place.parents)):
            if os.path.isdir(place):  # noqa: PTH112 (it never fails)
                parts += _local_parts(replace(source, path=str(place)), passed_over, matched)
            else:
                parts.append(Part(str(place), format_of(place.name), place, source))
    if not parts:
        raise UserError(f"{path}: no such file, folder or glob with source files ({', '.join(FORMATS)})")
    return parts


def _remote_part(source: Source, target: Path) -> Part:
    """What an address or a command gives, copied to `target`."""
    form = format_of(source.path if ENDING.search(source.path) else source.name)
    try:
        remote.fetch(source.path, target)
    except UserError as error:
        raise type(error)(str(error).replace(source.path, source.name)) from None
    return Part(source.name, form, target, source)


def _local_parts(source: Source, passed_over: Counter[str] | None, matched: Set[Path] = frozenset()) -> list[Part]:
    """What is read of a file, folder, data set or benchmark; without any where it is not there.

    Args:
        matched: what a pattern stands for: of a folder it is read even where it would be passed over.

    Raises:
        UserError: one that `expand` lists.
    """
    path, local = source.path, Path(source.path)
    folder, _, _ = path.rpartition("@")
    try:
        if _is_dataset(local) or (not local.exists() and folder and _is_dataset(Path(folder))):
            return [_dataset_part(source, path, local if local.exists() else Path(folder))]
        if (benchmark := find_beir(path)) is not None:
            return [_beir_part(source, *benchmark)]
        files = list[Path]()
        if local.is_dir():
            files = _folder_files(local, passed_over, matched)
        elif local.is_file():
            files = [local]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return [
        _dataset_part(source, str(file), file) if file.is_dir() else Part(str(file), format_of(file.name), file, source)
        for file in files
    ]


def _folder_files(folder: Path, passed_over: Counter[str] | None, matched: Set[Path]) -> list[Path]:
    """The source files and saved data sets in a folder."""
    if manifest_of(folder) is not None:
        raise UserError(f"{folder}: is a prepared set, not a source: give its tars, for example {folder}/eval/*.tar")
    others = Counter[str]()
    files = list(_walk(folder, others, matched))
    if not files:
        listed = ", ".join(f"{count} {printable(ending)}" for ending, count in others.most_common(MOST_LISTED))
        raise UserError(
            f"{folder}: a folder without source files ({', '.join(FORMATS)}; .json only if named or globbed); it has "
            f"{listed or 'no files'}"
        )
    if passed_over is not None:
        passed_over.update(others)
    return files


def _walk(root: Path, passed_over: Counter[str], matched: Set[Path]) -> Iterator[Path]:
    """The source files and saved data sets in a folder and those in it, sorted, links followed; the others are counted.

    What is hidden is left aside, as are prepared sets (an earlier output) and .json files (settings and the like), but
    what is `matched`.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None

    seen, found = set(), list[Path]()
    for place, folders, names in os.walk(root, onerror=fail, followlinks=True):
        folder = Path(place)
        identity = os.path.realpath(folder)
        if identity in seen or manifest_of(folder) is not None:
            if identity not in seen:
                passed_over["prepared set"] += 1
            folders.clear()
            continue
        seen.add(identity)
        if _is_dataset(folder):
            if splits := _splits(folder):
                raise UserError(
                    f"{folder}: is a saved data set with the splits {', '.join(splits)}, in a folder of sources: name "
                    f"one by itself, as {folder}@{splits[0]}, and leave it out of that folder"
                )
            found.append(folder)
            folders.clear()
            continue
        if "qrels" in folders and find_beir(str(folder)) is not None:  # by file, its questions are texts to learn
            raise UserError(
                f"{folder}: is a benchmark, in a folder of sources: name it by itself, as {folder}@SPLIT, or for its "
                "texts its corpus, and leave it out of that folder"
            )
        if (corpus := find_unjudged(folder)) is not None:  # as are these
            raise UserError(
                f"{folder}: has a corpus and queries as a benchmark has them, and no judgements of them: add "
                f"qrels/SPLIT.tsv, or for its texts name {corpus} alone"
            )
        folders[:] = sorted(name for name in folders if not name.startswith(".") or folder / name in matched)
        for name in names:
            file, form = folder / name, format_of(name) if is_source(name) else ""
            if name.startswith(".") and file not in matched:
                continue
            is_read = form not in ("", "json") or (form == "json" and file in matched)
            if is_read and not file.exists():
                raise UserError(f"{file}: is a link to a file that does not exist: mend or remove it")
            if is_read and file.is_file():
                found.append(file)
            else:
                passed_over[".json" if form == "json" else file.suffix or name] += 1
    yield from sorted(found)


def _is_dataset(folder: Path) -> bool:
    """Whether `datasets` saved it, asked as `load_from_disk` asks: other tools have a state.json too."""
    parts = [(folder / name).is_file() for name in ("dataset_info.json", "state.json")]
    return all(parts) or (folder / "dataset_dict.json").is_file()


def _splits(folder: Path) -> list[str]:
    """Names of the splits of a saved data set of several; without any where it is of one, or damaged."""
    try:
        return [str(name) for name in json.loads((folder / "dataset_dict.json").read_bytes())["splits"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _beir_part(source: Source, folder: Path, split: str) -> Part:
    """The queries of a benchmark with the documents that its judgements are about; their names are known."""
    members = {
        name: tuple(Part(str(file), format_of(file.name), file, Source(str(file))) for file in files)
        for name, files in find_files(folder, split).items()
    }
    if source.kind in ("corpus", "multiple-choice"):
        raise UserError(
            f"{source.path}: is a benchmark, whose rows are questions with their relevant documents, not of kind "
            f"{source.kind}: for the texts alone name {members['corpus'][0].name}"
        )
    return Part(source.path, "beir", folder, replace(source, fields={}), members=members)


def _dataset_part(source: Source, path: str, folder: Path | None) -> Part:
    """A saved data set (`folder`, or `folder@split`) or one of the hub (`hub:name`, `hub:name:config@split`)."""
    import datasets

    try:
        if folder is not None:
            split = "" if folder == Path(path) else path.rpartition("@")[2]
            data = datasets.load_from_disk(str(folder), keep_in_memory=False)
        else:
            address, _, split = path.removeprefix(HUB).partition("@")
            name, _, config = address.partition(":")
            data = datasets.load_dataset(name, config or None, keep_in_memory=False)
    except Exception as error:  # datasets raises anything from OSError to its own and the hub's types
        reason = one_line(error)
        raise UserError(f"{path}: datasets cannot load it ({reason})") from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            named = path.removesuffix(f"@{split}")
            raise UserError(
                f"{path}: has the splits {', '.join(data)}: name one, for example {named}@{next(iter(data))}"
            )
        data = data[split]
    elif split and split != str(data.split):
        what = f"the split {data.split} alone" if data.split else "no splits"
        raise UserError(f"{path}: has {what}: leave out @{split} to read it whole")
    return Part(path, "datasets", folder or Path(), source, dataset=data)
