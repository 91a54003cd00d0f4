"""A domain's rows as prepared sets: training sides and two evaluation sets that share no entity with them.

    DOMAIN.jsonl[.gz]        rows `{id, question, answer, domain, source}`; an entity is the id without its last `:n`
    DOMAIN.corpus.txt[.gz]   raw text, a document per line; without it the GL side's answers are the raw text

One question each of some entities is held out: `dev` for choosing learning rates, `test` for the tables. Everything
else about these entities is left out of training here, by entity, and `lbr prepare --decontaminate` leaves out what
shares a question, an answer or most of its text with them. The rest is split 3 : 1 into GL and CL, by entity.

Raw text is prepared twice: `text`, which the language model of `small` is made from and which may name what is held
out, as the text behind any pretrained model may; and `text_apart`, for the arms whose stage 1 is raw text, without the
documents that do.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks import jsonl
from benchmarks.commands import Lbr
from benchmarks.jsonl import Row
from benchmarks.paper.scales import Scale
from lbr_dist.data.shards import open_set
from lbr_dist.errors import UserError

ENTITY = r"id~^(.*):[^:]*$"
CL_SHARE = "0.25"
VERSION = 2
"""Of what `make_data` makes from the same rows."""
BANDS = (92, 184, 368)
"""Longest question, in tokens, of each band of `strata` but the last."""
TEXT_ROWS = 40_000
"""Most raw documents that are prepared; the runs read fewer."""
WORDS = re.compile(r"\w+")


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
    """Prepare `domain`, `halves`, `swapped`, `strata`, `text`, `text_apart`, `dev` and `test` in the folder `data`."""
    out = lbr.folder
    everything = jsonl.read(find(source, f"{domain}.jsonl"))
    dev, test, rest = hold_out(everything, scale.dev, scale.test)
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
    make_strata(lbr, common)
    held = {entity(row) for row in (*dev, *test)}
    texts = raw_text(source, domain, out, rest)
    for name, wanted in (("text", None), ("text_apart", naming_none(row for row in everything if entity(row) in held))):
        jsonl.write(out / f"{name}.jsonl", drawn(texts, wanted))
        lbr(
            f"prepare-{name}", "prepare", f"{name}.jsonl", "--out", f"data/{name}", *common, "--kind", "corpus",
            "--cl", "0",
        )  # fmt: skip
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


def make_strata(lbr: Lbr, common: tuple[str, ...]) -> None:
    """Prepare `data/strata`: as many rows of `data/swapped` from each band of question length as the smallest has."""
    index = open_set(lbr.folder / "data" / "swapped").index("gl")
    chosen = {index.ids[number] for number in stratified([int(length) for length in index.question_tokens])}
    rows = (row for row in jsonl.read(lbr.folder / "swapped.jsonl") if row["id"] in chosen)
    jsonl.write(lbr.folder / "strata.jsonl", rows)
    lbr("prepare-strata", "prepare", "strata.jsonl", "--out", "data/strata", *common, "--cl", "0")


def stratified(lengths: list[int]) -> list[int]:
    """Numbers of rows, equally many from each band of length, drawn at random; always the same. A band with less than a
    tenth of the rows is one with the band below it."""
    bands: list[list[int]] = [[] for _ in (*BANDS, None)]
    for number, length in enumerate(lengths):
        bands[bisect_left(BANDS, length)].append(number)
    for upper in range(len(bands) - 1, 0, -1):
        if len(bands[upper]) < len(lengths) / 10:
            bands[upper - 1] += bands.pop(upper)
    count = min(map(len, bands))
    chance = random.Random(0)
    return sorted(number for band in bands for number in chance.sample(sorted(band), count))


def raw_text(source: Path, domain: str, out: Path, rows: Iterable[Row]) -> list[str]:
    """Documents: lines of the corpus, or answers of the GL side."""
    try:
        file = find(source, f"{domain}.corpus.txt")
    except UserError:
        gl = set(open_set(out / "data" / "domain").index("gl").ids)
        return [row["answer"] for row in rows if row["id"] in gl]
    with jsonl.open_text(file, "r") as lines:
        return [line.strip() for line in lines if line.strip()]


def drawn(texts: list[str], wanted: Callable[[str], bool] | None) -> Iterator[Row]:
    """Documents `{id, text}` that are `wanted`, at most `TEXT_ROWS` of them, drawn at random; always the same."""
    numbers = [number for number, text in enumerate(texts) if wanted is None or wanted(text)]
    for number in sorted(random.Random(0).sample(numbers, min(TEXT_ROWS, len(numbers)))):
        yield {"id": f"text:{number}", "text": texts[number]}


def naming_none(rows: Iterable[Row]) -> Callable[[str], bool]:
    """Whether a text is without every name of these rows: the term of `What is TERM?`, and of `NAME: definition`. Names
    are compared word by word, in lower case."""
    names: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for row in rows:
        term, name = re.fullmatch(r"What is (.*)\?", row["question"]), re.match(r"(.*?): ", row["answer"])
        for found in (term, name):
            if found and (words := tuple(WORDS.findall(found[1].lower()))):
                names[words[0]].add(words)

    def wanted(text: str) -> bool:
        words = WORDS.findall(text.lower())
        return not any(
            tuple(words[at : at + len(name)]) == name for at, word in enumerate(words) for name in names.get(word, ())
        )

    return wanted


def find(source: Path, name: str) -> Path:
    """A file of the domain, as it is or gzipped.

    Raises:
        UserError: it is not there.
    """
    for file in (source / name, source / f"{name}.gz"):
        if file.is_file():
            return file
    raise UserError(f"{source / name}[.gz] is not there; derive it: python -m benchmarks.domains --help")
