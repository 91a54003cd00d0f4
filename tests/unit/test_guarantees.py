"""docs/guarantees.md promises nothing that no test shows; and no page or docstring names what is not there."""

from __future__ import annotations

import ast
import pkgutil
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text()))
    sources = [file.read_text() for file in (ROOT / "tests").rglob("test_*.py")]
    there = {name for source in sources for name in re.findall(r"def (test_\w+)\(", source)}
    assert len(named) > 30
    assert named <= there, sorted(named - there)


def test_every_name_of_the_package_in_pages_and_strings_is_there() -> None:
    texts = [file.read_text() for file in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))]
    for file in (ROOT / "lbr_dist").rglob("*.py"):
        constants = (node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant))
        texts += [value for value in constants if isinstance(value, str)]
    named = {name for text in texts for name in re.findall(r"\blbr_dist(?:\.\w+)+", text)}
    assert len(named) > 10
    for name in named:
        pkgutil.resolve_name(name)  # raises
