"""A sweep as a table for the terminal, and as CSV and JSON files for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from policy.common.files import json_text, write_text
from policy.common.markdown import markdown_table
from policy.sweep.grid import Row, varying

# By the name of the figure: the column's head, and the format of its cells.
COLUMNS = {
    "ddim_steps": ("ddim_steps", "{:d}"),
    "training_seeds": ("training seeds", "{:d}"),
    "success_rate": ("success", "{:.0%}"),
    "success_low": ("95 % from", "{:.0%}"),
    "success_high": ("to", "{:.0%}"),
    "score_mean": ("score", "{:.3f}"),
    "score_low": ("95 % from", "{:.3f}"),
    "score_high": ("to", "{:.3f}"),
    "return_mean": ("return", "{:.1f}"),
    "steps_mean": ("steps", "{:.0f}"),
    "latency_ms_median": ("ms a chunk", "{:.1f}"),
    "control_rate_hz": ("plans for Hz", "{:.0f}"),
}


def table_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text: a line of heads, then a line for each row, beginning with the axes along which rows differ."""
    axes = varying(rows)
    columns = {key: column for key, column in COLUMNS.items() if all(key in row for row in rows)}
    heads = [*axes, *(head for head, _ in columns.values())]
    lines = [
        [*(str(row[axis]) for axis in axes), *(form.format(row[key]) for key, (_, form) in columns.items())]
        for row in rows
    ]
    return [heads, *lines]


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
