"""Does sampling from a distribution of chunks pay on this task? Each such policy beside the regressions of a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from policy.statistics.checks import Array
from policy.statistics.paired import PairedDifference, compare_success
from policy.statistics.recipe_recommendation import compare_recipes
from policy.statistics.recommendation import in_points
from policy.statistics.sequential import ERROR
from policy.statistics.superiority import Superiority, superiority
from policy.sweep.rows import Row, is_control, label_of, objective_of


def against_controls(
    rows: Sequence[Row], success: Sequence[Array], margin: float, *, paired: bool, looks: int = 1
) -> list[Row]:
    """Say for each checkpoint with a curve whether it was shown to beat each control of the sweep.

    The intervals of all its cells, at all looks of the sweep, hold together with a confidence of 95 % (Bonferroni), so
    that the best cell may be chosen by its result, and the sweep may have stopped by it.

    Args:
        rows: one per cell.
        success: (S, N) outcomes of each cell, S training seeds on the same episodes; one that stopped early has fewer.
        margin: the difference of success rates that matters.
        paired: whether equal seeds are equal episodes.
        looks: how many times the sweep may have looked at its results.

    Returns:
        For each pair of a curve and a control, the cell that decides, the control's cell as `reference`, the difference
        with its interval, the `verdict` and all this as a `sentence`.
    """
    curves: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if not is_control(row):
            curves.setdefault(row["checkpoint"], []).append(number)
    compared = []
    for control in (number for number, row in enumerate(rows) if is_control(row)):
        for cells in curves.values():
            confidence = 1 - ERROR / (len(cells) * looks)
            recipes = [rows[number]["checkpoint"] for number in (control, *cells)]
            outcomes = [success[number] for number in (control, *cells)]
            found = _differences(outcomes, recipes, confidence, paired=paired)
            decided = superiority([pair.low for pair in found], [pair.high for pair in found], margin)
            compared.append(_row(rows, cells[decided.cell], control, found[decided.cell], decided, margin, len(cells)))
    return compared


def _differences(
    outcomes: Sequence[Array], recipes: Sequence[str], confidence: float, *, paired: bool
) -> list[PairedDifference]:
    """Compare all cells but the first with it."""
    if max(map(len, outcomes)) > 1:
        names = list(dict.fromkeys(recipes))
        found = compare_recipes(outcomes, [names.index(recipe) for recipe in recipes], 0, confidence)
    else:
        found = compare_success([cell[0] for cell in outcomes], 0, confidence, paired=paired)
    return list(found[1:])


def _row(
    rows: Sequence[Row],
    cell: int,
    control: int,
    found: PairedDifference,
    decided: Superiority,
    margin: float,
    cells: int,
) -> Row:
    ours, theirs, points = objective_of(rows[cell]), objective_of(rows[control]), in_points(margin)
    said = {
        "better": f"{ours} was shown to beat {theirs} on this task",
        "not better": f"{ours} was shown not to beat {theirs} by more than {points} on this task",
        "open": f"it is open whether {ours} beats {theirs} on this task, and more episodes or seeds may decide it",
    }[decided.verdict]
    figures = {"difference": found.difference, "difference_low": found.low, "difference_high": found.high}
    shown = "{:+z.1f} points of success ({:+z.1f} to {:+z.1f}".format(*(100 * value for value in figures.values()))
    together = f" with 95 % for all {cells} cells together" if cells > 1 else " with 95 %"
    return {
        "cell": rows[cell]["cell"],
        "reference": rows[control]["cell"],
        **figures,
        "verdict": decided.verdict,
        "sentence": f"{said[0].upper()}{said[1:]}: {label_of(rows, rows[cell])} differs from"
        f" {label_of(rows, rows[control])} by {shown}{together}).",
    }
