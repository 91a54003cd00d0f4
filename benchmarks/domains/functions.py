"""Code: a docstring's description to its function, from the standard library and installed packages.

Source files are parsed, never imported. The answer is the whole function without decorators, docstring, blank lines and
comment lines (a comment often repeats the docstring); a function that is longer than the bound is left out rather than
cut, so that every answer still parses. Tests and vendored packages (whose licences are others) are skipped.

Of copies (transformers has the same function in hundreds of models) the first in file order stays: two functions with
the same body are one, and so are two with the same question.
"""

from __future__ import annotations

import ast
import io
import os
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.domains import packages
from benchmarks.domains.derived import Derived
from benchmarks.domains.packages import Source
from benchmarks.domains.rules import squeeze
from benchmarks.jsonl import Row
from benchmarks.quickstart.domain import content_words, shorten

DOMAIN = "code"
STDLIB = "python-stdlib"
PACKAGES = {  # module: the package that installs it, its licence
    STDLIB: (STDLIB, "PSF-2.0"),
    "torch": ("torch", "BSD-3-Clause"),
    "transformers": ("transformers", "Apache-2.0"),
    "sympy": ("sympy", "BSD-3-Clause"),
    "scipy": ("scipy", "BSD-3-Clause"),
    "sklearn": ("scikit-learn", "BSD-3-Clause"),
    "networkx": ("networkx", "BSD-3-Clause"),
    "numpy": ("numpy", "BSD-3-Clause"),
    "chemicals": ("chemicals", "MIT"),
    "pydantic": ("pydantic", "MIT"),
    "sentence_transformers": ("sentence-transformers", "Apache-2.0"),
    "mpmath": ("mpmath", "BSD-3-Clause"),
    "joblib": ("joblib", "BSD-3-Clause"),
}
QUESTION_CHARACTERS = (20, 512)
QUESTION_WORDS = (3, 60)
ANSWER_CHARACTERS = 1800
ANSWER_LINES = 4
"""Fewer lines are a trivial function."""
SKIPPED = frozenset(
    (
        *("test", "tests", "testing", "site-packages", "dist-packages", "lib2to3", "idlelib"),
        *("_vendor", "vendor", "vendored", "externals", "extern", "third_party"),
    )
)
"""Folders (or modules) that are not the package's own work, or not its work proper."""

