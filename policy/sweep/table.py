"""A sweep as a table for the terminal, and as CSV and JSON files for programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from policy.common.files import json_text, write_text
from policy.common.markdown import markdown_table
from policy.sweep.rows import Row, varying


def in_millions(count: float) -> str:
    """A number of multiply-adds in millions, to three digits."""
    return f"{count / 1e6:,.{max(0, 2 - int(math.log10(max(count / 1e6, 1))))}f}"


def rate_text(rate: float) -> str:
    """A highest control rate, rounded down, so that the one that is read is allowed too."""
    return f"{math.floor(rate)}" if rate >= 10 else f"{math.floor(10 * rate) / 10:.1f}"


# By the name of the figure: the column's head, and the format of its cells.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "ddim_steps": ("ddim_steps", "{:d}".format),
    "training_seeds": ("training seeds", "{:d}".format),
    "episodes": ("episodes", "{:d}".format),
    "success_rate": ("success", "{:.0%}".format),
    "success_low": ("95 % from", "{:.0%}".format),
    "success_high": ("to", "{:.0%}".format),
    "score_mean": ("score", "{:.3f}".format),
    "score_low": ("95 % from", "{:.3f}".format),
    "score_high": ("to", "{:.3f}".format),
    "return_mean": ("return", "{:.1f}".format),
    "steps_mean": ("steps", "{:.0f}".format),
    "multiply_adds": ("million multiply-adds", in_millions),
    "latency_ms_median": ("ms a chunk", "{:.1f}".format),
    "waiting_rate_hz": ("waits up to Hz", rate_text),
    "planning_ahead_rate_hz": ("plans ahead up to Hz", rate_text),
}
# The columns that a busy machine makes wrong.
MEASURED = ("latency_ms_median", "waiting_rate_hz", "planning_ahead_rate_hz")


def table_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text: a line of heads, then a line for each row, beginning with the axes along which rows differ.

    Columns that a row lacks are left out, as latencies while a sweep runs, and so are equal numbers of episodes.
    """
    axes = varying(rows)
    columns = {key: column for key, column in COLUMNS.items() if any(key in row for row in rows)}
    if len({row.get("episodes") for row in rows}) == 1:
        columns.pop("episodes", None)
    heads = [*axes, *(head for head, _ in columns.values())]
    lines = [
        [*(str(row[axis]) for axis in axes), *(_figure(row, key, shown) for key, (_, shown) in columns.items())]
        for row in rows
    ]
    return [heads, *lines]


def _figure(row: Row, key: str, shown: Callable[[Any], str]) -> str:
    if row.get(key) is None:  # a row of another version lacks it
        return ""
    return f"{shown(row[key])} busy" if key in MEASURED and row.get("busy") else shown(row[key])


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a plain text table, which is valid Markdown too."""
    heads, *lines = table_cells(rows)
    return markdown_table(heads, lines, align="r" * len(heads))


def write_files(folder: Path, rows: Sequence[Row], episodes: Sequence[Row], summary: Mapping[str, Any]) -> list[Path]:
    """Write `sweep.csv` (a row for each cell), `episodes.csv` (a row for each episode) and `sweep.json` (everything).

    Args:
        folder: receives the files.
        rows: the cells' rows.
        episodes: the episodes of all cells.
        summary: the conclusion, as JSON data.

    Returns:
        The files.
    """
    document = folder / "sweep.json"
    write_text(document, json_text({**summary, "cells": list(rows), "episodes": list(episodes)}, indent=1))
    files = [folder / "sweep.csv", folder / "episodes.csv"]
    for file, table in zip(files, (rows, episodes), strict=True):
        text = io.StringIO()
        writer = csv.DictWriter(text, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
        write_text(file, text.getvalue())
    return [*files, document]
