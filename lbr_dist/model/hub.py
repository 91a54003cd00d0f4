"""Models by their hub names: from the cache of the hub's client first, without a question to the network.

Left to themselves, its clients ask for a newer version of every file, and where there is no network (compute nodes
seldom have one) try each for half a minute: a start took five minutes. Nor should a run that is resumed meet another
version of its model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def snapshot(name: str) -> Path | None:
    """The folder of the cache with what has been fetched of a hub model, maybe not all; None for what is not there.

    Its name is the model's commit. Names without an owner may be sentence-transformers' own.
    """
    from huggingface_hub import snapshot_download

    for repository in (name,) if "/" in name else (name, f"sentence-transformers/{name}"):
        with contextlib.suppress(OSError, ValueError):  # the hub's errors, and names that cannot be
            return Path(snapshot_download(repository, local_files_only=True))
    return None


def cached_first(load: Callable[..., Any], path: str, *, needs: str = "config.json", **options: Any) -> Any:
    """`load(path, **options)`, by a hub name from the cache; what is not wholly there comes from the hub.

    Args:
        load: a loader of transformers or sentence-transformers. Given the cache's folder it asks nobody; given
            `local_files_only`, transformers still asks whether there is an adapter.
        path: model folder or hub name.
        needs: the file whose absence the loader would not take for an error.
    """
    folder = None if Path(path).exists() else snapshot(path)
    if folder is not None and (folder / needs).exists():
        with contextlib.suppress(OSError, ValueError):
            return load(str(folder), **options)
    return load(path, **options)