_SECTION = re.compile(
    r"^\s*(?:>>>|\.\. |:\w+|@\w+ |[-=~^]{3,}\s*$|"
    r"(?:args?|arguments|parameters?|params|returns?|yields?|raises?|examples?|notes?|attributes|inputs?|outputs?|"
    r"see also|references?|shape|warnings?|keyword args|usage)\s*:?\s*$)",
    re.IGNORECASE,
)
_FUNCTION_WORDS = frozenset(
    (
        *("a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "if", "in", "is", "it", "its", "not", "of"),
        *("on", "or", "return", "returns", "that", "the", "this", "to", "with"),
    )
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Found:
    """A function worth asking for; `body` tells copies apart from others."""

    line: int
    name: str
    question: str
    answer: str
    body: str


def description(docstring: str) -> str:
    """The prose before the first section (Parameters, Returns, an example ...), on one line and bounded in words."""
    kept: list[str] = []
    for line in textwrap.dedent(docstring).strip().splitlines():
        if _SECTION.match(line):
            break
        kept.append(line)
    return shorten(" ".join(kept), QUESTION_WORDS[1])


def is_english(text: str) -> bool:
    """Nearly all letters are ASCII, and a sentence has one of the words that English cannot do without."""
    letters = [letter for letter in text if letter.isalpha()]
    words = re.findall(r"[a-z]+", text.lower())
    ascii_letters = sum(letter.isascii() for letter in letters)
    return ascii_letters >= 0.95 * len(letters) and (len(words) < 6 or not _FUNCTION_WORDS.isdisjoint(words))


def is_question(text: str, name: str) -> bool:
    """Whether a description asks for something: bounded, English, and not only the function's name again."""
    least, most = QUESTION_CHARACTERS
    if not least <= len(text) <= most or len(text.split()) < QUESTION_WORDS[0] or not is_english(text):
        return False
    return bool(content_words(text) - content_words(name.replace("_", " ")))


def code_of(node: Function, lines: list[str]) -> str:
    """A function's source without decorators, docstring, blank lines and comment lines; `lines` of the whole file."""
    assert node.end_lineno is not None
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    if docstring.lineno == node.lineno:
        return ""  # all on one line
    kept = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    code, inner = _code_lines("".join(kept))
    margin = " " * node.col_offset
    return "".join(
        line if number in inner else line.removeprefix(margin)
        for number, line in enumerate(kept, start=1)
        if number in code
    ).rstrip()


def _code_lines(text: str) -> tuple[set[int], set[int]]:
    """Numbers of the lines that are not blank or a comment alone, and of those that begin within a string."""
    code: set[int] = set()
    inner: set[int] = set()
    layout = {tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            first, last = token.start[0], token.end[0]
            code.update(range(first, last + 1))
            inner.update(range(first + 1, last + 1))
    return code, inner


def functions(source: str) -> Iterator[Found]:
    """Functions and methods of a file that have a description and a body worth finding.

    Raises:
        SyntaxError: the file does not parse (a template, or for another version of Python).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, Function) or node.name.startswith("__"):
            continue
        docstring = ast.get_docstring(node)
        question = description(docstring) if docstring else ""
        if not is_question(question, node.name):
            continue
        answer = code_of(node, lines)
        if len(answer) > ANSWER_CHARACTERS or answer.count("\n") + 1 < ANSWER_LINES:
            continue
        if squeeze(question) in squeeze(answer):
            continue
        body = "\n".join(ast.dump(statement) for statement in node.body[1:])
        yield Found(node.lineno, node.name, question, answer, body)


def files(root: Path) -> Iterator[tuple[str, Path]]:
    """Dotted module name and path of a package's own source files, in a fixed order."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not _is_skipped(name))
        for name in sorted(names):
            path = Path(folder) / name
            if path.suffix == ".py" and not _is_skipped(path.stem):
                parts = path.relative_to(root).with_suffix("").parts
                yield ".".join(part for part in parts if part != "__init__"), path


def _is_skipped(name: str) -> bool:
    return name in SKIPPED or name.startswith("test_") or name.endswith("_test")


def rows(roots: Iterable[tuple[str, Path, str]]) -> Iterator[Row]:
    """One row for each function that is no copy; `roots`: name of a package, its folder, its licence."""
    seen: set[str] = set()
    for package, root, licence in roots:
        for module, path in files(root):
            try:
                found = list(functions(path.read_text(encoding="utf-8")))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for function in sorted(found, key=lambda function: function.line):
                keys = {f"q{squeeze(function.question)}", f"b{function.body}"}
                if keys & seen:
                    continue
                seen |= keys
                where = ".".join(part for part in (package, module, function.name) if part)
                yield {
                    "id": f"code:{where}.{function.line}:0",
                    "question": function.question,
                    "answer": function.answer,
                    "domain": DOMAIN,
                    "source": f"{package} {licence} docstring -> function",
                }


def derive() -> Derived:
    """Rows of the standard library and every package of `PACKAGES`; there is no raw text.

    Raises:
        UserError: a package is missing.
    """
    roots = []
    for module, (package, licence) in PACKAGES.items():
        stdlib = Path(sysconfig.get_path("stdlib"))
        roots.append((module, stdlib if module == STDLIB else packages.folder(module, package), licence))
    sources = [Source(name, licence, packages.version(name), name) for name, licence in PACKAGES.values()]
    return Derived(DOMAIN, list(rows(roots)), sources=sources)
