"""Which folders and hub names a model is read from, and what of them changes when its vectors may."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import xxhash

ADAPTER = "adapter_config.json"
"""Names the model that an adapter of PEFT is put on."""
PIECE_BYTES = 1 << 20
PIECES = 64
"""Of a file so many, evenly spread, are read: the whole of a small one, some hundred MiB of a model of 7B."""


def identity(name: str) -> list[str]:
    """Lines that change when the model of a folder or hub name does, or of an adapter's base.

    Of a folder's files their names, sizes, times and pieces: files that were unpacked with the times that an archive
    gives to all differ in these. Of a hub name the commit (the one in the local cache, else the hub's newest).
    """
    lines: list[str] = []
    for origin in origins(name):
        if origin != name:
            lines.append(origin)
        if Path(origin).is_dir():
            lines += [_line(file, Path(origin)) for file in _files(Path(origin))]
        else:
            lines.append(_commit(origin))
    return lines


def origins(name: str) -> list[str]:
    """A folder or hub name, and behind it that of the base, if it is an adapter's."""
    found = [name]
    for origin in found:
        folder = _here(origin)
        for file in [] if folder is None else [folder / ADAPTER, *sorted(folder.glob(f"*/{ADAPTER}"))]:
            with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):  # none, or a damaged one
                base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
                found += [base] * (isinstance(base, str) and base not in ("", *found))
    return found


def folders(folder: Path) -> list[Path]:
    """A folder and all in it, also those that links lead to, each once."""
    real = Path(os.path.realpath(folder))
    found, seen = [], {str(place) for place in (real, *real.parents)}
    for place, inner, _ in os.walk(folder, followlinks=True):
        found.append(Path(place))
        places = {name: os.path.realpath(Path(place, name)) for name in inner}
        inner[:] = [name for name in sorted(inner) if places[name] not in seen]
        seen.update(places.values())
    return found


def _here(name: str) -> Path | None:
    from lbr_dist.model.hub import snapshot

    return Path(name) if Path(name).is_dir() else snapshot(name)


def _files(folder: Path) -> list[Path]:
    return sorted(file for place in folders(folder) for file in place.iterdir() if file.is_file())


def _line(file: Path, folder: Path) -> str:
    """What is known of a file; one that may not be read is known by its size and time."""
    status, digest = file.stat(), xxhash.xxh3_128()
    with contextlib.suppress(OSError), file.open("rb") as source:
        last, count = max(0, status.st_size - PIECE_BYTES), min(PIECES, -(-status.st_size // PIECE_BYTES))
        for number in range(count):
            source.seek(last * number // max(1, count - 1))
            digest.update(source.read(PIECE_BYTES))
    return f"{file.relative_to(folder)} {status.st_size} {status.st_mtime_ns} {digest.hexdigest()}"


def _commit(name: str) -> str:
    """Commit of a hub model as it would be loaded now; empty where there is none of that name."""
    from huggingface_hub import hf_hub_download

    from lbr_dist.model.hub import snapshot

    cached = snapshot(name)
    if cached is not None:
        return cached.name
    repository = name if "/" in name else f"sentence-transformers/{name}"
    for file in ("modules.json", "config.json"):
        with contextlib.suppress(OSError, ValueError):  # the hub's errors, and names that cannot be
            return Path(hf_hub_download(repository, file)).parent.name
    return ""
