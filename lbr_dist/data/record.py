"""The one record that every source becomes, and the normal form in which two texts count as the same.

A record is either a question with its answer or a plain text. Records are small and frozen: rows stream through, and
nothing downstream may change them. The normal form (`normalise`) is deliberately coarse, because it decides what may
not be shared between training and evaluation: merging two texts that differ in case or in a final full stop costs
nothing, missing such a pair is a leak. Which answer is right is another question, for which there is `exact`.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

BATCH = 2048
"""Most records that are hashed, tokenized or compared at once,"""
BATCH_CHARACTERS = 1 << 20
"""and about how many characters: what bounds the memory of a preparation."""
ALPHABETIC = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
"""Scripts of letters that have no spaces between words (Thai, Lao, Burmese, Khmer), for a pattern's set;"""
SPACELESS = ALPHABETIC + "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""with kana and Han, all that have none."""
MARKS = "".join(mark for mark in map(chr, range(0x300, 0x10000)) if unicodedata.category(mark) in ("Mn", "Mc"))
"""Marks that stand behind a letter, as the vowels of Hindi, and are none to Python, for a pattern's set."""


@dataclass(frozen=True, slots=True)
class Record:
    """A question with its answer (`question` and `answer` set), or a plain text (`text` set); never both."""

    id: str
    """Unique in a prepared set."""
    question: str | None = None
    """The question, the query, or the stem of a multiple-choice question with its options."""
    answer: str | None = None
    """The answer, the relevant document, or the right option."""
    text: str | None = None
    """A document of a plain corpus."""
    domain: str = ""
    """Name of the domain, for tables."""
    source: str = ""
    """Where the record comes from, for the model card."""
    negatives: tuple[str, ...] = ()
    """Texts that look like an answer and are none (hard negatives)."""
    positives: tuple[str, ...] = ()
    """Further right answers beside `answer`."""

    @property
    def is_text(self) -> bool:
        """Whether this is a plain text."""
        return self.text is not None

    @property
    def document(self) -> str:
        """The text that retrieval looks for: the answer, or the plain text."""
        document = self.text if self.text is not None else self.answer
        assert document is not None
        return document

    @property
    def characters(self) -> int:
        """Characters of all its texts."""
        texts = (self.question, self.answer, self.text, *self.negatives, *self.positives)
        return sum(len(text) for text in texts if text is not None)

    def as_dict(self) -> dict[str, Any]:
        """`{id, text}`, or `{id, question, answer, domain, source}`; `negatives`, `positives` if there are any."""
        if self.text is not None:
            return {"id": self.id, "text": self.text}
        row: dict[str, Any] = {
            "id": self.id,
            "question": self.question,
            "answer": self.answer,
            "domain": self.domain,
            "source": self.source,
        }
        if self.negatives:
            row["negatives"] = list(self.negatives)
        if self.positives:
            row["positives"] = list(self.positives)
        return row

    def to_json(self) -> bytes:
        """UTF-8 JSON with sorted keys: equal records give equal bytes."""
        return json.dumps(self.as_dict(), ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Record:
        """Inverse of `as_dict`; trusts its input, which a prepared set's checksum vouches for."""
        row = dict(row)
        for name in ("negatives", "positives"):
            if name in row:
                row[name] = tuple(row[name])
        return cls(**row)


def _end_characters() -> str:
    """Spaces, and punctuation that carries no meaning at the ends of a text ('C#', '5%' and '-5' keep theirs)."""
    kept = set("#%&@*\\/‰‱†‡")
    ends = []
    for code in range(min(sys.maxunicode, 0x3100)):
        character = chr(code)
        category = unicodedata.category(character)
        if character.isspace() or (category in ("Po", "Ps", "Pe", "Pi", "Pf") and character not in kept):
            ends.append(character)
    return "".join(ends)


_ENDS = _end_characters()
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
"""Soft hyphens, spaces of no width, marks of direction, variation selectors: Unicode's Default_Ignorable_Code_Point."""


def _alike() -> dict[str, str]:
    """Characters that are written for each other, each to the one that stands for all."""
    groups = {
        "'": "‘’‚‛′‵ʹʼ´",
        '"': "“”„‟″‶",
        "-": "‐‑‒–—―−",
        "i": "ı",
        "\u0627": "\u0622\u0623\u0625\u0671",  # alef
        "\u064a": "\u0649\u06cc",  # yeh
        "\u0643": "\u06a9",  # kaf
        "": "\u0640",  # tatweel
    }
    found = {other: one for one, others in groups.items() for other in others}
    found.update(
        (digit, str(unicodedata.decimal(digit))) for digit in map(chr, range(0x660, 0xFF00)) if digit.isdecimal()
    )
    for character in map(chr, (*range(0x370, 0x400), *range(0x1F00, 0x2000))):  # Greek capitals have no accents
        letter = unicodedata.normalize("NFD", character)[0]
        if letter != character and letter.isalpha():
            found[character] = letter
    return found


_ALIKE = _alike()
_ANY_ALIKE = re.compile(f"i\u0307|[{re.escape(''.join(_ALIKE))}]")  # Turkish capital i, casefolded


def _unify(text: str) -> str:
    return _ANY_ALIKE.sub(lambda found: _ALIKE.get(found[0], "i"), text)


def normalise(text: str) -> str:
    """Normal form for "is it the same text": NFKC, casefold, nothing invisible, single spaces, bare of end punctuation.

    Quotes, hyphens and digits are those of ASCII, and letters that are written for each other are one: Turkish i with
    and without its dot, Arabic and Persian yeh and kaf, forms of alef, Greek vowels with accents. A text of punctuation
    only keeps it, so that "?" and "!" stay different and nothing becomes empty.
    """
    if text.isascii():
        folded = text.lower()
    else:
        seen = _unify(INVISIBLE.sub("", text))
        folded = _unify(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", seen).casefold()))
    collapsed = " ".join(folded.split())
    return collapsed.strip(_ENDS) or collapsed or text


def exact(text: str) -> str:
    """Strict form, for which of two texts is right: NFC, single spaces, none at the ends.

    By case, superscripts or punctuation molecules, numbers and genes differ.
    """
    return unicodedata.normalize("NFC", " ".join(text.split()))


def normalised_hash(text: str) -> int:
    """64-bit hash (XXH64, as a signed integer) of the normal form of `text`; the `answer_hash` of the index."""
    return signed(xxhash.xxh64_intdigest(normalise(text).encode()))


def signed(value: int) -> int:
    """An unsigned 64-bit integer as the signed one of the same bits (Parquet and torch have no unsigned 64)."""
    return value - (1 << 64) if value >= 1 << 63 else value


def batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Neighbouring records in lists of at most `BATCH` records or about `BATCH_CHARACTERS` characters."""
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += record.characters
        if len(batch) == BATCH or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def content_id(*parts: str) -> str:
    """Deterministic id of a record that came without one: 32 hexadecimal digits (XXH3-128) of its content."""
    digest = xxhash.xxh3_128()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
