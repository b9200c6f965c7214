"""The cell to recommend where each cell is a recipe used in one way: verdicts over training seeds and episodes.

The reasoning is that of `policy.statistics.recommendation`: a cell is "not worse" when the test says so against every
other cell, and the tests of all cells against the same one are adjusted together by Holm. The tests are those of
`policy.statistics.recipes`, whose level is shown by simulation and is not exact; two cells of a single checkpoint each
are compared as in `policy.statistics.paired`, so that nothing depends on what else is in the sweep. Few training seeds
leave much undecided, and more episodes may not change that: an undecided answer says which of the two would help most,
and promises no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from policy.statistics.checks import Array, cells_by_episodes, check_fraction, check_reference
from policy.statistics.paired import PairedDifference, holm, mcnemar_test, non_inferiority_test, paired_interval
from policy.statistics.recipes import (
    Estimate,
    difference_estimate,
    difference_interval,
    equality_test,
    not_worse_test,
    worse_test,
)
from policy.statistics.recommendation import ONE_CELL, Verdict, adjust, not_worse, ranks


@dataclass(frozen=True, kw_only=True)
class RecipeVerdict:
    """The verdict on one cell of a `RecipeRecommendation`.

    Attributes:
        verdict: see `CellVerdict`.
        hardest: index of the cell against which it is hardest to show that this one is not worse.
        difference: observed success rate minus that of the `hardest` cell.
        half_width: half the width of the 95 % interval of this difference.
        seeds_share: the share of its variance that training seeds give.
    """

    verdict: Verdict
    hardest: int
    difference: float
    half_width: float
    seeds_share: float

    @property
    def least(self) -> float:
        """The lower end of the interval of the difference."""
        return self.difference - self.half_width


@dataclass(frozen=True, kw_only=True)
class RecipeRecommendation:
    """The cheapest cell that is not worse than the best, where cells are recipes.

    Attributes:
        cell: index of the recommended cell; None if no cell is shown to be not worse than the best.
        best: index of the cell with the highest observed success rate (of several, the cheapest).
        undecided: index of the cell that came nearest to being shown, of those whose verdict is "open" and that are
            cheaper than `cell`; None if there is none.
        margin: the difference of success rates from which a cell counts as worse.
        confidence: of all verdicts "not worse" together.
        cells: one verdict per cell.
    """

    cell: int | None
    best: int
    undecided: int | None
    margin: float
    confidence: float
    cells: tuple[RecipeVerdict, ...]


def compare_recipes(
    success: Sequence[ArrayLike], recipe: Sequence[int], reference: int, confidence: float = 0.95
) -> tuple[PairedDifference, ...]:
    """Compare the success rate of every cell with that of a reference cell.

    Args:
        success: (S, N) bool for each of K cells, the checkpoints of its recipe on the same N episodes.
        recipe: (K,), equal numbers for cells with the same checkpoints in the same order.
        reference: index of the cell to compare with, such as the best.
        confidence: two-sided coverage of each interval separately, in (0, 1).

    Returns:
        One comparison per cell; for the reference itself the difference is 0 and the p-value 1.

    Raises:
        ValueError: malformed arrays, a reference that does not exist, or a confidence outside (0, 1).
    """
    solved = [cells_by_episodes(cell, "success", bool) for cell in success]
    count = len(solved)
    check_reference(reference, count)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    p = [_equality(solved, i, j, _difference(solved, recipe, i, j)) for i, j in pairs]
    adjusted = dict(zip(pairs, holm(p) if p else [], strict=True))
    raw = dict(zip(pairs, p, strict=True))
    compared = []
    for i in range(count):
        pair = (min(i, reference), max(i, reference))
        estimate = _difference(solved, recipe, i, reference)
        low, high = (0.0, 0.0) if i == reference else _interval(solved, i, reference, estimate, confidence)
        compared.append(
            PairedDifference(
                difference=estimate.value,
                low=low,
                high=high,
                p_value=float(raw.get(pair, 1)),
                adjusted_p_value=float(adjusted.get(pair, 1)),
            )
        )
    return tuple(compared)


def recommend_recipes(
    success: Sequence[ArrayLike],
    recipe: Sequence[int],
    cost: Sequence[float],
    *,
    margin: float = 0.05,
    confidence: float = 0.95,
) -> RecipeRecommendation:
    """Recommend the cheapest cell whose success rate is not worse than the best cell's by `margin` or more.

    Args:
        success: (S, N) bool for each of K cells, the checkpoints of its recipe on the same N episodes.
        recipe: (K,), equal numbers for cells with the same checkpoints in the same order.
        cost: (K,) finite numbers. Of cells with equal costs the more successful one is recommended.
        margin: a difference of success rates, in (0, 1).
        confidence: one-sided, in (0.5, 1), of all verdicts "not worse" together.

    Returns:
        The recommended cell and the verdicts.

    Raises:
        ValueError: malformed arrays or costs, a margin outside (0, 1) or a confidence outside (0.5, 1).
    """
    check_fraction("margin", margin)
    check_fraction("confidence", confidence, above=0.5)
    solved = [cells_by_episodes(cell, "success", bool) for cell in success]
    every, costs = range(len(solved)), ranks(cost, len(solved))
    rates = [float(cell.mean()) for cell in solved]
    by_cost = sorted(every, key=lambda i: (costs[i], -rates[i]))
    best = max(by_cost, key=lambda i: rates[i])  # of several, the first and hence the cheapest
    verdicts = _verdicts(solved, recipe, costs, margin, 1 - confidence)
    cell = next((i for i in by_cost if verdicts[i].verdict == "not worse"), None)
    cheaper = [i for i in by_cost if cell is None or costs[i] < costs[cell]]
    return RecipeRecommendation(
        cell=cell,
        best=best,
        undecided=max(
            (i for i in cheaper if verdicts[i].verdict == "open"), key=lambda i: verdicts[i].least, default=None
        ),
        margin=margin,
        confidence=confidence,
        cells=verdicts,
    )


def describe_recipes(advice: RecipeRecommendation, names: Sequence[str]) -> str:
    """Say in words what is recommended and what could not be decided.

    Args:
        advice: the recommendation.
        names: of the cells.

    Returns:
        The words, without a full stop.
    """
    if len(advice.cells) == 1:
        return ONE_CELL
    shown = not_worse(advice.margin, advice.confidence)
    found = "no cell" if advice.cell is None else "the cheapest cell that"
    text = f"{found} is shown to be {shown}, over training seeds and episodes"
    if advice.undecided is None:
        return text
    open_cell = advice.cells[advice.undecided]
    helps = "training seeds" if open_cell.seeds_share > 0.5 else "episodes"
    return (
        f"{text}; {names[advice.undecided]} is undecided: {100 * open_cell.difference:+z.1f} points from"
        f" {names[open_cell.hardest]}, give or take {100 * open_cell.half_width:.1f}; more {helps} would narrow it most"
    )


def _difference(solved: Sequence[Array], recipe: Sequence[int], i: int, j: int) -> Estimate:
    return difference_estimate(solved[i], solved[j], same_seeds=recipe[i] == recipe[j])


def _counts(solved: Sequence[Array], i: int, j: int) -> tuple[int, int] | None:
    """Episodes that only one of two cells solved, the first and the second; None if either has several seeds.

    Two single checkpoints are compared as in a sweep without recipes: nothing then depends on what else is in it.
    """
    if len(solved[i]) > 1 or len(solved[j]) > 1:
        return None
    return int((solved[i] & ~solved[j]).sum()), int((solved[j] & ~solved[i]).sum())


def _equality(solved: Sequence[Array], i: int, j: int, estimate: Estimate) -> float:
    counts = _counts(solved, i, j)
    return float(mcnemar_test(*counts)) if counts else equality_test(estimate)


def _interval(
    solved: Sequence[Array], i: int, j: int, estimate: Estimate, confidence: float = 0.95
) -> tuple[float, float]:
    episodes, counts = solved[i].shape[1], _counts(solved, i, j)
    if counts is None:
        return difference_interval(estimate, episodes, confidence)
    low, high = paired_interval(*counts, episodes, confidence)
    return float(low), float(high)


def _not_worse(solved: Sequence[Array], i: int, j: int, estimate: Estimate, margin: float) -> float:
    episodes, counts = solved[i].shape[1], _counts(solved, i, j)
    if counts is None:
        return not_worse_test(estimate, episodes, margin)
    return float(non_inferiority_test(*counts, episodes, margin))


def _verdicts(
    solved: Sequence[Array], recipe: Sequence[int], costs: Array, margin: float, alpha: float
) -> tuple[RecipeVerdict, ...]:
    """The verdicts on K cells, from their outcomes and the `ranks` of their costs."""
    cells, episodes = len(costs), solved[0].shape[1]
    if cells == 1:
        return (RecipeVerdict(verdict="not worse", hardest=0, difference=0, half_width=0, seeds_share=0),)
    pairs = [(i, j) for i in range(cells) for j in range(cells) if i != j]
    estimates = {(i, j): _difference(solved, recipe, i, j) for i, j in pairs}
    tests = {(i, j): _not_worse(solved, i, j, estimates[i, j], margin) for i, j in pairs}
    others = [[j for j in range(cells) if j != i] for i in range(cells)]
    hardest = [max(others[i], key=lambda j: tests[i, j]) for i in range(cells)]
    least = [min(worse_test(estimates[i, j], episodes, margin) for j in others[i]) for i in range(cells)]
    p_not_worse = np.array([[tests[i, j] if i != j else 0.0 for j in range(cells)] for i in range(cells)])
    good = adjust(p_not_worse, costs).max(1)
    bad = holm([min(1.0, (cells - 1) * p) for p in least])
    verdicts = []
    for i in range(cells):
        estimate = estimates[i, hardest[i]]
        low, high = _interval(solved, i, hardest[i], estimate)
        verdicts.append(
            RecipeVerdict(
                verdict="not worse" if good[i] <= alpha else "worse" if bad[i] <= alpha else "open",
                hardest=hardest[i],
                difference=estimate.value,
                half_width=(high - low) / 2,
                seeds_share=estimate.seeds_share,
            )
        )
    return tuple(verdicts)
