"""Every setting of a recipe, read from the schema: `lbr settings` and docs/settings.md are made from this.

Name, type, default and meaning are what the schema itself says, so the list cannot be out of date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lbr_dist.config import Recipe

HEAD = """# Settings

Every setting of a recipe, as `lbr settings` prints it. A setting without a default must be given. On the command line
it is `NAME=VALUE`, with the value in YAML; the items of a list have numbers: `data.sets.0.weight=0.5`. An empty value
is refused: `NAME=null` unsets, and `'NAME=""'` is an empty text.

In a path ~ is the home folder. Variables (`$SCRATCH`) are not expanded in a recipe, and are refused: write the path, or
give `output=$SCRATCH/run` on the command line, where the shell expands it.
"""


@dataclass(frozen=True)
class Setting:
    """One line of the reference."""

    name: str
    type: str
    default: str | None
    """As JSON, which YAML reads; None: there is no default."""
    meaning: str


def settings(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[Setting]:
    """All settings, section by section, in the order of the schema."""
    inner = []
    for name, field in section.model_fields.items():
        below = section_of(field.annotation)
        many = below is not None and get_origin(field.annotation) is list
        path = f"{prefix}{name}{'.N' if many else ''}"
        if below is None or field.default is None:
            yield Setting(path, _type(field), _default(field), _text(field, below))
        if below is not None:
            inner.append((below, f"{path}."))
    for below, path in inner:
        yield from settings(below, path)


def markdown() -> str:
    """The reference as a page: a table per section."""
    lines, section = [HEAD], None
    for setting in settings():
        name = setting.name.rpartition(".")[0]
        if name != section:
            section = name
            lines += [
                f"\n## {name or 'The run'}\n",
                "| setting | type | default | meaning |",
                "| --- | --- | --- | --- |",
            ]
        default = "" if setting.default is None else f"`{setting.default}`"
        kind = setting.type.replace("|", "\\|")
        lines.append(f"| `{setting.name}` | {kind} | {default} | {setting.meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds: by itself, in a list, or where it may be null; None: it holds a value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _text(field: FieldInfo, below: type[BaseModel] | None) -> str:
    text = field.description or (below.__doc__ if below else "") or ""
    return " ".join(text.split())


def _type(field: FieldInfo) -> str:
    return " or ".join(dict.fromkeys(_names(field.annotation)))


def _names(annotation: Any) -> Iterator[str]:
    if annotation is type(None):
        yield "null"
    elif get_origin(annotation) is Literal:
        yield from (str(choice) for choice in get_args(annotation))
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "section"
    elif get_origin(annotation) in (list, tuple):
        inner = (name for part in get_args(annotation) for name in _names(part))
        yield f"list of {' or '.join(dict.fromkeys(inner))}"
    elif get_origin(annotation) is Annotated:
        yield from _names(get_args(annotation)[0])
    elif get_args(annotation):
        for part in get_args(annotation):
            yield from _names(part)
    elif isinstance(annotation, type):
        yield {"int": "integer", "float": "number", "str": "text", "bool": "true or false"}[annotation.__name__]


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    return json.dumps(field.get_default(call_default_factory=True))
