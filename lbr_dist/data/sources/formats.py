"""What a file holds, by the ending of its name."""

from __future__ import annotations

import re

from lbr_dist.data.sources.compressed import ENDINGS
from lbr_dist.errors import UserError

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".tar": "tar",
}
"""Format of a file by the ending of its name, which one of `compressed.ENDINGS` may follow (not with .parquet)."""
UNITS = {
    "jsonl": "line",
    "json": "item",
    "csv": "line",
    "tsv": "line",
    "text": "line",
    "tar": "sample",
    "beir": "query",
}
"""What a row is called in a message; elsewhere it is a row."""
ENDING = re.compile(
    rf"({'|'.join(map(re.escape, FORMATS))})({'|'.join(map(re.escape, ENDINGS))})?(?=$|[\s'\"?#|])", re.IGNORECASE
)


def is_source(name: str) -> bool:
    """Whether the name of a file ends as one of `FORMATS`; an address or a command may go on behind the ending."""
    return any(match.end() == len(name) for match in ENDING.finditer(name))


def format_of(name: str) -> str:
    """The format of a file, or of what an address or a command ends in.

    Raises:
        UserError: the ending is none of `FORMATS`.
    """
    endings = ENDING.findall(name)
    if not endings:
        raise UserError(
            f"{name}: unknown format; names end in {', '.join(FORMATS)}, then {', '.join(ENDINGS)} if compressed"
        )
    return FORMATS[endings[-1][0].lower()]
