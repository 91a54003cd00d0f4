"""`--entity`: what groups rows that must lie on one side, beside the texts that they share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lbr_dist.data.record import Record
from lbr_dist.data.sources.field_names import look_up
from lbr_dist.data.sources.row_values import WHOLE
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
            return cls(unicodedata.normalize("NFC", name), re.compile(pattern) if tilde else None)
        except re.error as error:
            raise UserError(f"--entity {text}: not a regular expression ({error})") from error

    def of(self, row: Mapping[str, Any], record: Record) -> str | None:
        """The row's group; None: it has none (no such field, nothing in it, no match) and stands alone."""
        value = record.id if self.field == "id" else look_up(row, self.field)
        if value in (None, [], {}) or not (text := str(value)).strip():
            return None
        if self.field != "id" and WHOLE.fullmatch(text):
            text = text[:-2]
        if self.pattern is None:
            return text
        match = self.pattern.search(text)
        return (match.group(1 if self.pattern.groups else 0) or None) if match else None
