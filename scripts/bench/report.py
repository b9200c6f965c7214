"""The output of every benchmark: the machine, the versions, a table, and its rows as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from policy.common.machine import available_cores, processor
from policy.common.markdown import markdown_table

FOLDER = Path("outputs/bench")


def machine(*packages: str) -> str:
    """Describe the machine and the versions that figures come from, in one line."""
    names = ("torch", "numpy", *packages)
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return (
        f"{processor()}, {available_cores()} cores, {torch.get_num_threads()} torch threads,"
        f" Python {platform.python_version()}, {versions}"
    )


def write_report(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Print the rows as a table and write them to `outputs/bench/<name>.json`.

    Args:
        name: the benchmark's name.
        rows: JSON data; a row may lack columns that others have.

    Returns:
        The file.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[cell(row.get(column)) for column in columns] for row in rows]
    print(markdown_table(columns, cells, align="l" * len(columns)))
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(list(rows), indent=2))
    print(f"rows: {path}")
    return path


def cell(value: Any) -> str:
    """A value as the tables show it; None as nothing."""
    if value is None:
        return ""
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )
