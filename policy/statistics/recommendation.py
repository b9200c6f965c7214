"""The cell to recommend: the cheapest that is not worse than the best.

The *best seen* cell is the one with the highest observed success rate. The *truly best* cell, which is not known, is
the one with the highest true success rate.

A cell is "not worse" when `non_inferiority_test` says so against *every* other cell, not only the best seen. The truly
best cell is one of them, whichever it is, so the guarantee holds although the data decide which cell is the best seen
(Hsu 1984, Ann. Stat. 12, 1136-1144: multiple comparisons with the best). The tests of all cells against the same one
are adjusted together by Holm; the error counts only for those against the truly best. Hence the probability that *any*
cell called "not worse" is in truth worse than the truly best by the margin or more, and with it the probability of a
wrong recommendation, is at most alpha for all rates, correlations and numbers of episodes (to within 1 % of that value,
because the exact test maximises over a grid). The best seen cell is tested like the others: after few episodes it may
be the best by luck.

The tests of cells that are cheaper than the one they are compared with have more weight in Holm's steps, because to
recommend a cheaper cell is what a sweep is for. The weights depend on the costs alone.

A cell is "worse" when one-sided score tests (Bonferroni over the cells that it is compared with, Holm over the cells)
show that it is worse than some cell by more than the margin. Otherwise it is "open".

`recommend` is for one look at one set of episodes. `sequential.follow` looks several times and stops early.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from policy.statistics.checks import Array, cells_by_episodes, check_fraction
from policy.statistics.counts import unpaired_wins, wins_over
from policy.statistics.paired import holm, inferiority_test, non_inferiority_test, null_deviation

Verdict = Literal["not worse", "worse", "open"]

ONE_CELL = "there is one cell only, and nothing to compare it with"

# The weight of a test of a cell against one that is cheaper or costs the same; the others have 1.
LIGHT = 0.1


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What is known about each pair of K cells; row i and column j are cell i compared with cell j.

    Attributes:
        wins: (..., K, K), episodes that only cell i solved.
        episodes: (..., K, K), episodes that both cells ran when they were last compared.
        not_worse: (..., K, K) p-values of "cell i is worse than cell j by the margin or more"; 0 on the diagonal, so
            that a cell is never worse than itself.
        worse: (..., K, K) p-values of "cell i is not worse than cell j by more than the margin"; 1 on the diagonal.
    """

    wins: Array
    episodes: Array
    not_worse: Array
    worse: Array

    @property
    def discordant(self) -> Array:
        """(..., K, K), the rate of episodes that exactly one of both solved, shrunk slightly away from 0."""
        return (self.wins + np.swapaxes(self.wins, -1, -2) + 1) / (self.episodes + 2)

    @property
    def differences(self) -> Array:
        """(..., K, K), the observed success rate of cell i minus that of cell j on the episodes that both ran."""
        return (self.wins - np.swapaxes(self.wins, -1, -2)) / self.episodes


