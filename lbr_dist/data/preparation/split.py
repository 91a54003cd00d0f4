"""Which records go to which side: whole connected components, so that nothing leaks from one side to another."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lbr_dist.data.preparation.components import ALIKE, NEAR
from lbr_dist.errors import UserError

GL, CL, EVAL, TEXT, EXTERNAL, UNUSED = 0, 1, 2, 3, 4, 5
"""Sides. TEXT is written to `gl` too; EXTERNAL is a given evaluation set; UNUSED is written nowhere."""
SIDES = ("gl", "cl", "eval")
DEFAULT_SIZES: dict[str, str] = {"gl": "rest", "cl": "0.25", "eval": "0.05"}
SHORT = 0.9
"""Share of the records asked for below which a side is said to be short."""


class Default(float):
    """A share that the user did not ask for."""


def parse_sizes(sizes: Mapping[str, str | int | float]) -> dict[str, int | float | None]:
    """Sizes of the sides as counts (int), shares (float, 0 to 1; `Default` where none was given) or None for "rest".

    Args:
        sizes: side to "5000", "0.2", "rest" or a number. A side that is not named has its default; gl, by default the
            rest, is empty where another side is the rest.

    Raises:
        UserError: not such a value, shares of more than 1 in all, "rest" twice, or nothing for any side.
    """
    parsed: dict[str, int | float | None] = {}
    for side, value in {**DEFAULT_SIZES, **sizes}.items():
        if side not in SIDES:
            raise UserError(f"--{side}: no such side; the sides are {', '.join(SIDES)}")
        text = str(value)
        try:
            parsed[side] = None if text == "rest" else int(text) if text.isdecimal() else float(text)
        except ValueError:
            raise UserError(f"--{side} {text}: give a count (5000), a share (0.2) or rest") from None
        number = parsed[side]
        if number is not None and number < 0:
            raise UserError(f"--{side} {text}: must not be negative: give a count (5000), a share (0.2) or rest")
        if isinstance(number, float) and not 0 <= number <= 1:
            raise UserError(f"--{side} {text}: a share lies between 0 and 1")
        if isinstance(number, float) and side not in sizes:
            parsed[side] = Default(number)
    if parsed["gl"] is None and "gl" not in sizes and None in (parsed["cl"], parsed["eval"]):
        parsed["gl"] = 0
    if all(value == 0 for value in parsed.values()):
        raise UserError("--gl, --cl and --eval are all 0: give a side a size (plain texts go to gl whatever its size)")
    if sum(value is None for value in parsed.values()) > 1:
        raise UserError("only one of --gl, --cl and --eval can be rest")
    if sum(value for value in parsed.values() if isinstance(value, float)) > 1 + 1e-9:
        shown = ", ".join(
            f"{side} {shown_size(value)}{'' if side in sizes else ' (default)'}" for side, value in parsed.items()
        )
        raise UserError(f"the shares add up to more than 1 ({shown}): lower one of them")
    return parsed


def shown_size(size: float | None) -> str:
    """A size as the user gives it."""
    return "rest" if size is None else str(size)


def assign(
    labels: np.ndarray,
    usable: np.ndarray,
    order: np.ndarray,
    sizes: Mapping[str, int | float | None],
    link: str | None = None,
) -> np.ndarray:
    """Side of each record: components in a random but fixed order, each to the first side that still has room.

    Args:
        labels: component of each record [records].
        usable: bool [records]: the question-answer records to share out.
        order: uint64 [records]: a component's place is that of its first record in this order.
        sizes: as from `parse_sizes`.
        link: as from `link_of_largest`, for the error.

    Returns:
        int8 [records]: `GL`, `CL`, `EVAL`, or `UNUSED` where the sizes leave a record out.

    Raises:
        UserError: the counts exceed the records, or a side stays empty: no component fits into it, or those that do
            are on others, or there are no records.
    """
    side = np.full(len(labels), UNUSED, np.int8)
    records = np.flatnonzero(usable)
    if not len(records):
        _check_unasked(sizes)
        return side
    room = _targets(sizes, len(records))
    rest = next((name for name, size in sizes.items() if size is None), None)
    everything = sum(room.values()) >= len(records)
    records = records[np.argsort(order[records], kind="stable")]
    _, first, inverse, counts = np.unique(labels[records], return_index=True, return_inverse=True, return_counts=True)
    place = np.full(len(counts), UNUSED, np.int8)
    wanted = dict(room)
    for number in np.argsort(first, kind="stable").tolist():
        count = int(counts[number])
        name = next((name for name in reversed(SIDES) if 0 < count <= room.get(name, 0)), None)
        if name is None and everything:  # nothing may be lost: where most room is left, or with the rest
            name = rest or max(room, key=lambda name: room[name])
        if name is not None:
            place[number] = SIDES.index(name)
            room[name] -= count
    side[records] = place[inverse]
    _check_filled(wanted, place, counts, link)
    return side


def shortfalls(
    side: np.ndarray, labels: np.ndarray, usable: np.ndarray, sizes: Mapping[str, int | float | None]
) -> dict[str, dict[str, int]]:
    """Sides that have far less than was asked for, with both counts and the size of the largest component; arguments
    as of `assign`, and what it gave.
    """
    total = int(usable.sum())
    if not total:
        return {}
    largest = int(np.unique(labels[usable], return_counts=True)[1].max())
    found = {name: (int((side == SIDES.index(name)).sum()), asked) for name, asked in _targets(sizes, total).items()}
    return {
        name: {"records": records, "asked_for": asked, "largest_component": largest, "of": total}
        for name, (records, asked) in found.items()
        if records < SHORT * asked
    }


def _check_unasked(sizes: Mapping[str, int | float | None]) -> None:
    """See that no side is asked for which plain texts cannot fill; `sizes` as from `parse_sizes`.

    Raises:
        UserError: cl or eval is.
    """
    asked = {name: size for name, size in sizes.items() if name != "gl" and size != 0 and not isinstance(size, Default)}
    if asked:
        listed = " and ".join(f"--{name} {shown_size(size)}" for name, size in asked.items())
        raise UserError(
            f"{listed}: no question-answer record is left to share out (what was read as plain text goes to gl): leave "
            "this out, or give sources with questions and answers (what they are read as: --kind, --field)"
        )


def _check_filled(wanted: Mapping[str, int], place: np.ndarray, counts: np.ndarray, link: str | None) -> None:
    """See that every side that is wanted has a component; `place` and `counts` are of each its side and its records,
    `link` is what links most of the largest.

    Raises:
        UserError: none fits into a side, or those that do are on others.
    """
    for name, size in wanted.items():
        if size == 0 or (place == SIDES.index(name)).any():
            continue
        fits = counts <= size
        problem, remedy = f"no component of records that belong together fits into {size} records", "more, or for 0"
        if fits.any():
            takers = " and ".join(side for number, side in enumerate(SIDES) if (place[fits] == number).any())
            problem = f"all components that fit into {size} records ({int(counts[fits].sum())} in all) went to {takers}"
            remedy = "less there, or for 0 here"
        raise UserError(
            f"--{name}: {problem} (of {int(counts.sum())} in all, the largest has {int(counts.max())}, the smallest "
            f"{int(counts.min())}): ask for {remedy}; or link fewer, by another --entity or a --similarity up to 1 "
            "(equal texts always link)" + f"; most of the largest are near-duplicates: {ALIKE}" * (link == NEAR)
        )


def _targets(sizes: Mapping[str, int | float | None], total: int) -> dict[str, int]:
    room = {}
    for name, size in sizes.items():
        if size is not None:
            room[name] = round(size * total) if isinstance(size, float) else size
    asked = sum(room.values())
    shares_only = all(isinstance(size, float) for size in sizes.values())
    if asked > total and shares_only:  # rounding
        room[max(room, key=lambda name: room[name])] -= asked - total
    elif asked > total:
        listed = ", ".join(f"--{name} {count}" for name, count in room.items())
        raise UserError(
            f"the sizes ask for {asked} question-answer records ({listed}), the sources have {total}: lower one; "
            "a side that is not given has its default"
        )
    if shares_only and abs(sum(size for size in sizes.values() if size is not None) - 1) < 1e-9:
        room[max(room, key=lambda name: room[name])] += total - sum(room.values())
    for name, size in sizes.items():
        if size is None:
            room[name] = total - asked
    return room
