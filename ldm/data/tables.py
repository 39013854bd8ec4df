"""Parquet tables: streaming rows in little memory, and diagnosis of damage by file and column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ldm.data.file_names import printable
from ldm.data.storage import is_url

LONGEST = 2**16  # characters of a text that are kept; a dictionary of parquet can make gigabytes of one value
_ROWS = 64  # that are in memory at a time
_NESTED = ("STRUCT", "MAP", "UNION")
_TIMES = ("TIME", "DATE", "INTERVAL")


def reading_errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises while it opens or reads a damaged parquet file: names and texts may be no UTF-8, dates no days, too."""
    import pyarrow as pa

    return pa.ArrowException, OSError, ValueError, OverflowError


def rows(opened: Any, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a pyarrow ParquetFile as plain values, texts cut at LONGEST."""
    for part in opened.iter_batches(batch_size=_ROWS, columns=list(columns)):
        for row in part.to_pylist():
            yield {name: value[:LONGEST] if isinstance(value, str) else value for name, value in row.items()}


def unfit(described: Mapping[str, str], columns: Mapping[str, str], numbers: Sequence[str]) -> tuple[str, str] | None:
    """The first column whose type cannot mean what its name says, and what it should be.

    Args:
        described: types by column, as duckdb describes them.
        columns: columns by our names for them.
        numbers: which of our names are numbers; the others are texts.
    """
    for name, column in columns.items():
        kind = described.get(column, "").upper()
        if kind.endswith("]") or kind.startswith(_NESTED) or (name in numbers and kind.startswith(_TIMES)):
            return column, "numbers" if name in numbers else "texts"
    return None


def damage(files: Sequence[str]) -> str | None:
    """The first file, and its first column, that cannot be read whole; None if all of them can.

    Reads row group by row group, so that a table of any size needs little memory. URLs are not looked at.
    """
    import pyarrow.parquet as pq

    for file in files:
        if is_url(file):
            continue
        try:
            with pq.ParquetFile(file) as opened:
                for column in opened.schema_arrow.names:
                    if said := _column(opened, column):
                        return f"{file}: column {column} is damaged ({said})"
        except reading_errors() as error:
            return f"{file}: not a whole parquet file ({in_a_line(error)})"
    return None


def _column(opened: Any, column: str) -> str | None:
    for group in range(opened.num_row_groups):
        try:
            for part in opened.iter_batches(batch_size=4096, row_groups=[group], columns=[column]):
                part.validate(full=True)
        except reading_errors() as error:
            return f"row group {group}: {in_a_line(error)}"
    return None


def in_a_line(error: Exception) -> str:
    """What a library said, on one line."""
    return printable(" ".join(str(error).split())[:160])
