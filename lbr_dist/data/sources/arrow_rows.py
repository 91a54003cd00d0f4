"""Rows of a Parquet file, or of a saved data set: few at a time, with texts for dates."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from lbr_dist.data.sources.field_names import check_distinct
from lbr_dist.data.sources.json_rows import Numbered, Row
from lbr_dist.data.sources.row_values import RowError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 1000
"""Rows decoded at once at most,"""
BATCH_BYTES = 32 << 20
"""and about so many bytes, unless a single row has more."""


def parquet_rows(path: Path) -> Numbered:
    """Rows of a Parquet file.

    Raises:
        ValueError: it is damaged, or two of its columns have one name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def fitting(group: int) -> int:
        """Rows of a row group that are decoded at once."""
        found = file.metadata.row_group(group)
        return min(BATCH, max(1, BATCH_BYTES * found.num_rows // max(1, found.total_byte_size)))

    try:
        with path.open("rb") as raw, pq.ParquetFile(raw) as file:  # pyarrow opens no name that is not UTF-8
            check_distinct(file.schema_arrow.names, "its columns name")
            groups = groupby(range(file.num_row_groups), fitting)
            yield from arrow_rows(batch for most, alike in groups for batch in file.iter_batches(most, list(alike)))
    except pa.ArrowException as error:
        raise ValueError(" ".join(str(error).split())) from error


def arrow_rows(batches: Iterator[pa.RecordBatch | pa.Table]) -> Numbered:
    """Rows of batches, which are numbered on from one to the next."""
    import pyarrow as pa

    number = 0
    for batch in batches:
        for part in _small(batch):
            for row in _dicts(part.cast(pa.schema(map(_dateless, part.schema)))):
                number += 1
                yield number, row


def _small(batch: pa.RecordBatch | pa.Table) -> Iterator[pa.RecordBatch | pa.Table]:
    """The rows in batches of at most `BATCH_BYTES`, unless a single one has more."""
    if batch.nbytes <= BATCH_BYTES or len(batch) == 1:
        yield batch
    else:
        half = len(batch) // 2
        yield from _small(batch.slice(0, half))
        yield from _small(batch.slice(half))


def _dateless(field: pa.Field) -> pa.Field:
    """The field with texts for dates, inside it too: so they need not lie in the years that Python knows."""
    import pyarrow as pa
    from pyarrow import types

    kind = field.type
    if any(is_one(kind) for is_one in (types.is_date, types.is_time, types.is_timestamp, types.is_duration)):
        kind = pa.string()
    elif types.is_struct(kind):
        kind = pa.struct([_dateless(kind.field(number)) for number in range(kind.num_fields)])
    elif types.is_list(kind):
        kind = pa.list_(_dateless(kind.value_field))
    elif types.is_large_list(kind):
        kind = pa.large_list(_dateless(kind.value_field))
    elif types.is_fixed_size_list(kind):
        kind = pa.list_(_dateless(kind.value_field), kind.list_size)
    elif types.is_map(kind):
        kind = pa.map_(_dateless(kind.key_field), _dateless(kind.item_field))
    return field.with_type(kind)


def _dicts(batch: pa.RecordBatch | pa.Table) -> list[Row]:
    """The rows as dicts, with one for a map, unless it has a key twice: then with a list of its pairs.

    Arrow has not looked into the strings, and one that is not UTF-8 is its row's error alone.
    """
    try:
        return batch.to_pylist(maps_as_pydicts="strict")
    except (UnicodeDecodeError, KeyError) as error:
        if len(batch) == 1:
            if isinstance(error, KeyError):
                return batch.to_pylist()
            return [RowError("invalid_utf8", f"byte {error.start} of a string")]
        return [row for number in range(len(batch)) for row in _dicts(batch.slice(number, 1))]
