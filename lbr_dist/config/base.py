"""What every section of a recipe is made from."""

from __future__ import annotations

import os
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(gt=0, lt=2**53)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, where ~ is the home folder: no shell expands it in a file, nor behind a `key=`."""


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
