"""The floors of docs/architecture.md are those that the imports have."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import lbr_dist

ROOT = Path(lbr_dist.__file__).parent
TABLE = Path(__file__).parents[2] / "docs/architecture.md"


def floors() -> dict[str, int]:
    """Floor of each folder and file at the top of the package."""
    rows = re.findall(r"^\| (\d+) \| (`.*?`) \|", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        name.removesuffix(".py").rstrip("/"): int(floor) for floor, row in rows for name in re.findall("`(.*?)`", row)
    }


def imported(node: ast.AST) -> Iterator[str]:
    """Names at the top of the package that a module imports, also inside functions, for more than types."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lbr_dist":
        names = [node.module] if node.module != "lbr_dist" else [f"lbr_dist.{alias.name}" for alias in node.names]
        yield from (str(name).split(".")[1] for name in names)
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def test_every_folder_and_file_has_a_floor() -> None:
    there = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there - {"__init__", "__main__"} == floors().keys()


def test_modules_import_the_floors_below_and_no_other() -> None:
    floor, wrong = floors(), []
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own in floor:
            names = imported(ast.parse(path.read_text(encoding="utf-8")))
            wrong += [
                f"{path}: {name}" for name in names if name not in (own, "__version__") and floor[name] >= floor[own]
            ]
    assert wrong == []
