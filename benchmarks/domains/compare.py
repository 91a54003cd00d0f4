"""Compare derived domains with others of the same form: sizes, lengths, overlap and how hard they are for BM25.

    python -m benchmarks.domains.compare --ours DIR --others DIR [--out benchmarks/results]

For every domain that both folders have: rows, entities, median words of question and answer, how many of one side's
questions and entities (by id) the other has too, and BM25 over all answers on 1,000 questions (seed 0). A question
counts as found where any copy of its answer is.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import jsonl
from benchmarks.domains.rules import squeeze
from lbr_dist.errors import UserError, told
from lbr_dist.inference.bm25 import BM25

DOMAINS = ("chemistry", "medicine", "code")
CUTOFF = 10


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, required=True, help="folder that benchmarks.domains wrote")
    parser.add_argument("--others", type=Path, required=True, help="folder with files of the same names")
    parser.add_argument("--questions", type=int, default=1000, help="questions for BM25")
    parser.add_argument("--out", type=Path, help="folder for domains.json and domains.md")
    args = parser.parse_args(arguments)
    found = {}
    for domain in DOMAINS:
        name = f"{domain}.jsonl.gz"
        if (args.ours / name).is_file() and (args.others / name).is_file():
            found[domain] = compare(jsonl.read(args.ours / name), jsonl.read(args.others / name), args.questions)
    if not found:
        return told(UserError(f"--ours {args.ours}, --others {args.others}: no DOMAIN.jsonl.gz that both of them have"))
    text = markdown(found)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        head = {"date": date.today().isoformat(), "command": "python -m benchmarks.domains.compare"}
        (args.out / "domains.json").write_text(json.dumps({**head, "domains": found}, indent=1) + "\n")
        (args.out / "domains.md").write_text(text + "\n")
    return 0


def compare(ours: list[jsonl.Row], others: list[jsonl.Row], questions: int) -> dict[str, dict[str, Any]]:
    """Both sides of one domain."""
    sides = {"ours": ours, "others": others}
    asked = {side: {squeeze(row["question"]) for row in rows} for side, rows in sides.items()}
    entities = {side: {row["id"].rpartition(":")[0] for row in rows} for side, rows in sides.items()}
    return {
        side: {
            "rows": len(rows),
            "entities": len(entities[side]),
            "shared_questions": len(asked["ours"] & asked["others"]),
            "shared_entities": len(entities["ours"] & entities["others"]),
            "question_words": int(statistics.median(len(row["question"].split()) for row in rows)),
            "answer_words": int(statistics.median(len(row["answer"].split()) for row in rows)),
            **bm25(rows, questions),
        }
        for side, rows in sides.items()
    }


def bm25(rows: list[jsonl.Row], questions: int, seed: int = 0) -> dict[str, float]:
    """Recall@10 and nDCG@10 over all distinct answers, on a random choice of questions."""
    answers = {answer: number for number, answer in enumerate(dict.fromkeys(row["answer"] for row in rows))}
    chosen = random.Random(seed).sample(rows, min(questions, len(rows)))
    found_QK, _ = BM25(list(answers)).search([row["question"] for row in chosen], CUTOFF)
    hits_QK = found_QK == np.array([[answers[row["answer"]]] for row in chosen])
    gains_K = 1 / np.log2(np.arange(hits_QK.shape[1]) + 2)
    return {"recall": float(hits_QK.any(axis=1).mean()), "ndcg": float((hits_QK * gains_K).sum(axis=1).mean())}


def markdown(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table."""
    columns = {
        **{"rows": ",d", "entities": ",d", "shared_questions": ",d", "shared_entities": ",d"},
        **{"question_words": "d", "answer_words": "d", "recall": ".3f", "ndcg": ".3f"},
    }
    lines = [
        "| domain | side | rows | entities | shared questions | shared entities | median words of a question | "
        "of an answer | BM25 Recall@10 | nDCG@10 |",
        "| --- | --- |" + " ---: |" * len(columns),
    ]
    for domain, sides in found.items():
        for side, values in sides.items():
            cells = [format(values[key], style) for key, style in columns.items()]
            lines.append(f"| {domain} | {side} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
