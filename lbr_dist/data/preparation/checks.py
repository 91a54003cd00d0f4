"""Mistakes of the user that show only when all rows are read, or all sides chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lbr_dist.data.preparation.collect import NO_ENTITY, BadRows
from lbr_dist.data.preparation.first_pass import FirstPass
from lbr_dist.data.preparation.split import CL, EVAL, GL, TEXT
from lbr_dist.data.sources.field_names import listed
from lbr_dist.data.sources.parts import MOST_LISTED, Part
from lbr_dist.data.sources.readers import rows
from lbr_dist.errors import UserError, printable


def check_outside(name: str, found: BadRows) -> None:
    """Every row of an external evaluation set counts: one that is not read is one that training may hold.

    Raises:
        UserError: a row cannot be read, or there is none.
    """
    if found.total:
        raise UserError(
            f"--decontaminate {name}: {found.total} of {found.rows} rows cannot be read, so training could hold them: "
            f"{found}: name its fields with --field or its kind with KIND=FILE, or mend these rows"
        )
    if not found.rows:
        raise UserError(f"--decontaminate {name}: has no rows: nothing would be kept out of training")


def check_named_fields(read: FirstPass, alive: np.ndarray, parts: Sequence[Part]) -> None:
    """See that the fields exist that --field names for roles that a row may lack, or that tell its kind; without
    another, rows are bad.

    Args:
        read: what the first pass left.
        alive: mask of the records that stay.
        parts: of the sources.

    Raises:
        UserError: no row has such a field.
    """
    has_pairs = (alive & ~read.numbers.external & ~read.numbers.is_text).any()
    roles = ("id", "domain", "source", "negatives", "positives", "label") if has_pairs else ("id",)  # a text has an id
    for part in parts:
        told = part.format == "text" or part.source.kind is not None
        checked = roles if told else (*roles, "question", "answer", "options", "text")
        for role, name in part.source.fields.items():
            if name and role in checked and role not in read.bad.met:
                raise UserError(f"--field {role}={name}: no row has such a field; {_first_fields(parts)}")


def check_entity(read: FirstPass, alive: np.ndarray, parts: Sequence[Part], entity: str | None) -> int:
    """Count the records that `--entity` does not group; arguments as above.

    Raises:
        UserError: it groups none.
    """
    records = alive & ~read.numbers.external & ~read.numbers.is_text
    if entity is None or not records.any():
        return 0
    ungrouped = int((records & (read.numbers.entity == NO_ENTITY)).sum())
    if ungrouped == records.sum():
        raise UserError(f"--entity {entity}: no record has a value for it; {_first_fields(parts)}")
    return ungrouped


def check_left(side: np.ndarray, parts: Sequence[Part], dropped: Mapping[str, int]) -> None:
    """See that a side has a record.

    Raises:
        UserError: all were dropped, for the reasons that `dropped` counts.
    """
    if np.isin(side, (GL, CL, EVAL, TEXT)).any():
        return
    raise UserError(
        f"{named(parts)}: no record is left for gl, cl or eval (dropped: {counted(dropped)}): give other sources, "
        "another --decontaminate or larger sizes"
    )


def counted(dropped: Mapping[str, int]) -> str:
    """How many records were dropped for which reason, for a message; empty where none was."""
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)


def named(parts: Sequence[Part]) -> str:
    """The files, for a message: the first of very many."""
    names = ", ".join(part.name for part in parts[:MOST_LISTED])
    return f"{names} and {len(parts) - MOST_LISTED} more" if len(parts) > MOST_LISTED else names


def _first_fields(parts: Sequence[Part]) -> str:
    first = next((row for part in parts for _, row in rows(part) if isinstance(row, Mapping)), {})
    return printable(f"the first row has the fields {listed(first)}")
