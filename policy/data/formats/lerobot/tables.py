"""Parquet files, read a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from policy.common.errors import reason_of
from policy.data.budget import Budget
from policy.data.formats.parquet import check_row_groups


class TableFile:
    """A data file. Only the newest row groups are in memory, because the file may hold pictures of many episodes."""

    def __init__(self, name: str, file: Path, columns: Sequence[str], budget: Budget) -> None:
        self.name = name
        self._budget = budget
        self._columns = list(columns)
        with _readable(name):
            self._file = pq.ParquetFile(file)
            available = self._file.schema_arrow.names
            groups = [self._file.metadata.row_group(n).num_rows for n in range(self._file.metadata.num_row_groups)]
            if not groups:
                raise ValueError(f"{name} has no rows")
        self._ends = np.cumsum(groups, dtype=np.int64)
        self._start = 0
        self._rows: pa.Table | None = None
        for column in columns:
            if available.count(column) != 1:
                self.close()
                raise ValueError(f"{name} has no column {column!r}; it has {', '.join(available)}")

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return int(self._ends[-1])

    @cached_property
    def first_index(self) -> int:
        """The first value of `index`, which is the number of the first row in the whole dataset.

        Raises:
            ValueError: the file is damaged.
        """
        with _readable(self.name):
            column = self._file.read_row_group(int(np.argmax(self._ends > 0)), ["index"]).column("index")
        if not len(column):
            raise ValueError(f"{self.name} has no rows")
        return int(whole_numbers(column)[0])

    def rows(self, start: int, stop: int) -> pa.Table:
        """Read the rows from `start` to `stop`, exclusive.

        Raises:
            ValueError: the file is damaged or does not have these rows.
        """
        if not 0 <= start <= stop <= self.num_rows:
            raise ValueError(f"{self.name} has {self.num_rows} rows; rows {start} to {stop} are not there")
        if self._rows is None or not (self._start <= start and stop <= self._start + self._rows.num_rows):
            first, last = (int(n) for n in np.searchsorted(self._ends, [start, max(start, stop - 1)], side="right"))
            self._rows = None  # frees the old rows before others are read
            groups = range(first, min(last + 1, len(self._ends)))
            with _readable(self.name):
                check_row_groups(self._file.metadata, self._budget, self.name, groups=groups, columns=self._columns)
                rows = self._file.read_row_groups([*groups], self._columns)
            self._start = int(self._ends[first - 1]) if first else 0
            if self._start + rows.num_rows < stop:
                raise ValueError(f"{self.name} is damaged (a row group has fewer rows than it should)")
            self._rows = rows
        return self._rows.slice(start - self._start, stop - start)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_columns(
    name: str, file: Path, columns: Sequence[str], budget: Budget, optional: bool = False
) -> dict[str, list[Any]]:
    """Read columns of a small file.

    Args:
        name: the file's name, for messages.
        file: the file.
        columns: names of the columns.
        budget: the memory that the columns may take.
        optional: read the columns that exist, instead of refusing a file that lacks one.

    Returns:
        The values of each column.

    Raises:
        ValueError: the file is damaged or lacks a column.
    """
    with _readable(name, ": fetch it again"), pq.ParquetFile(file) as opened:
        available = opened.schema_arrow.names
        found = [column for column in columns if available.count(column) == 1]
        check_row_groups(opened.metadata, budget, name, columns=found)
        table = opened.read(found)
        values = {column: table.column(column).to_pylist() for column in found}
    if not optional and len(found) < len(columns):
        missing = next(column for column in columns if column not in found)
        raise ValueError(f"{name} has no column {missing!r}")
    return values


def numbers(column: pa.ChunkedArray, width: int) -> NDArray[Any]:
    """Convert a column to an array.

    Args:
        column: T numbers or lists of numbers, which may be nested.
        width: expected number of numbers in each value.

    Returns:
        The array, (T, width).

    Raises:
        ValueError: a value is missing, is not made of numbers, or has another width.
    """
    with _readable("its column"):
        values = column.combine_chunks()
        if isinstance(values, pa.ExtensionArray):  # a matrix, if the datasets package is imported
            values = values.storage
        while pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or _is_fixed(values.type):
            sizes = pc.unique(pc.list_value_length(values)).to_pylist()
            if None in sizes:
                raise ValueError("a value is missing (null)")
            if len(sizes) > 1:
                raise ValueError(f"its values are of different lengths, such as {sizes[0]} and {sizes[1]}")
            values = values.flatten()
        if not (
            pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_boolean(values.type)
        ):
            raise ValueError(f"its values are of type {values.type}, not numbers")
        if values.null_count:
            raise ValueError("a value is missing (null)")
        flat = values.to_numpy(zero_copy_only=False)
    if len(flat) != len(column) * width:
        raise ValueError(
            f"{len(flat) / max(1, len(column)):g} numbers are stored for each transition; expected {width}"
        )
    return flat.reshape(len(column), width)


def whole_numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    """Convert a column to whole numbers, (T,).

    Raises:
        ValueError: the column holds other values.
    """
    values = numbers(column, 1)[:, 0]
    if values.dtype.kind not in "iu":
        raise ValueError(f"its values are of type {values.dtype}, not whole numbers")
    return values


def _is_fixed(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind)


@contextmanager
def _readable(name: str, advice: str = "") -> Iterator[None]:
    """Turn an error of Arrow into one that names the file and gives advice."""
    try:
        yield
    except pa.ArrowNotImplementedError as error:  # a codec that this build of pyarrow lacks
        raise ValueError(f"{name} needs a part of pyarrow that is not installed ({error!s:.200})") from error
    except (pa.ArrowException, OSError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} is damaged ({reason_of(error):.200}){advice}") from error
