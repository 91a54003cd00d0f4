"""What makes a name worth asking for: rules that chemistry and medicine share.

A question must not be answered by matching its words, or it says nothing about knowledge. A name is asked for only if
it does not stand in its answer (in any spacing, case or number) nor holds all words of the official name, if at most
half of its words occur in the answer, if it names one entity of the domain and no other, and if its length is that of a
name. Of an entity's names two are asked, chosen by a hash: the order in the source (alphabetical, or by popularity)
would favour abbreviations or trade names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

from benchmarks.jsonl import Row
from benchmarks.quickstart.domain import Term, content_words

NAME_CHARACTERS = (4, 120)
DEFINITION_CHARACTERS = 40
"""A shorter definition tells two entities hardly apart."""
NAMES_AN_ENTITY = 2

_NOT_A_WORD = re.compile(r"[\W_]+")
_LETTERS = re.compile(r"[^\W\d_]{2}")


def squeeze(text: str) -> str:
    """Letters and digits only, lower-cased: equal for every spelling with other spaces and hyphens."""
    return _NOT_A_WORD.sub("", text.lower())


def digest(text: str) -> str:
    """A fixed pseudo-random key, the same on every machine."""
    return hashlib.sha256(text.encode()).hexdigest()


def few_words_seen(question: str, answer: str) -> bool:
    """At most half of the question's content words occur in the answer, and one does not."""
    words = content_words(question)
    unseen = words - content_words(answer)
    return bool(unseen) and 2 * len(unseen) >= len(words)


def holds(text: str, name: str) -> bool:
    """Whether the text has every content word of a name."""
    words = content_words(name)
    return bool(words) and words <= content_words(text)


def askable(name: str, term: Term) -> bool:
    """Whether a question for this name of a term asks for more than a word match."""
    shortest, longest = NAME_CHARACTERS
    squeezed = squeeze(name)
    return (
        shortest <= len(name) <= longest
        and _LETTERS.search(name) is not None
        and squeezed.removesuffix("s") not in squeeze(term.answer)
        and not holds(name, term.name)
        and few_words_seen(name, term.answer)
    )


def ambiguous(terms: Iterable[Term]) -> set[str]:
    """Squeezed names and synonyms that belong to several entities."""
    owner: dict[str, str] = {}
    several: set[str] = set()
    for term in terms:
        for name in (term.name, *term.names):
            key = squeeze(name)
            if owner.setdefault(key, term.id) != term.id:
                several.add(key)
    return several


def synonym_rows(terms: Iterable[Term], several: set[str], domain: str, question: str = "What is {}?") -> Iterator[Row]:
    """One row for each name worth asking for, at most `NAMES_AN_ENTITY` an entity; `several` are ambiguous names."""
    for term in terms:
        if len(term.definition) < DEFINITION_CHARACTERS:
            continue
        names = {squeeze(name): name for name in term.names if askable(name, term)}
        keys = sorted(names.keys() - several, key=lambda key: digest(f"{term.id} {key}"))
        for number, key in enumerate(keys[:NAMES_AN_ENTITY]):
            yield {
                "id": f"{term.id}:{number}",
                "question": question.format(names[key]),
                "answer": term.answer,
                "domain": domain,
                "source": term.source,
            }