@dataclass(frozen=True, kw_only=True)
class CellVerdict:
    """The verdict on one cell of a `Recommendation`.

    Attributes:
        verdict: "not worse" (it is shown that the cell is not worse than the truly best cell by the margin or more),
            "worse" (the cell is shown to be worse) or "open" (neither is shown).
        hardest: index of the cell against which it is hardest to show that this one is not worse.
        loss: observed success rate of that cell minus that of this one, on the episodes that both ran.
        allowed_loss: see `greatest_loss`.
    """

    verdict: Verdict
    hardest: int
    loss: float
    allowed_loss: float


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The cheapest cell that is not worse than the best.

    Attributes:
        cell: index of the recommended cell; None if no cell is shown to be not worse than the best.
        best: index of the cell with the highest observed success rate (of several, the cheapest).
        cheapest: index of the cell with the lowest cost (of several, the more successful).
        undecided: index of the cell that would have improved the recommendation and came nearest to it; None if no cell
            that is open is cheaper than the recommended one.
        margin: the difference of success rates from which a cell counts as worse.
        confidence: of all verdicts "not worse" together.
        episodes: the number of episodes that each cell ran, or could have run.
        cells: one verdict per cell.
    """

    cell: int | None
    best: int
    cheapest: int
    undecided: int | None
    margin: float
    confidence: float
    episodes: int
    cells: tuple[CellVerdict, ...]


def recommend(
    success: ArrayLike,
    cost: Sequence[float],
    *,
    margin: float = 0.05,
    confidence: float = 0.95,
    paired: bool = True,
) -> Recommendation:
    """Recommend the cheapest cell whose success rate is not worse than the best cell's by `margin` or more.

    The module's docstring explains the verdicts. The guarantee is for one look at one set of episodes. Looking again
    after more episodes gives more chances of a wrong recommendation: `sequential.follow` is for that.

    Args:
        success: (K, N) bool, K cells on the same N episodes.
        cost: (K,) finite numbers. Of cells with equal costs the more successful one is recommended, and of equally
            successful ones the first.
        margin: a difference of success rates, in (0, 1).
        confidence: one-sided, in (0.5, 1), of all verdicts "not worse" together.
        paired: whether a column is the same episode for all cells; otherwise see `counts.unpaired_wins`.

    Returns:
        The recommended cell and the verdicts.

    Raises:
        ValueError: a malformed array, malformed costs, a margin outside (0, 1) or a confidence outside (0.5, 1).

    Example:
        >>> few, many = [True] * 180 + [False] * 20, [True] * 181 + [False] * 19
        >>> answer = recommend([few, many], cost=[8, 50])
        >>> answer.cell, answer.best, answer.cells[0].verdict
        (0, 1, 'not worse')
    """
    check_fraction("margin", margin)
    check_fraction("confidence", confidence, above=0.5)
    solved = cells_by_episodes(success, "success", bool)
    wins = wins_over(solved) if paired else unpaired_wins(solved)
    alpha, episodes, costs = 1 - confidence, solved.shape[1], ranks(cost, len(solved))
    pairs = compare_pairs(wins, episodes, margin)
    levels = levels_in_force(adjust(pairs.not_worse, costs), costs, alpha)
    return advise(pairs, levels, costs, margin=margin, alpha=alpha, confidence=confidence, episodes=episodes)


def compare_pairs(wins: Array, episodes: int, margin: float) -> Pairs:
    """Test every pair of cells on the same episodes, at one look.

    Args:
        wins: (..., K, K), episodes that only the row's cell solved.
        episodes: the number of episodes.
        margin: in (0, 1).
    """
    # Many pairs share their counts, most of all in a simulation: each pair of counts is tested once.
    losses = np.swapaxes(wins, -1, -2)
    codes = np.rint(wins * (episodes + 1) + losses).astype(np.int64)
    seen, index = np.unique(codes, return_inverse=True)
    won, lost = np.divmod(seen, episodes + 1)
    own = np.eye(wins.shape[-1], dtype=bool)
    return Pairs(
        wins=wins,
        episodes=np.full(wins.shape, episodes),
        not_worse=np.where(own, 0.0, non_inferiority_test(won, lost, episodes, margin)[index]),
        worse=np.where(own, 1.0, inferiority_test(won, lost, episodes, margin)[index]),
    )


def weights(costs: Array) -> Array:
    """(K, K) weights of the tests of the row's cell against the column's, from the (K,) `ranks` of their costs."""
    return np.where(costs[:, None] < costs, 1.0, LIGHT)


def adjust(not_worse: Array, costs: Array) -> Array:
    """Adjust the (..., K, K) p-values `Pairs.not_worse`: those in a column, against the same cell, together."""
    columns = np.swapaxes(not_worse, -1, -2)
    return np.swapaxes(holm(columns, weights(costs).T), -1, -2)


def levels_in_force(adjusted: Array, costs: Array, alpha: float) -> Array:
    """The levels that Holm's next step compares p-values with, (..., K, K), from the adjusted ones."""
    weight = weights(costs)
    left = np.where(adjusted > alpha, weight, 0).sum(-2, keepdims=True)
    return alpha * weight / np.maximum(left, weight)


def shown_worse(pairs: Pairs, alpha: float) -> Array:
    """(..., K) bool, the cells that are shown to be worse than some cell by more than the margin."""
    cells = pairs.worse.shape[-1]
    return holm(np.minimum(1, max(cells - 1, 1) * pairs.worse.min(-1))) <= alpha


