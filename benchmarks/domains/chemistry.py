"""Chemistry: a name of a compound to its ChEBI definition (the paper's aspirin).

Definitions are ChEBI's, from `cellxgene-ontology-guide`, which has no synonyms. Names come from two places:

- ChEBI release 105 in Debian's `emboss-data` (2013), where the file is present: exact, by ChEBI id;
- PubChem's names in the PyPI package `chemicals`, for compounds of which one name is a ChEBI label. A compound belongs
  to the first of its names that is one, and an entity takes the compound that names it earliest, since further down
  PubChem lists relatives too ("isourea" under urea).

PyPI alone suffices; `emboss-data` names other entities, many of biochemistry, that no PubChem table of `chemicals` has.
Registry numbers and codes (CAS, NSC, EINECS ...) are no names: nobody can know them from chemistry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.domains import ontologies, packages, rules
from benchmarks.domains.derived import Derived
from benchmarks.domains.packages import Source
from benchmarks.quickstart.domain import Term, quoted, stanzas
from lbr_dist.errors import UserError

DOMAIN = "chemistry"
EMBOSS = Path("/usr/share/EMBOSS/data/OBO/chebi.obo")
TABLES = ("chemical identifiers pubchem small.tsv", "chemical identifiers pubchem large.tsv")
NOTATIONS = frozenset({"FORMULA", "SMILES", "InChI", "InChIKey"})
OTHER_NAMES = 5
"""Names of a compound that a line of the corpus lists."""

_REGISTRY = re.compile(r"[\W\d]*|\W*[a-z]{1,8}[-_ .#:]*(?:[a-z]{0,3}[-_ ])?\d{3,}[a-z\d_ -]*", re.IGNORECASE)
_ONE_WORD = re.compile(r"[\w.:/-]+")
_REMARK = re.compile(r"\s*(?:\((?:\d+ci[, ]*)+\)|\[[a-z ,:-]+\])$", re.IGNORECASE)


@dataclass
class Compound:
    """Names of one compound, the preferred one first, with its notations."""

    names: list[str]
    formula: str = ""
    smiles: str = ""

    @property
    def line(self) -> str:
        """The compound as a line of raw text; empty where nothing is said of it."""
        name, *others = self.names
        text = name
        if others:
            text += f", also known as {'; '.join(others[:OTHER_NAMES])}"
        notations = [
            f"the {kind} {value}" for kind, value in (("formula", self.formula), ("SMILES", self.smiles)) if value
        ]
        if notations:
            text += f", has {' and '.join(notations)}"
        return f"{text}." if text != name else ""


def plain(text: str) -> str:
    """A name without the remark of its list at its end: "(8CI,9CI)", "[INN]", "[iso]"."""
    text = " ".join(text.split())
    while (shorter := _REMARK.sub("", text)) != text:
        text = shorter
    return text


def is_name(text: str) -> bool:
    """Whether this is one name, and neither a registry number or code nor a list of names."""
    if not text or ";" in text or _REGISTRY.fullmatch(text):
        return False
    digits = sum(letter.isdigit() for letter in text)
    return _ONE_WORD.fullmatch(text) is None or digits < 3 or 3 * digits < sum(letter.isalnum() for letter in text)


def read_pubchem(lines: Iterable[str]) -> Iterator[Compound]:
    """Compounds of a table of `chemicals`: id, CAS, formula, mass, SMILES, InChI, key, IUPAC name, names ..."""
    for line in lines:
        fields = line.rstrip("\n").split("\t")
        names = list(dict.fromkeys(name for name in map(plain, fields[7:]) if is_name(name)))
        if names:
            yield Compound(names, fields[2], fields[4])


def read_emboss(text: str) -> Iterator[tuple[str, Compound]]:
    """ChEBI id and names of every term of an OBO file."""
    for tags in stanzas(text):
        if "name" not in tags or "id" not in tags:
            continue
        compound = Compound([tags["name"][0].strip()])
        for value in tags.get("synonym", []):
            synonym, kind = quoted(value)
            notation = NOTATIONS & set(kind)
            if "FORMULA" in notation:
                compound.formula = compound.formula or synonym
            elif "SMILES" in notation:
                compound.smiles = compound.smiles or synonym
            elif not notation and is_name(synonym):
                compound.names.append(synonym)
        compound.names = list(dict.fromkeys(compound.names))
        yield tags["id"][0], compound


def names_by_label(terms: Iterable[Term], compounds: Iterable[Compound]) -> dict[str, list[str]]:
    """Term id to the names of the compound that has the term's label as a name (see the module)."""
    labels = {term.name.lower(): term.id for term in terms}
    best: dict[str, tuple[int, list[str]]] = {}
    for compound in compounds:
        found = next(((place, name) for place, name in enumerate(compound.names) if name.lower() in labels), None)
        if found is None:
            continue
        place, name = found
        key = labels[name.lower()]
        if key not in best or place < best[key][0]:
            best[key] = place, compound.names
    return {key: names for key, (_, names) in best.items()}


def derive(emboss: Path | None) -> Derived:
    """Rows and raw text; `emboss`: the OBO file of `emboss-data`, None to do without.

    Raises:
        UserError: a package or the file is missing.
    """
    data = ontologies.data_folder()
    chebi = ontologies.source("CHEBI", data)
    tables = packages.folder("chemicals", "chemicals") / "Identifiers"
    sources = [
        chebi,
        Source("PubChem names", "public domain (PubChem); MIT (chemicals)", packages.version("chemicals"), "chemicals"),
    ]
    terms = [term for term in ontologies.read("CHEBI", data, "chem", "definition") if term.definition]
    compounds = []
    for table in TABLES:
        with (tables / table).open(encoding="utf-8") as lines:
            compounds += list(read_pubchem(lines))
    exact: dict[str, Compound] = {}
    if emboss is not None:
        if not emboss.is_file():
            raise UserError(f"{emboss}: no such file; apt-get install emboss-data, or --emboss none")
        exact = dict(read_emboss(emboss.read_text(encoding="utf-8")))
        sources.append(Source("ChEBI release 105", "CC BY 3.0", "105", "emboss-data (Debian)"))
    matched = names_by_label(terms, compounds)
    for term in terms:
        known = exact.get(term.id.removeprefix("chem:"))
        if known is not None and len(known.names) > 1:
            term.names, origin = known.names, "emboss-data ChEBI 105 synonym"
        else:
            term.names, origin = matched.get(term.id, []), "chemicals PubChem name"
        term.source = f"{origin} -> {term.source}"
    lines_ = [term.answer for term in terms]
    lines_ += [compound.line for compound in (*exact.values(), *compounds)]
    return Derived(DOMAIN, list(rules.synonym_rows(terms, rules.ambiguous(terms), DOMAIN)), lines_, sources)
