"""How Minari stores episodes: one HDF5 file, or a folder of arrow or parquet files for each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from policy.data.budget import Budget, BudgetError
from policy.data.formats.hdf5 import HDF5File
from policy.data.formats.minari.leaves import ACTIONS, Leaf, Rows, may_be_jpeg
from policy.data.formats.parquet import check_row_groups


class Storage(Protocol):
    """One of Minari's storage formats.

    Attributes:
        names: numbers of the episodes, in order.
    """

    names: Sequence[str]

    def rows(self, name: str, leaves: Sequence[Leaf]) -> list[Rows]:
        """Read some arrays of an episode: T rows of actions, T + 1 rows of observations."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


def open_storage(data_format: str, files: Mapping[str, Path], budget: Budget) -> Storage:
    """Open the storage of a dataset.

    Args:
        data_format: `hdf5`, `arrow` or `parquet`.
        files: the files of the dataset, by their path in its folder.
        budget: what may be read.

    Raises:
        ValueError: another format, or the file is missing.
    """
    if data_format == "hdf5":
        return HDF5Storage(files, budget)
    if data_format in ("arrow", "parquet"):
        return ArrowStorage(files, data_format, budget)
    raise ValueError(f"data_format {data_format!r} in data/metadata.json must be hdf5, arrow or parquet")


class HDF5Storage:
    """One file, `episode_<i>/observations/...` and `episode_<i>/actions`."""

    def __init__(self, files: Mapping[str, Path], budget: Budget) -> None:
        if "data/main_data.hdf5" not in files:
            raise ValueError("it has no data/main_data.hdf5: it was copied partly, fetch it again")
        self._file = HDF5File(files["data/main_data.hdf5"], budget)
        found = (re.fullmatch(r"episode_(\d+)", name) for name in self._file.names(""))
        self.names: Sequence[str] = sorted((match[1] for match in found if match), key=int)

    def rows(self, name: str, leaves: Sequence[Leaf]) -> list[Rows]:
        """See `Storage`."""
        return [self._rows(name, leaf) for leaf in leaves]

    def _rows(self, name: str, leaf: Leaf) -> Rows:
        steps = (f"_index_{step}" if isinstance(step, int) else step for step in leaf.path)
        key = "/".join((f"episode_{name}", *steps))
        if not may_be_jpeg(leaf.space):
            return self._file.numbers(key)
        blobs = self._file.blobs(key)
        if blobs is not None:
            return blobs
        rows = self._file.numbers(key)
        # Minari stores JPEGs of equal length as a matrix.
        return [row.tobytes() for row in rows] if rows.ndim == 2 else rows

    def close(self) -> None:
        """See `Storage`."""
        self._file.close()


class ArrowStorage:
    """A folder for each episode, with columns `observations` (a struct if they are nested) and `actions`."""

    def __init__(self, files: Mapping[str, Path], suffix: str, budget: Budget) -> None:
        self._budget = budget
        self._parts: dict[str, list[Path]] = {}
        for name, file in files.items():
            if match := re.fullmatch(rf"data/(\d+)/[^/]+\.{suffix}", name):
                self._parts.setdefault(match[1], []).append(file)
        self.names: Sequence[str] = sorted(self._parts, key=int)

    def rows(self, name: str, leaves: Sequence[Leaf]) -> list[Rows]:
        """See `Storage`."""
        try:
            table = pa.concat_tables([_read_table(part, leaves, self._budget) for part in self._parts[name]])
        except BudgetError:
            raise
        except Exception as error:  # exceptions of pyarrow, and exceptions of Python that it lets through
            raise ValueError(f"{self._parts[name][0].name} cannot be read ({error}): fetch it again") from error
        return [_arrow_rows(table, leaf) for leaf in leaves]

    def close(self) -> None:
        """Do nothing: no file stays open."""


def _read_table(part: Path, leaves: Sequence[Leaf], budget: Budget) -> pa.Table:
    if part.suffix == ".parquet":
        check_row_groups(pyarrow.parquet.read_metadata(part), budget, part.name)
        columns = [".".join(map(str, leaf.path)) for leaf in leaves]
        return pyarrow.parquet.ParquetFile(part).read(columns=columns, use_threads=False)
    with pa.memory_map(str(part)) as mapped:  # columns that are not requested are never read
        return pa.ipc.open_file(mapped, options=pa.ipc.IpcReadOptions(use_threads=False)).read_all()


def _arrow_rows(table: pa.Table, leaf: Leaf) -> Rows:
    first, *steps = leaf.path
    try:
        column = table.column(first).combine_chunks()
        column.validate(full=True)
        for step in steps:
            column = column.field(str(step))
        rows = _arrow_values(column, leaf.space)
    except Exception as error:
        raise ValueError(f"'{leaf}' cannot be read ({error})") from error
    # Minari pads actions to the length of the observations.
    return rows[:-1] if first == ACTIONS else rows


def _arrow_values(column: Any, space: gymnasium.Space[Any]) -> Rows:
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return [value or b"" for value in column.to_pylist()]
    values = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
    if column.null_count or values.null_count:
        raise ValueError("it has empty rows")
    numbers: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    if values is column:
        return numbers
    width = column.type.list_size
    return numbers.reshape(len(column), *(space.shape if width == math.prod(space.shape or ()) else (width,)))  # type: ignore[misc]
