"""Which rows of the domain each side of the quickstart gets.

The evaluation asks what a word match cannot answer: one question for each of `QUESTIONS` entities, of those whose
question shares at most half of its content words with its answer. Everything about these entities is taken out of the
training side here, by entity, and `lbr prepare --decontaminate` takes out what is left of them by content.

Stage 1 reads *pairs*: each name of an entity with each other name, and each name with the definition, both ways. That
is question–answer data like any other (paper section 3.2, SFT style); it teaches that a text and its meaning belong
together whichever side is asked.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from benchmarks.jsonl import Row
from benchmarks.quickstart.domain import content_words

QUESTIONS = 1000
OVERLAP = 0.5
"""Largest share of an evaluation question's content words that its answer may have."""
NAMES = 6
"""Most names of one entity that are paired: the number of pairs grows with its square."""


def entity(row: Row) -> str:
    """The entity of a row: its id without the last part."""
    return row["id"].rpartition(":")[0]


def is_hard(row: Row) -> bool:
    """Whether a word match would not find the answer."""
    words = content_words(row["question"])
    return bool(words) and len(words & content_words(row["answer"])) <= OVERLAP * len(words)


def choose_evaluation(qa: list[Row], seed: int = 0) -> list[Row]:
    """One hard question for each of `QUESTIONS` entities; the same for the same seed."""
    hard: dict[str, Row] = {}
    for row in qa:
        if is_hard(row):
            hard.setdefault(entity(row), row)
    chosen = random.Random(seed).sample(sorted(hard), min(QUESTIONS, len(hard) // 2))
    return [hard[name] for name in chosen]


def pair_rows(qa: list[Row], corpus: list[Row], entities: set[str]) -> Iterator[Row]:
    """The pairs of stage 1, for the entities of the GL side."""
    names: dict[str, list[str]] = {}
    answers: dict[str, str] = {}
    for row in corpus:
        if entity(row) in entities and row["id"].endswith(":c0"):
            answers[entity(row)] = row["text"]
            names[entity(row)] = [row["text"].partition(": ")[0]]
    for row in qa:
        if entity(row) in names and len(names[entity(row)]) < NAMES:
            names[entity(row)].append(row["question"])
    for name, known in names.items():
        answer = answers[name]
        pairs = [(a, b) for a in known for b in known if a != b]
        if ": " in answer:
            pairs += [(answer, each) for each in known] + [(each, answer) for each in known[1:]]
        for number, (question, target) in enumerate(pairs):
            yield {"id": f"{name}:p{number}", "question": question, "answer": target, "domain": "medicine"}
