"""What every section of a recipe is made from."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

LONGEST_NAME = 255
"""Bytes of a file's or folder's name, on any usual file system."""


def _place(path: str, info: ValidationInfo) -> str:
    """A path with ~ expanded. One that a run has kept is not judged again.

    Raises:
        ValueError: it is empty, has a variable, or a name in it is one that no file can have.
    """
    if (info.context or {}).get("kept"):
        return os.path.expanduser(path)  # noqa: PTH111
    if not path.strip():
        raise ValueError("is empty: name a path, or write null where there may be none")
    if path.startswith("pipe:") or "://" in path:  # a command, for a shell, or an address
        return path
    if variable := re.search(r"\$([A-Za-z_]\w*|\{[^}]*\})", path):
        raise ValueError(
            f"{variable[0]} is not expanded here: write the path itself, or give it as key=value on the command line, "
            "not in single quotes: there the shell expands it"
        )
    if "\0" in path:
        raise ValueError("has a zero byte, which no path can have")
    if max(len(os.fsencode(name)) for name in path.split("/")) > LONGEST_NAME:
        raise ValueError(f"has a name of more than {LONGEST_NAME} bytes, which no file can have: shorten it")
    return os.path.expanduser(path)  # noqa: PTH111 (a Path would change addresses)


Positive = Annotated[int, Field(gt=0, lt=2**53)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Place = Annotated[str, AfterValidator(_place)]
"""A path, where ~ is the home folder: no shell expands it in a file, nor behind a `key=`. Variables are refused."""


def is_place(field: FieldInfo) -> bool:
    """Whether a setting is a `Place`, or a `Place` or null."""
    return Place in get_args(field.annotation) or get_args(Place)[1] in field.metadata


class Section(BaseModel):
    """A group of settings; frozen, closed to unknown keys and to numbers that are not finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("takes no true or false")  # which would be 1 and 0
        return value
