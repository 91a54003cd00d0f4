"""Small domains to prepare, and what comes of it."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

from lbr_dist.data.preparation.prepare import PrepareReport, prepare
from lbr_dist.data.shard_reader import ShardReader
from lbr_dist.data.shards import open_set


class Bytes:
    """A tokenizer of one token per byte."""

    fingerprint = "bytes-1"
    path = "models/bytes"

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


WORDS = [f"word{i}" for i in range(3000)]


def sentence(rng: random.Random, words: int = 25) -> str:
    return " ".join(rng.sample(WORDS, words))


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def domain(seed: int = 0) -> list[dict]:
    """100 entities: two to four questions each for one answer, which is near-duplicated now and then."""
    rng = random.Random(seed)
    rows = []
    for entity in range(100):
        answer = sentence(rng)
        for number in range(rng.randint(2, 4)):
            own = answer if number % 2 == 0 else answer.rsplit(" ", 1)[0] + " changed"
            rows.append({"id": f"e{entity}:{number}", "question": f"What is t{entity}x{number}?", "answer": own})
    return rows


def run(sources: list[str], out: Path, **settings: Any) -> PrepareReport:
    return prepare(sources, out, tokenizer=Bytes(), **settings)  # type: ignore[arg-type]


def everything(out: Path) -> dict[str, list[dict]]:
    opened = open_set(out)
    found = {}
    for split, info in opened.splits.items():
        found[split] = ShardReader(opened, split).read(range(info.records)) if info.records else []
    return found


def questions_and_texts(folder: Path) -> list[str]:
    """The domain's questions, and a corpus of which many texts hold its answers."""
    rng = random.Random(9)
    rows = domain()
    write(folder / "qa.jsonl", rows)
    texts = [sentence(rng) for _ in range(50)]
    texts += [f"Page {i}: {row['answer']}, as {sentence(rng, 30)}" for i, row in enumerate(rows)]  # quotes
    texts += [row["answer"].upper() + "." for row in rows]  # the same, normalised
    with gzip.open(folder / "corpus.txt.gz", "wt") as file:
        file.write("\n".join(texts))
    return [str(folder / "qa.jsonl"), str(folder / "corpus.txt.gz")]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
