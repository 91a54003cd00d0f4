"""`--entity`: what groups rows that must lie on one side, beside the texts that they share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lbr_dist.data.record import Record
from lbr_dist.errors import UserError


@dataclass(frozen=True)
class Entity:
    """What groups rows that must share a side: a field, and of it what `pattern` captures (its first group, or all)."""

    field: str
    pattern: re.Pattern[str] | None

    @classmethod
    def parse(cls, text: str) -> Entity:
        """`FIELD` or `FIELD~REGEX`, for example `id~(.*):` for all of the id up to its last colon.

        Raises:
            UserError: the regular expression is not one.
        """
        name, tilde, pattern = text.partition("~")
        try:
            return cls(name, re.compile(pattern) if tilde else None)
        except re.error as error:
            raise UserError(f"--entity {text}: not a regular expression ({error})") from error

    def of(self, row: Mapping[str, Any], record: Record) -> str | None:
        """The row's group; None: it has none and stands alone."""
        value = record.id if self.field == "id" else row.get(self.field)
        if value is None or self.pattern is None:
            return None if value is None else str(value)
        match = self.pattern.search(str(value))
        if match is None:
            return None
        return match.group(1) if self.pattern.groups else match.group(0)
