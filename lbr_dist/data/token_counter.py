"""Count the tokens of records' texts, for the index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import xxhash

from lbr_dist.data.record import Record

KNOWN_TEXTS = 200_000
"""Texts whose token counts are remembered."""


class Tokens(Protocol):
    """What writing needs of `lbr_dist.model.tokenizer.Tokenization`."""

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the tokens of a text."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, with no special tokens and no truncation."""


class TokenCounter:
    """Token counts of texts; one that occurred lately is not tokenized again (questions share their answers)."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self._known: dict[int, int] = {}

    def columns(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """The token columns of each record's index row."""
        if len(self._known) > KNOWN_TEXTS:
            self._known.clear()
        new: dict[int, str] = {}
        keys: list[list[int | None]] = []
        for record in records:
            row: list[int | None] = []
            for text in (record.question, record.answer, record.text, *record.negatives, *record.positives):
                key = None if text is None else xxhash.xxh3_64_intdigest(text.encode())
                if text is not None and key is not None and key not in self._known:
                    new[key] = text
                row.append(key)
            keys.append(row)
        for key, ids in zip(new, self.tokens.encode(list(new.values())), strict=True):
            self._known[key] = len(ids)
        counts = [[-1 if key is None else self._known[key] for key in row] for row in keys]
        columns = []
        for record, (question, answer, plain, *others) in zip(records, counts, strict=True):
            split = len(record.negatives)
            columns.append(
                {
                    "question_tokens": question,
                    "answer_tokens": answer,
                    "text_tokens": plain,
                    "negative_tokens": others[:split],
                    "positive_tokens": others[split:],
                }
            )
        return columns
