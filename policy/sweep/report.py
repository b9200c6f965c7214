"""The report of a sweep: one page with the recommendation, the plots, the cells and episodes side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy.common.files import write_text
from policy.common.page import page_text
from policy.sweep.panels import facets_of, marks_of
from policy.sweep.rows import Row, has_recipes
from policy.sweep.table import table_cells

# What the intervals are, by whether cells are recipes.
INTERVALS = {
    True: "95 % intervals: over training seeds and episodes for recipes, otherwise Wilson for success and bootstrap for"
    " the score.",
    False: "95 % intervals: Wilson for success, bootstrap for the score.",
}
# How to read the last column, by whether cells ran the same episodes.
AGAINST_THE_BEST = {
    True: "Every cell ran the same episodes with the same initial noise. 'Against the best' is the paired difference",
    False: "Cells ran different episodes. 'Against the best' is the difference",
}
# What its intervals hold for, by whether cells are recipes of several checkpoints.
TOGETHER = {
    True: "in success to the best cell, in points, with its interval, which holds for its cell alone and leaves out"
    " that the best cell was found by these outcomes.",
    False: "in success to the best cell, in points, with its interval; these intervals hold for all cells together.",
}


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A recorded episode of one cell.

    Attributes:
        seed: the episode's seed.
        caption: the settings in which the cell differs from the others, and how the episode ended.
        file: the mp4 file.
    """

    seed: int
    caption: str
    file: Path


def write_report(
    path: Path,
    rows: Sequence[Row],
    *,
    title: str,
    answer: str,
    facts: Mapping[str, str] = {},
    comparisons: Sequence[str] = (),
    warnings: Sequence[str] = (),
    chosen: int | None = None,
    differences: Sequence[str] = (),
    margin: float | None = None,
    clips: Sequence[Clip] = (),
    without_clips: str = "",
    settings: Mapping[str, Any],
    paired: bool = True,
) -> None:
    """Write the page. It needs neither a network nor any other file.

    Args:
        path: the HTML file.
        rows: the cells' rows; while a sweep runs they may lack latencies and differences, or there may be none.
        title: says what was swept.
        answer: the recommendation, in a sentence.
        facts: what stands below it, sentences by name: how sure it is, on how many episodes, what would change it.
        comparisons: how checkpoints differ, in sentences.
        warnings: what a reader must know besides, in sentences.
        chosen: index of the recommended row, or None.
        differences: how each row compares with the best one, in words; a column that is left out if there are none.
        margin: see `facets_of`.
        clips: recorded episodes; those with the same seed stand side by side.
        without_clips: stands where the episodes would, if there are none.
        settings: listed at the end of the page, by name.
        paired: whether all cells ran the same episodes.
    """
    heads, *lines = table_cells(rows) if rows else [[]]
    if differences:
        heads = [*heads, "against the best"]
        lines = [[*line, difference] for line, difference in zip(lines, differences, strict=True)]
    seeds = dict.fromkeys(clip.seed for clip in clips)
    page = page_text(
        "sweep/report_template.html",
        title=title,
        answer=answer,
        facts=facts,
        comparisons=comparisons,
        warnings=warnings,
        facets=facets_of(rows, margin=margin, chosen=chosen) if rows else [],
        marks=marks_of(rows, chosen) if rows else "",
        heads=heads,
        lines=lines,
        reading=_reading(rows, compared=bool(differences), paired=paired),
        chosen=chosen,
        clips={seed: [clip for clip in clips if clip.seed == seed] for seed in seeds},
        without_clips=without_clips,
        settings=settings,
        paired=paired,
    )
    write_text(path, page)


def _reading(rows: Sequence[Row], *, compared: bool, paired: bool) -> str:
    """How to read the table, in sentences."""
    recipes = has_recipes(rows)
    against = f" {AGAINST_THE_BEST[paired]} {TOGETHER[recipes]}" if compared else ""
    return f"{INTERVALS[recipes]}{against}"
