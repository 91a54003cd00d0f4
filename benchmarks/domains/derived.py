"""Write a derived domain: rows, raw text and a manifest of what they came from.

The same package versions give the same bytes: rows are in the order of a hash of their ids (so that any part of the
file is a fair sample), raw text in the order of its sources, gzip without a time stamp. The manifest's checksums are of
the uncompressed content, because zlib builds differ in how they compress.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import jsonl
from benchmarks.domains.packages import Source
from benchmarks.domains.rules import digest

LINE_CHARACTERS = 30
"""Shorter lines of raw text say nothing."""


@dataclass
class Derived:
    """A domain before it is written."""

    domain: str
    rows: list[jsonl.Row]
    texts: list[str] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)


def write(derived: Derived, out: Path) -> dict[str, Any]:
    """Write `DOMAIN.jsonl.gz`, `DOMAIN.corpus.txt.gz` where there is raw text, and `DOMAIN.manifest.json`.

    Returns:
        The manifest.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = sorted(derived.rows, key=lambda row: digest(row["id"]))
    texts = [text for text in dict.fromkeys(derived.texts) if len(text) >= LINE_CHARACTERS]
    files = [out / f"{derived.domain}.jsonl.gz"]
    jsonl.write(files[0], rows)
    if texts:
        files.append(out / f"{derived.domain}.corpus.txt.gz")
        with jsonl.open_text(files[1], "w") as file:
            file.writelines(f"{text}\n" for text in texts)
    manifest = {
        "domain": derived.domain,
        "python": platform.python_version(),
        "rows": len(rows),
        "entities": len({row["id"].rpartition(":")[0] for row in rows}),
        "rows_by_source": dict(sorted(Counter(row["source"] for row in rows).items())),
        "corpus_lines": len(texts),
        "sources": [asdict(source) for source in derived.sources],
        "sha256_of_content": {file.name: content_hash(file) for file in files},
    }
    (out / f"{derived.domain}.manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def content_hash(path: Path) -> str:
    """SHA-256 of a gzipped text file's content."""
    with jsonl.open_text(path, "r") as file:
        return hashlib.sha256(file.read().encode()).hexdigest()
