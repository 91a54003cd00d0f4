"""Derive a domain from installed packages.

    python -m benchmarks.domains chemistry|medicine|code --out DIR [--emboss FILE|none]

Writes `DOMAIN.jsonl.gz` (rows `{id, question, answer, domain, source}`; one entity is the id without its last `:n`),
`DOMAIN.corpus.txt.gz` (raw text, a text a line; none for code) and `DOMAIN.manifest.json`. See README.md for what each
domain is made of and the licences of its sources.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.domains import chemistry, derived, functions, medicine
from lbr_dist.errors import EXIT_USER_ERROR, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=["chemistry", "medicine", "code"])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--emboss",
        metavar="FILE",
        help="chemistry: chebi.obo of Debian's emboss-data, or `none` (default: where Debian puts it, if it is there)",
    )
    args = parser.parse_args(arguments)
    try:
        if args.domain == "chemistry":
            made = chemistry.derive(_emboss(args.emboss))
        else:
            made = medicine.derive() if args.domain == "medicine" else functions.derive()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    manifest = derived.write(made, args.out)
    for source, count in manifest["rows_by_source"].items():
        print(f"{count:8,}  {source}")
    print(
        f"{manifest['rows']:8,}  rows of {manifest['entities']:,} entities; {manifest['corpus_lines']:,} lines of text"
    )
    return 0


def _emboss(value: str | None) -> Path | None:
    if value is None:
        return chemistry.EMBOSS if chemistry.EMBOSS.is_file() else None
    return None if value == "none" else Path(value)


if __name__ == "__main__":
    sys.exit(main())
