"""The size of parquet files once they are decoded, from their footers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from policy.data.budget import Budget

# Bytes of one value, by parquet's physical type. Values of other types have no fixed size.
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}


def check_row_groups(
    metadata: Any,
    budget: Budget,
    name: str,
    *,
    groups: Iterable[int] | None = None,
    columns: Sequence[str] | None = None,
) -> None:
    """Refuse row groups that would need more memory than allowed, before any page of them is decoded.

    Args:
        metadata: pyarrow's metadata of the file.
        budget: the budget.
        name: the file, for messages.
        groups: the row groups to be read together; None for all of them.
        columns: the columns to be read; None for all of them.

    Raises:
        BudgetError: they need more memory.
    """
    needed = 0
    for group in range(metadata.num_row_groups) if groups is None else groups:
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            column = row_group.column(number)
            if columns is None or column.path_in_schema.split(".")[0] in columns or column.path_in_schema in columns:
                # A dictionary or run-length encoding may be much smaller than the values.
                values = column.num_values * WIDTHS.get(column.physical_type, 0)
                needed += max(values, column.total_uncompressed_size)
    budget.check_memory(needed, f"{name}: a part that is read at once")
