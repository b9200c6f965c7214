"""What stands below the recommendation: how sure it is, on how many episodes, and what would change it."""

from __future__ import annotations

from collections.abc import Sequence

from policy.diffusion.sampler import Sampler
from policy.statistics.recommendation import in_points
from policy.sweep.comparison import Advice
from policy.sweep.rows import AXES, Row, below_margin, costs_of, count_of, has_recipes, label_of, stopped_early

# The name of a fact that only some recommendations have.
WHAT_TO_TRY = "what to try"


def facts_of(rows: Sequence[Row], advice: Advice, *, paired: bool = True) -> dict[str, str]:
    """The facts about a recommendation, each a sentence.

    Args:
        rows: one per cell, with its difference to the best cell.
        advice: the recommendation.
        paired: whether all cells ran the same episodes.

    Returns:
        `how sure`, `episodes` and `what would change it`, and `what to try` where there is something.
    """
    episodes = _episodes(rows, paired=paired)
    if below_margin(rows, advice.margin):
        change = "A better policy, more episodes, or a smaller margin."
        return {"how sure": "Nothing is recommended.", "episodes": episodes, "what would change it": change}
    sure, change = _how_sure(advice, has_recipes(rows)), _change(rows, advice)
    facts = {"how sure": sure, "episodes": episodes, "what would change it": change}
    return {**facts, **({WHAT_TO_TRY: hint} if (hint := _what_to_try(rows, advice)) else {})}


def _what_to_try(rows: Sequence[Row], advice: Advice) -> str:
    """What may help where more denoising steps solve fewer episodes; empty where that is not shown.

    With one step, a chunk is nearly the mean of what demonstrators do, whatever noise it begins from. With more, the
    noise chooses among their ways, and what they do at random may be repeated. Less noise keeps nearer to the mean.

    Args:
        rows: one per cell, with its difference to the best cell. Cells that differ from the best one in the number of
            steps alone are looked at.
        advice: the recommendation.
    """
    best = rows[advice.best]
    noise = best.get("noise_scale", Sampler.noise_scale)
    alike = [axis for axis in AXES if axis not in ("ddim_steps", "noise_scale")]
    family = [row for row in rows if all(row.get(axis) == best.get(axis) for axis in alike)]
    swept = any(row.get("noise_scale", noise) != noise for row in family)
    worse = [row for row in family if row["ddim_steps"] > best["ddim_steps"] and row["difference_high"] < 0]
    # Without noise, all candidates of a plan are the same.
    if not worse or swept or noise == 0 or best.get("candidates", 1) > 1:
        return ""
    least = min(worse, key=lambda row: row["difference"])
    points, low, high = (-100 * least[key] for key in ("difference", "difference_high", "difference_low"))
    return (
        f"{label_of(rows, least)} is {points:.1f} points below {label_of(rows, best)} ({low:.1f} to {high:.1f}),"
        " perhaps because a chunk of more steps repeats more of what demonstrators do at random: a sweep with"
        f" sampler.noise_scale=[0,{noise:g}] tells whether less noise to begin from helps."
    )


def _how_sure(advice: Advice, over_seeds: bool) -> str:
    sure, points = f"{advice.confidence:.0%}".replace("%", " %"), in_points(advice.margin)
    if advice.cell is None:
        return f"Not enough: a recommended cell is, with {sure} confidence, less than {points} below the best."
    chance = "about the chance, over training seeds and episodes," if over_seeds else "the chance, at least,"
    return (
        f"{sure}: that is {chance} that a sweep like this one recommends no cell whose true success is"
        f" {points} or more below the best cell's."
    )


def _episodes(rows: Sequence[Row], *, paired: bool) -> str:
    total = sum(row["episodes"] for row in rows)
    early = sum(stopped_early(rows))
    stopped = f"; {early} of {len(rows)} cells stopped at an earlier look" if early else ""
    each = "for each training seed" if has_recipes(rows) else "in each cell"
    same = f"{'the same' if paired else 'others'} {each}"
    return f"{count_of(rows)} a cell, {same}, {total:,} in all{stopped}."


def _change(rows: Sequence[Row], advice: Advice) -> str:
    """Name the cell that came nearest to being recommended instead, and its difference so far."""
    points = in_points(advice.margin)
    if advice.cell is None:
        nearest = advice.best if advice.undecided is None else advice.undecided
        return (
            f"A cell that is shown to be less than {points} below every other one: the nearest is"
            f" {label_of(rows, rows[nearest])}; so far {_seen(rows, nearest, advice)}."
        )
    cost = costs_of(rows)
    cheaper = [number for number in range(len(rows)) if cost[number] < cost[advice.cell]]
    if not cheaper:
        return "A cheaper cell, which this sweep does not have, or another margin."
    by_success = max(cheaper, key=lambda number: rows[number]["difference"])
    nearest = by_success if advice.undecided is None else advice.undecided
    return (
        f"{label_of(rows, rows[nearest])}, which is cheaper, if it were shown to be less than {points} below the"
        f" best: so far {_seen(rows, nearest, advice)}."
    )


def _seen(rows: Sequence[Row], number: int, advice: Advice) -> str:
    """A cell's difference to the best one; of the best one itself, that to the cell that is hardest for it."""
    if number != advice.best:
        found, to = [rows[number][key] for key in ("difference", "difference_low", "difference_high")], ""
    else:
        other = rows[advice.cells[number].hardest]
        found = [-other[key] for key in ("difference", "difference_high", "difference_low")]
        to = f" to {label_of(rows, other)}"
    difference, low, high = (100 * value for value in found)
    return f"its difference{to} is {difference:+z.1f} points ({low:+z.1f} to {high:+z.1f})"