def advise(
    pairs: Pairs, levels: Array, costs: Array, *, margin: float, alpha: float, confidence: float, episodes: int
) -> Recommendation:
    """Turn the tests of all pairs into a recommendation.

    Args:
        pairs: (K, K) each.
        levels: (K, K), with which the p-values of the last look are compared.
        costs: see `ranks`.
        margin: in (0, 1).
        alpha: level of all verdicts "not worse" together.
        confidence: see `Recommendation`.
        episodes: see `Recommendation`.
    """
    own = np.eye(len(costs), dtype=bool)
    # Where all cells ran the same episodes, this is the order of their success rates.
    strength = np.where(own, np.inf, pairs.differences).min(1)
    by_cost = sorted(range(len(costs)), key=lambda i: (costs[i], -strength[i]))
    best = max(by_cost, key=lambda i: strength[i])  # of several, the first and hence the cheapest
    p_values, worse = adjust(pairs.not_worse, costs).max(1), shown_worse(pairs, alpha)
    short = np.where(own, -np.inf, -pairs.differences - allowed_loss(pairs, margin, levels, episodes))
    hardest = short.argmax(1)
    share = (pairs.wins + pairs.wins.T) / pairs.episodes
    verdicts = tuple(
        CellVerdict(
            verdict="not worse" if p_values[i] <= alpha else "worse" if worse[i] else "open",
            hardest=int(j),
            loss=float(-pairs.differences[i, j]),
            allowed_loss=greatest_loss(float(share[i, j]), margin, float(levels[i, j]), episodes),
        )
        for i, j in enumerate(hardest)
    )
    cell = next((i for i in by_cost if verdicts[i].verdict == "not worse"), None)
    open_cells = [i for i in by_cost if verdicts[i].verdict == "open" and (cell is None or costs[i] < costs[cell])]
    return Recommendation(
        cell=cell,
        best=best,
        cheapest=by_cost[0],
        undecided=min(open_cells, key=lambda i: short[i].max(), default=None),
        margin=margin,
        confidence=confidence,
        episodes=episodes,
        cells=verdicts,
    )


def in_points(margin: float) -> str:
    """A difference of success rates in words.

    >>> in_points(0.05)
    '5 points'
    """
    return f"{100 * margin:g} points"


def not_worse(margin: float, confidence: float) -> str:
    """What is shown of a recommended cell, in words."""
    return f"not worse than the best by {in_points(margin)} ({100 * confidence:g} % sure)"


def describe(advice: Recommendation, names: Sequence[str]) -> str:
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
    if advice.cell is None:
        text = f"no cell is shown to be {shown}"
    elif advice.cell == advice.best == advice.cheapest:
        text = f"the cheapest cell is also the best, and {shown}"
    else:
        text = f"the cheapest cell that is shown to be {shown}"
    if advice.undecided is None:
        return text
    cell = advice.cells[advice.undecided]
    compared = f"{text}; {names[advice.undecided]} is {_points(cell.loss)} {names[cell.hardest]}"
    if cell.allowed_loss <= -1:
        return f"{compared}, and no lead would have been enough (episodes a cell: {advice.episodes:,})"
    limit = f"{'at most' if cell.allowed_loss >= 0 else 'at least'} about {_points(cell.allowed_loss)}"
    return f"{compared}, and would have to be {limit} it (with {advice.episodes:,} episodes a cell)"


def allowed_loss(pairs: Pairs, margin: float, level: ArrayLike, episodes: int) -> Array:
    """(..., K, K) about the greatest loss of success rate that `non_inferiority_test` still rejects at `level`.

    This is the normal approximation of Nam (1997, Biometrics 53, 1422-1430), for the rate of discordant episodes that
    was observed so far and this number of episodes. It ranks cells and looks ahead; `greatest_loss` is exact.
    """
    deviation = null_deviation(pairs.discordant, margin)
    return margin + ndtri(np.asarray(level)) * deviation / math.sqrt(episodes)


def greatest_loss(discordant: float, margin: float, level: float, episodes: int) -> float:
    """The greatest loss of success rate that `non_inferiority_test` rejects at a level, of a whole number of episodes.

    Args:
        discordant: the share of episodes that exactly one of both cells solves; a greater loss or lead needs more.
        margin: in (0, 1).
        level: of the test.
        episodes: the number of all episodes.

    Returns:
        The loss, in [-1, 1]; less than -1 if none is rejected.
    """
    losses = np.arange(math.ceil(margin * episodes), -episodes - 1, -1)
    different = np.maximum(round(discordant * episodes), np.abs(losses))
    different += (different - losses) % 2
    losses, different = losses[different <= episodes], different[different <= episodes]
    p_values = non_inferiority_test((different - losses) // 2, (different + losses) // 2, episodes, margin)
    rejected = np.flatnonzero(p_values <= level)
    return float(losses[rejected[0]] if len(rejected) else -episodes - 1) / episodes


def ranks(cost: Sequence[float], cells: int) -> Array:
    """Check the costs of K cells and number them: (K,) int, from 0 for the lowest cost, the same for equal ones.

    Raises:
        ValueError: another number of costs, or costs that are not finite numbers.
    """
    costs = np.asarray(cost, dtype=float)
    if costs.shape != (cells,) or not np.all(np.isfinite(costs)):
        raise ValueError(f"cost must be one finite number per cell; got {cost} for {cells} cells")
    return np.unique(costs, return_inverse=True)[1]


def _points(loss: float) -> str:
    return f"{abs(100 * loss):.1f} points {'below' if loss >= 0 else 'above'}"
