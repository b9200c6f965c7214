"""What a sweep leaves behind: a table for the terminal, CSV and JSON for programs, a picture for people."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policy.sweep.grid import Row, varying

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {
    "ddim_steps": ("ddim_steps", "{:d}"),
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
    """What a table of the rows says: its heads, then a line a cell, beginning with what tells cells apart."""
    axes = varying(rows)
    heads = [*axes, *(head for head, _ in COLUMNS.values())]
    lines = [
        [*(str(row[axis]) for axis in axes), *(form.format(row[key]) for key, (_, form) in COLUMNS.items())]
        for row in rows
    ]
    return [heads, *lines]


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a plain text table; the same text is valid Markdown."""
    cells = table_cells(rows)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    rule = "| " + " | ".join("-" * (w - 1) + ":" for w in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def write_files(folder: Path, rows: Sequence[Row], episodes: Sequence[Row], summary: Mapping[str, Any]) -> list[Path]:
    """Write `sweep.csv` (a row a cell), `episodes.csv` (a row an episode) and `sweep.json` (all of it).

    Args:
        folder: where to.
        rows: of the cells.
        episodes: of all cells.
        summary: what was concluded, JSON data.

    Returns:
        The files.
    """
    document = folder / "sweep.json"
    document.write_text(json.dumps({**summary, "cells": list(rows), "episodes": list(episodes)}, indent=1))
    files = [folder / "sweep.csv", folder / "episodes.csv"]
    for file, table in zip(files, (rows, episodes), strict=True):
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    return [*files, document]


def plot_rows(rows: Sequence[Row], files: Sequence[Path], title: str) -> None:
    """Draw success with its intervals against `ddim_steps`, and against the latency of a chunk: the frontier.

    Args:
        rows: of the cells.
        files: where to; the ending chooses the format.
        title: what was swept.
    """
    figure = draw_rows(rows)
    figure.suptitle(f"{title}: {rows[0]['episodes']} episodes per point, the same in each")
    for file in files:
        figure.savefig(file, dpi=150)


def draw_rows(rows: Sequence[Row]) -> Figure:
    """The two plots, without a title."""
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    series = _series(rows)
    for axes, key, label in (
        (left, "ddim_steps", "ddim_steps"),
        (right, "latency_ms_median", "ms a chunk (batch 1, one thread), at each ddim_steps"),
    ):
        for name, members in series.items():
            _draw(axes, key, name, members, alone=len(series) == 1)
        axes.set_xscale("log", base=2 if key == "ddim_steps" else 10)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.margins(x=0.1)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    steps = sorted({row["ddim_steps"] for row in rows})
    left.set_xticks(steps, [str(count) for count in steps])
    left.minorticks_off()
    left.set_ylim(-3, 103)
    left.set_ylabel("success (%), 95 % Wilson interval")
    left.legend(loc="lower right", fontsize="small" if len(series) > 1 else "medium")
    return figure


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that differ in nothing but `ddim_steps`, under what tells them from others."""
    axes = varying(rows)
    series: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["ddim_steps"]):
        series.setdefault(", ".join(f"{axis} {row[axis]}" for axis in axes), []).append(row)
    return series


def _draw(axes: Any, key: str, name: str, rows: Sequence[Row], *, alone: bool) -> None:
    success = [100 * row["success_rate"] for row in rows]
    below = [s - 100 * row["success_low"] for s, row in zip(success, rows, strict=True)]
    above = [100 * row["success_high"] - s for s, row in zip(success, rows, strict=True)]
    x = [row[key] for row in rows]
    axes.errorbar(x, success, yerr=[below, above], fmt="o-", capsize=4, label=name or "success")
    if alone:  # with several series the picture holds enough
        scores = [100 * row["score_mean"] for row in rows]
        axes.plot(x, scores, "s--", color="0.6", ms=4, lw=1, label="mean score x 100")
    if key == "latency_ms_median" and alone:
        for row, at, height in zip(rows, x, success, strict=True):
            axes.annotate(str(row["ddim_steps"]), (at, height), textcoords="offset points", xytext=(6, -12))
