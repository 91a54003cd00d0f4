"""Recipes: from YAML files to validated settings, and the ones that ship.

A recipe is one YAML file. It is validated whole before anything starts: an unknown key is refused with the nearest
valid one, contradictions name both settings, and the resolved recipe (defaults filled in) is saved beside the run.
`key=value` overrides use dots: `optim.lr=1e-4`, `data.sets.0.weight=2`. The YAML files in this folder ship with the
package; `lbr recipes` lists and copies them.
"""

from __future__ import annotations

import difflib
import errno
import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lbr_dist.config import Recipe
from lbr_dist.errors import UserError
from lbr_dist.recipes.dialect import Dumper, Loader
from lbr_dist.recipes.settings import section_of, settings

FOLDER = Path(__file__).parent
ELSEWHERE = {
    "batch_size": "batch.global_batch",
    "train_batch_size": "batch.global_batch",
    "lr": "optim.lr",
    "learning_rate": "optim.lr",
    "max_grad_norm": "optim.clip",
    "warmup_ratio": "optim.warmup",
    "num_epochs": "duration.epochs",
    "num_train_epochs": "duration.epochs",
    "max_steps": "duration.steps",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "output_dir": "output",
    "lora_rank": "model.lora.r",
    "rank": "model.lora.r",
    "gradient_checkpointing": "model.activation_checkpointing",
}
"""What settings are called in other programs, to their name here."""


def shipped() -> dict[str, str]:
    """Name of every recipe that ships, and its first line."""
    return {
        file.stem: file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        for file in sorted(FOLDER.glob("*.yaml"))
    }


def load_recipe(path: str | Path, overrides: list[str] | None = None, *, kept: bool = False) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        path: YAML file, or the name of a recipe that ships with the package (see `lbr recipes`).
        overrides: `key=value` strings; values are YAML.
        kept: see `parse_recipe`.

    Raises:
        UserError: no such file, bad YAML, an unknown key (the nearest valid one is named) or a refused value.
    """
    file = Path(path)
    if not _is_file(file):
        file = FOLDER / f"{path}.yaml"
        if not _is_file(file):
            raise UserError(f"recipe {path}: no such file, and no recipe of that name ships with lbr (`lbr recipes`)")
    try:
        raw = _unshared(yaml.load(file.read_text(encoding="utf-8"), Loader))  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _not_yaml(f"recipe {file}", error) from None
    _check_mapping(raw, str(file))
    for item in overrides or []:
        _override(raw, item)
    return parse_recipe(raw, str(file), kept=kept)


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def override(key: str, text: str) -> str:
    """An override that sets a text as it is, whatever YAML would read in it: a path with ` #` or `: `."""
    return f"{key}={json.dumps(text, ensure_ascii=False)}"


def parse_recipe(raw: Any, origin: str, *, kept: bool = False) -> Recipe:
    """Validate a recipe given as a mapping.

    Args:
        origin: names it in errors.
        kept: it is that of a run or a checkpoint, which may be older than a check of what its settings can be.
    """
    _check_mapping(raw, origin)
    try:
        return Recipe.model_validate(raw, context={"kept": kept})
    except ValidationError as error:
        raise UserError("; ".join(_explain(origin, dict(e)) for e in error.errors())) from None


def _check_mapping(raw: Any, origin: str) -> None:
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise UserError(f"recipe {origin}: expected a mapping of settings, found {found}")


def _unshared(node: Any) -> Any:
    """A copy in which what YAML's aliases name is there once for each, so that an override changes one of them."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def _override(raw: dict[str, Any], item: str) -> None:
    key, separator, text = item.partition("=")
    if not separator or not key:
        raise UserError(f"override {item!r}: expected key=value, for example optim.lr=1e-4")
    if not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", key):
        raise UserError(
            f"override {item!r}: {key!r} is no name of a setting: write key=value, as optim.lr=1e-4 or "
            "data.sets.0.weight=2"
        )
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        if isinstance(node, list):
            node = node[_list_index(node, part, key)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(f"override {item!r}: {part} is a value, not a section")
    value = _yaml_value(text, item)
    if isinstance(node, list):
        node[_list_index(node, last, key)] = value
    else:
        node[last] = value


def _not_yaml(origin: str, error: Exception) -> UserError:
    return UserError(f"{origin}: not valid YAML: {' '.join(str(error).split())}")


def _yaml_value(text: str, item: str) -> Any:
    """The value in an override; `item` is the whole of it.

    Raises:
        UserError: it is no value of its tag, or there is none: a script's variable that is not set, or a comment.
    """
    if not text.strip():
        key = item.partition("=")[0]
        raise UserError(
            f"override {item!r}: has no value; write '{key}=\"\"' for an empty text, or {key}=null to unset it"
        )
    try:
        value = yaml.load(text, Loader)
    except (yaml.constructor.ConstructorError, ValueError) as error:
        raise _not_yaml(f"override {item!r}", error) from None
    except yaml.YAMLError:  # a text
        return text
    if value is None and text.strip().lower() not in ("null", "~"):
        raise UserError(
            f"override {item!r}: YAML reads no value in it; put a text in quotes, or write null to unset it"
        )
    return value


def _list_index(node: list[Any], part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise UserError(f"override {key}: {part} is not an index into a list of {len(node)}")
    return int(part)


def _explain(origin: str, error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(error["loc"][:-1])
        near = _meant(where, valid)
        hint = f"did you mean {near}?" if near else f"valid keys: {', '.join(valid)}"
        return f"recipe {origin}: unknown key {where}; {hint}"
    if error["type"] == "missing":
        return f"recipe {origin}: {where} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if not where:
        return f"recipe {origin}: {message}"
    if error["type"] == "list_type" and isinstance(error["input"], str):
        message += f": write [{error['input']}]"
    if error["type"] == "string_type" and error["input"] is not None:
        message += ": put a text in quotes, on a command line once more within the shell's, as 'key=\"text\"'"
    return f"recipe {origin}: {where}: {message} (got {error['input']!r})"


def _meant(key: str, valid: list[str]) -> str | None:
    """The setting that an unknown key is likely to stand for: by another program's name for it, by a name alike of its
    section, or by its own name in another section."""
    whole, last = (re.sub(r"[-.]", "_", name) for name in (key, key.rpartition(".")[2]))
    if known := ELSEWHERE.get(whole, ELSEWHERE.get(last)):
        return known
    if near := [name for name in valid if name.startswith(last)] or difflib.get_close_matches(last, valid, n=1):
        section = key.rpartition(".")[0]
        return f"{section}.{near[0]}" if section else near[0]
    named = [setting.name for setting in settings() if setting.name.rpartition(".")[2] == last]
    return named[0] if len(named) == 1 else None


def _valid_keys(loc: tuple[Any, ...]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(str(part))
        if field is None:
            break
        found = section_of(field.annotation)
        if found is None:
            break
        section = found
    return list(section.model_fields)


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe (defaults filled in) as YAML; `load_recipe` reads the same from it."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write `recipe_text` to a file."""
    Path(path).write_text(recipe_text(recipe), encoding="utf-8")
