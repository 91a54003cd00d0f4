"""A domain's rows as prepared sets: training sides and two evaluation sets that share no entity with them.

    DOMAIN.jsonl[.gz]        rows `{id, question, answer, domain, source}`; an entity is the id without its last `:n`
    DOMAIN.corpus.txt[.gz]   raw text, a document per line; without it the GL side's answers are the raw text

One question each of some entities is held out: `dev` for choosing learning rates, `test` for the tables. Everything
else about these entities is left out of training here, by entity, and `lbr prepare --decontaminate` leaves out what
shares a question, an answer or most of its text with them. The rest is split 3 : 1 into GL and CL, by entity.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks import jsonl
from benchmarks.commands import Lbr
from benchmarks.jsonl import Row
from benchmarks.paper.scales import Scale
from lbr_dist.data.shards import open_set

ENTITY = r"id~^(.*):[^:]*$"
CL_SHARE = "0.25"
TEXT_ROWS = 40_000
"""Most raw documents that are prepared; the runs read fewer."""


def entity(row: Row) -> str:
    """The entity of a row: its id without the last part."""
    return row["id"].rpartition(":")[0]


def hold_out(rows: list[Row], dev: int, test: int) -> tuple[list[Row], list[Row], list[Row]]:
    """One question of each of `dev` and `test` entities, and the rows of all other entities; always the same."""
    of: dict[str, list[Row]] = {}
    for row in rows:
        of.setdefault(entity(row), []).append(row)
    chance = random.Random(0)
    names = chance.sample(sorted(of), min(dev + test, len(of) // 2))
    chosen = [chance.choice(of[name]) for name in names]
    held = set(names)
    split = len(chosen) * dev // (dev + test)
    return chosen[:split], chosen[split:], [row for row in rows if entity(row) not in held]


def make_data(lbr: Lbr, source: Path, domain: str, scale: Scale) -> None:
    """Prepare `data/domain`, `halves`, `swapped`, `text`, `dev` and `test` in the command's folder."""
    out = lbr.folder
    dev, test, rest = hold_out(jsonl.read(find(source, f"{domain}.jsonl")), scale.dev, scale.test)
    for name, rows in (("dev", dev), ("test", test), ("qa", rest)):
        jsonl.write(out / f"{name}.jsonl", rows)
    scale.backbone(out / "base-0", [out / "qa.jsonl"], 0)
    outside = ("--decontaminate", "dev.jsonl", "--decontaminate", "test.jsonl")
    common = ("--tokenizer", "base-0", "--domain", domain, "--eval", "0", *outside)
    for name, share in (("domain", CL_SHARE), ("halves", "0.5")):
        lbr(
            f"prepare-{name}",
            "prepare",
            "qa.jsonl",
            "--out",
            f"data/{name}",
            *common,
            "--entity",
            ENTITY,
            "--cl",
            share,
        )
    make_swapped(lbr, common)
    jsonl.write(out / "text.jsonl", raw_text(source, domain, out, rest))
    lbr("prepare-text", "prepare", "text.jsonl", "--out", "data/text", *common, "--kind", "corpus", "--cl", "0")
    for name in ("dev", "test"):
        lbr(
            f"prepare-{name}", "prepare", f"{name}.jsonl", "--out", f"data/{name}", "--name", domain,
            "--tokenizer", "base-0", "--gl", "0", "--cl", "0", "--eval", "rest",
        )  # fmt: skip


def make_swapped(lbr: Lbr, common: tuple[str, ...]) -> None:
    """Prepare `data/swapped`: the GL side with answers as questions, so that passages go through Z in stage 1 too."""
    gl = set(open_set(lbr.folder / "data" / "domain").index("gl").ids)
    rows = (
        {**row, "question": row["answer"], "answer": row["question"]}
        for row in jsonl.read(lbr.folder / "qa.jsonl")
        if row["id"] in gl
    )
    jsonl.write(lbr.folder / "swapped.jsonl", rows)
    lbr("prepare-swapped", "prepare", "swapped.jsonl", "--out", "data/swapped", *common, "--cl", "0")


def raw_text(source: Path, domain: str, out: Path, rows: Iterable[Row]) -> Iterator[Row]:
    """Documents `{id, text}`: lines of the corpus, drawn at random, or answers of the GL side."""
    try:
        file = find(source, f"{domain}.corpus.txt")
    except SystemExit:
        gl = set(open_set(out / "data" / "domain").index("gl").ids)
        texts = [row["answer"] for row in rows if row["id"] in gl]
    else:
        with jsonl.open_text(file, "r") as lines:
            texts = [line.strip() for line in lines if line.strip()]
    for number in sorted(random.Random(0).sample(range(len(texts)), min(TEXT_ROWS, len(texts)))):
        yield {"id": f"text:{number}", "text": texts[number]}


def find(source: Path, name: str) -> Path:
    """A file of the domain, as it is or gzipped.

    Raises:
        SystemExit: it is not there.
    """
    for file in (source / name, source / f"{name}.gz"):
        if file.is_file():
            return file
    raise SystemExit(f"{source / name}[.gz] is not there; derive it: python -m benchmarks.domains --help")
