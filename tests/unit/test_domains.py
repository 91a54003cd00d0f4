"""The derived domains chemistry and medicine: every parser and filter, on small made-up inputs."""

import json
import textwrap
from pathlib import Path

import pytest
import zstandard

from benchmarks.domains import chemistry, medicine, ontologies, packages, rules
from benchmarks.quickstart.domain import Term
from lbr_dist.errors import UserError

ASPIRIN = Term(
    id="chem:CHEBI:15365",
    name="acetylsalicylic acid",
    source="s",
    definition="A member of the class of benzoic acids that is salicylic acid with an acetyl ester.",
    names=["aspirin", "acetyl-salicylic acid", "salicylic acid ester", "polopiryna", "ASA"],
)


# --- rules ----------------------------------------------------------------------------------------


def test_a_name_is_asked_only_if_a_word_match_does_not_answer_it() -> None:
    assert rules.askable("aspirin", ASPIRIN)
    assert not rules.askable("Acetyl-Salicylic acid", ASPIRIN)  # the name in another spelling
    assert not rules.askable("benzoic acid", ASPIRIN)  # stands in the definition, but for the plural
    assert not rules.askable("pure acetylsalicylic acid BP", ASPIRIN)  # holds the name
    assert not rules.askable("ester of salicylic stuff", ASPIRIN)  # two of three words are seen
    assert not rules.askable("ASA", ASPIRIN)  # too short
    assert not rules.askable("x" * 121, ASPIRIN)
    assert not rules.askable("50-78-2", ASPIRIN)


def test_rows_ask_two_names_of_an_entity_and_none_that_names_two() -> None:
    other = Term(id="chem:2", name="other", source="s", definition="Of no use to anyone, at any time, " * 2)
    other.names = ["Polopiryna", "another name entirely"]
    vague = Term(id="chem:3", name="vague", source="s", definition="A compound.", names=["something wholly else"])
    terms = [ASPIRIN, other, vague]
    several = rules.ambiguous(terms)
    assert several == {"polopiryna"}
    rows = list(rules.synonym_rows(terms, several, "chemistry"))
    assert {row["question"] for row in rows} == {"What is aspirin?", "What is another name entirely?"}
    assert rows[0]["id"] == "chem:CHEBI:15365:0"
    assert rows[0]["answer"].startswith("acetylsalicylic acid: A member")
    ASPIRIN_MANY = Term(**{**vars(ASPIRIN), "names": [f"name number {word}" for word in ("one", "two", "three")]})
    many = list(rules.synonym_rows([ASPIRIN_MANY], set(), "chemistry"))
    assert [row["id"][-2:] for row in many] == [":0", ":1"]
    ASPIRIN_MANY.names.reverse()
    assert many == list(rules.synonym_rows([ASPIRIN_MANY], set(), "chemistry"))


# --- ontologies -----------------------------------------------------------------------------------


def write_ontology(data: Path, name: str, terms: dict[str, dict]) -> None:
    listed = {"ontologies": {name: {"version": "v2"}}}
    (data / "latest_ontology_info.json").write_text(json.dumps(listed))
    text = json.dumps(terms).encode()
    (data / f"{name}-ontology-v2.json.zst").write_bytes(zstandard.ZstdCompressor().compress(text))


def test_current_terms_of_the_newest_version_are_read(tmp_path: Path) -> None:
    old = {"label": "old", "deprecated": True, "ancestors": {}}
    parent = {"label": "organ", "deprecated": False, "ancestors": {}}
    heart = {
        "label": "heart",
        "deprecated": False,
        "description": "A pump. [WP,unvetted] [NCI]",
        "synonyms": ["cor  "],
        "ancestors": {"U:2": 1, "U:3": 2},
    }
    write_ontology(tmp_path, "UBERON", {"U:1": old, "U:2": parent, "U:4": heart})
    terms = list(ontologies.read("UBERON", tmp_path, "med", "synonym -> definition"))
    assert [term.id for term in terms] == ["med:U:2", "med:U:4"]
    assert terms[1].answer == "heart: A pump."
    assert (terms[1].names, terms[1].parents) == (["cor"], ["organ"])
    assert terms[1].source == "UBERON v2 synonym -> definition"


def test_definitions_lose_markup_and_provenance_but_no_brackets_of_their_own() -> None:
    assert ontologies.clean("The (<i>R</i>)-form &amp; <small>L</small>-one.") == "The (R)-form & L-one."
    assert ontologies.clean("A pyrido[1,2-a]indole with T < 5.") == "A pyrido[1,2-a]indole with T < 5."
    assert ontologies.clean("Named benzo[b]") == "Named benzo[b]"
    assert len(ontologies.clean("word " * 500).split()) == ontologies.DEFINITION_WORDS


# --- chemistry ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aspirin", True),
        ("2-(acetyloxy)benzoic acid", True),
        ("vitamin b12", True),
        ("2,4,5-t", True),
        ("3-hexanone", True),
        ("50-78-2", False),
        ("nsc 27223", False),
        ("CHEMBL2502", False),
        ("ac1o57ds", False),
        ("brd-k91822704-001-01-9", False),
        ("einecs 200-064-1", False),
        ("one; two", False),
        ("", False),
    ],
)
def test_registry_numbers_and_lists_are_no_names(text: str, expected: bool) -> None:
    assert chemistry.is_name(text) is expected


def test_remarks_at_the_end_of_a_name_are_dropped() -> None:
    assert chemistry.plain("tricosanoic acid (6ci,7ci,8ci)") == "tricosanoic acid"
    assert chemistry.plain("fenadossone [DCIT]") == "fenadossone"
    assert chemistry.plain("pyrido[1,2-a]indole") == "pyrido[1,2-a]indole"


