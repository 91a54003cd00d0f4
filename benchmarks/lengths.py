"""Real lengths without the texts: (|X|, |Y|) in tokens of rows of three domains, and of two raw corpora.

    python -m benchmarks.lengths DIR        # writes benchmarks/lengths.json again

How long a step takes depends on the lengths of its samples and not on what they say; with the lengths in the
repository, a speed measured on one machine can be measured again on another that has none of the texts. DIR holds
`NAME.jsonl.gz` (rows `{id, question, answer}`) and `NAME.corpus.txt.gz` (a document a line). One byte-level BPE
tokenizer of 16,000 tokens is trained on all of them; Y counts its end-of-sequence token; a document has X = 0.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

FILE = Path(__file__).parent / "lengths.json"
ROWS = 1500
"""Rows kept of each source, drawn at random."""
VOCABULARY = 16_000


def load(*names: str) -> list[tuple[int, int]]:
    """(|X|, |Y|) of the named sources, one behind the other, each in random order; no name: of all of them."""
    known = json.loads(FILE.read_text())["lengths"]
    return [(x, y) for name in names or known for x, y in known[name]]


def documents(*names: str, least: int = 8) -> list[int]:
    """Lengths of the named raw corpora's documents that have at least `least` tokens."""
    return [y for x, y in load(*names) if x == 0 and y >= least]


def main() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    sources: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(folder.glob("*.gz")):
        lines = [line for line in gzip.decompress(path.read_bytes()).decode().split("\n") if line.strip()]
        random.Random(0).shuffle(lines)
        if path.name.endswith(".corpus.txt.gz"):
            sources[path.name.removesuffix(".txt.gz")] = [("", line) for line in lines]
        else:
            rows = [json.loads(line) for line in lines]
            sources[path.name.removesuffix(".jsonl.gz")] = [(row["question"], row["answer"]) for row in rows]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = (f"{x}\n{y}" for pairs in sources.values() for x, y in pairs[: 4 * ROWS])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))

    def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    lengths = {name: [(count(x), count(y) + 1) for x, y in pairs[:ROWS]] for name, pairs in sources.items()}
    about = f"|X|, |Y| in tokens of {ROWS} rows of each source: see benchmarks/lengths.py"
    parts = [f" {json.dumps(name)}: {json.dumps(values, separators=(',', ':'))}" for name, values in lengths.items()]
    FILE.write_text(f'{{"about": {json.dumps(about)}, "lengths": {{\n' + ",\n".join(parts) + "\n}}\n")


if __name__ == "__main__":
    main()
