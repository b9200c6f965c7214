"""What stands below the recommendation: how sure it is, on how many episodes, and what would change it."""

from __future__ import annotations

from collections.abc import Sequence

from policy.statistics.recommendation import Recommendation
from policy.sweep.conclusion import label_of
from policy.sweep.grid import Row
from policy.sweep.panels import count_of, stopped_early


def facts_of(rows: Sequence[Row], advice: Recommendation, *, paired: bool = True) -> dict[str, str]:
    """The facts about a recommendation, each a sentence.

    Args:
        rows: one per cell, with its difference to the best cell.
        advice: the recommendation.
        paired: whether all cells ran the same episodes.

    Returns:
        `how sure`, `episodes` and `what would change it`.
    """
    return {
        "how sure": _how_sure(advice),
        "episodes": _episodes(rows, paired=paired),
        "what would change it": _change(rows, advice),
    }


def _how_sure(advice: Recommendation) -> str:
    sure, points = f"{advice.confidence:.0%}".replace("%", " %"), f"{100 * advice.margin:g} points"
    if advice.cell is None:
        return f"Not enough: a recommended cell is, with {sure} confidence, less than {points} below the best."
    return (
        f"{sure}: that is the chance, at least, that a sweep like this one recommends no cell whose true success is"
        f" {points} or more below the best cell's."
    )


def _episodes(rows: Sequence[Row], *, paired: bool) -> str:
    total = sum(row["episodes"] for row in rows)
    early = sum(stopped_early(rows))
    stopped = f"; {early} of {len(rows)} cells stopped at an earlier look" if early else ""
    same = "the same in each cell" if paired else "others in each cell"
    return f"{count_of(rows)} a cell, {same}, {total:,} in all{stopped}."


def _change(rows: Sequence[Row], advice: Recommendation) -> str:
    """Name the cell that is most likely to be recommended instead, and what its difference would have to be."""
    points = f"{100 * advice.margin:g} points"
    open_cells = [number for number, cell in enumerate(advice.cells) if cell.verdict == "open"]
    if advice.cell is not None:
        chosen = advice.cell
        cost = [float(row.get("multiply_adds") or row["ddim_steps"]) for row in rows]
        cheaper = [n for n in range(len(rows)) if cost[n] < cost[chosen]]
        if not cheaper:
            return "A cheaper cell, which this sweep does not have, or another margin."
        nearest = max(cheaper, key=lambda n: (n in open_cells, rows[n]["difference"]))
        return (
            f"{label_of(rows, rows[nearest])}, which is cheaper, if it were shown to be less than {points} below the"
            f" best: so far {_seen(rows[nearest])}."
        )
    nearest = max(open_cells or range(len(rows)), key=lambda n: rows[n]["difference_low"])
    return (
        f"A cell that is shown to be less than {points} below every other one: the nearest,"
        f" {label_of(rows, rows[nearest])}, so far {_seen(rows[nearest])}."
    )


def _seen(row: Row) -> str:
    difference, low, high = (100 * row[key] for key in ("difference", "difference_low", "difference_high"))
    return f"its difference is {difference:+.1f} points ({low:+.1f} to {high:+.1f})"