def test_a_compound_belongs_to_its_first_label_and_an_entity_to_the_earliest_compound() -> None:
    line = "1176\t57-13-6\tCH4N2O\t60.06\tC(=O)(N)N\tInChI\tKEY\turea\tcarbamide\tisourea\t57-13-6\tcarbamide\n"
    (urea,) = chemistry.read_pubchem([line])
    assert urea.names == ["urea", "carbamide", "isourea"]
    assert urea.line == "urea, also known as carbamide; isourea, has the formula CH4N2O and the SMILES C(=O)(N)N."
    later = chemistry.Compound(["something", "Urea", "late"])
    terms = [Term(id="1", name="Urea", source=""), Term(id="2", name="isourea", source="")]
    assert chemistry.names_by_label(terms, [later, urea]) == {"1": urea.names}
    assert chemistry.Compound(["alone"]).line == ""


def test_emboss_names_are_told_from_notations() -> None:
    text = textwrap.dedent("""\
        format-version: 1.2

        [Term]
        id: CHEBI:1
        name: water
        synonym: "H2O" RELATED FORMULA [ChEBI:]
        synonym: "[H]O[H]" RELATED SMILES [ChEBI:]
        synonym: "InChI=1S/H2O/h1H2" RELATED InChI [ChEBI:]
        synonym: "oxidane" EXACT IUPAC_NAME [IUPAC:]
        synonym: "\\"eau\\"" RELATED [ChEBI:]

        [Typedef]
        id: has_part
        name: has part
        """)
    ((key, water),) = chemistry.read_emboss(text)
    assert (key, water.names, water.formula, water.smiles) == (
        "CHEBI:1",
        ["water", "oxidane", '"eau"'],
        "H2O",
        "[H]O[H]",
    )


def chemistry_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two packages that chemistry needs, of three entities."""
    (tmp_path / "Identifiers").mkdir()
    acids = {
        f"CHEBI:{number}": {
            "label": f"{word}ic acid",
            "description": f"An acid that is called {word}ic because it was found in {word}.",
            "deprecated": False,
            "ancestors": {},
        }
        for number, word in enumerate(("form", "tartar", "stear"))
    }
    write_ontology(tmp_path, "CHEBI", acids)
    small, large = (tmp_path / "Identifiers" / name for name in chemistry.TABLES)
    small.write_text("1\t\tCH2O2\t\tC(=O)O\t\t\tmethanoic\tformic acid\taminic spirit\n")
    large.write_text("2\t\tC4H6O6\t\tOC\t\t\ttartaric acid\tthrearic compound\n")
    monkeypatch.setattr(ontologies, "data_folder", lambda: tmp_path)
    monkeypatch.setattr(packages, "folder", lambda module, package: tmp_path)
    monkeypatch.setattr(packages, "version", lambda package: "1.0")


def test_chemistry_takes_exact_names_where_it_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chemistry_packages(tmp_path, monkeypatch)
    made = chemistry.derive(None)
    assert {row["question"] for row in made.rows} == {
        *("What is methanoic?", "What is aminic spirit?", "What is threaric compound?")
    }
    emboss = tmp_path / "chebi.obo"
    emboss.write_text('[Term]\nid: CHEBI:1\nname: tartaric acid\nsynonym: "uvic thing" RELATED [ChEBI:]\n')
    with_emboss = chemistry.derive(emboss)
    assert "What is uvic thing?" in {row["question"] for row in with_emboss.rows}
    assert "What is threaric compound?" not in {row["question"] for row in with_emboss.rows}
    assert with_emboss.sources[-1].licence == "CC BY 3.0"
    with pytest.raises(UserError, match="emboss-data"):
        chemistry.derive(tmp_path / "missing.obo")


# --- medicine -------------------------------------------------------------------------------------


def test_annotations_keep_present_phenotypes_only() -> None:
    lines = ["#version: 1", "database_id\tdisease_name\tqualifier\thpo_id\t\t\t\t\t\t\taspect\tbiocuration"]
    for qualifier, phenotype, aspect in [("", "HP:1", "P"), ("", "HP:1", "P"), ("NOT", "HP:2", "P"), ("", "HP:3", "I")]:
        lines.append(f"OMIM:1\tGout\t{qualifier}\t{phenotype}\t\t\t\t\t\t\t{aspect}\tx\n")
    assert medicine.read_annotations(lines) == {"Gout": ["HP:1"]}


def test_phenotypes_ask_for_a_disease_that_is_matched_by_name() -> None:
    gout = Term("med:MONDO:1", "gout", "s", "A disease of the joints with attacks of pain, due to uric acid.")
    gout.names = ["podagra", "uratic arthritis"]
    gouty = Term("med:MONDO:2", "gouty nephropathy", "s", "x" * 50, names=["Podagra"])
    terms = medicine.by_name([gout, gouty])
    assert terms["uraticarthritis"] is gout
    assert "podagra" not in terms
    phenotypes = {f"HP:{n}": name for n, name in enumerate(["Fever", "Tophi", "Chills", "Swelling", "Redness", "Pain"])}
    diseases = {"Uratic arthritis": list(phenotypes), "Gout": ["HP:0"], "unknown": list(phenotypes)}
    (row,) = medicine.phenotype_rows(diseases, terms, phenotypes, "s")
    assert row["id"] == "med:MONDO:1:p0"
    named = row["question"].removeprefix("Which disease presents with ").removesuffix("?").split(", ")
    assert sorted(named) == ["chills", "fever", "redness", "swelling", "tophi"]  # pain stands in the answer
