"""The cell to recommend: the cheapest that is not worse than the best, or how many more episodes would decide.

The *best seen* cell is the one with the highest observed success rate. The *truly best* cell, which is not known, is
the one with the highest true success rate.

A cell is "not worse" when `non_inferiority_test` says so against *every* other cell, not only the best seen. The truly
best cell is one of them, whichever it is, so the guarantee holds although the data decide which cell is the best seen
(Hsu 1984, Ann. Stat. 12, 1136-1144: multiple comparisons with the best). A cell's p-value is the greatest of these
tests', adjusted by Holm over the cells; the truly best cell's hypothesis is false, so at most K - 1 hypotheses are
true. Hence the probability that *any* cell called "not worse" is in truth worse than the truly best by the margin or
more, and with it the probability of a wrong recommendation, is at most 1 - confidence for all rates, correlations and
numbers of episodes (to within 1 % of that value, because the exact test maximises over a grid). The best seen cell is
tested like the others: after few episodes it may be the best by luck.

A cell is "worse" when one-sided score tests (Bonferroni over the cells that it is compared with, Holm over the cells)
show that it is worse than some cell by more than the margin. Otherwise it is "open".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from policy.statistics.checks import Array, cells_by_episodes, check_fraction
from policy.statistics.paired import (
    bisect,
    discordant_counts,
    holm,
    non_inferiority_test,
    paired_interval,
    score_statistic,
    unpaired_wins,
    wins_over,
)

Verdict = Literal["not worse", "worse", "open"]


@dataclass(frozen=True, kw_only=True)
class CellVerdict:
    """The verdict on one cell of a `Recommendation`.

    Attributes:
        difference: observed success rate minus that of the best seen cell.
        low: one-sided lower confidence bound of the difference, for this pair alone.
        high: one-sided upper confidence bound of the difference, for this pair alone.
        p_value: for the hypothesis that the cell is worse than the truly best cell by the margin or more, adjusted for
            the number of cells.
        verdict: "not worse" (that hypothesis is rejected), "worse" (the cell is shown to be worse) or "open" (there are
            too few episodes).
        more_episodes: how many more episodes would probably end an open verdict if the cell is as good as the best; 0
            for the other verdicts.
    """

    difference: float
    low: float
    high: float
    p_value: float
    verdict: Verdict
    more_episodes: int


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The cheapest cell that is not worse than the best.

    Attributes:
        cell: index of the recommended cell; None if no cell is shown to be not worse than the best.
        best: index of the cell with the highest observed success rate (of several, the cheapest).
        margin: the difference of success rates from which a cell counts as worse.
        confidence: of all verdicts "not worse" together.
        cells: one verdict per cell.
        more_episodes: how many more episodes would probably lead to a recommendation, or to that of a cheaper cell; 0
            if no cell that would improve the recommendation is open.
        sentence: the recommendation in words.
    """

    cell: int | None
    best: int
    margin: float
    confidence: float
    cells: tuple[CellVerdict, ...]
    more_episodes: int
    sentence: str


def recommend(
    success: ArrayLike,
    cost: Sequence[float] | Sequence[Sequence[float]],
    *,
    margin: float = 0.05,
    confidence: float = 0.95,
    paired: bool = True,
) -> Recommendation:
    """Recommend the cheapest cell whose success rate is not worse than the best cell's by `margin` or more.

    The module's docstring explains the verdicts, and `episodes_needed` explains `more_episodes`. The guarantee is for
    one look at one set of episodes. Adding episodes until a recommendation appears gives more chances of a wrong one;
    for two looks, use `confidence=0.975` for both.

    Args:
        success: (K, N) bool, K cells on the same N episodes.
        cost: (K,) numbers, or tuples in the order of their importance. Of cells with equal costs the more successful
            one is recommended, and of equally successful ones the first.
        margin: a difference of success rates, in (0, 1).
        confidence: one-sided, in (0.5, 1), of all verdicts "not worse" together; each `low` and `high` has it
            separately.
        paired: whether a column is the same episode for all cells; otherwise see `unpaired_wins`.

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
    costs = _costs(cost, len(solved))
    cells, episodes = solved.shape
    rates = solved.mean(1)
    by_cost = sorted(range(cells), key=lambda i: (costs[i], -rates[i]))
    best = max(by_cost, key=lambda i: rates[i])  # of several, the first and hence the cheapest
    wins = wins_over(solved) if paired else unpaired_wins(solved)
    verdicts = _verdicts(wins, rates, best, episodes, margin, 1 - confidence)
    cell = next((i for i in by_cost if verdicts[i].verdict == "not worse"), None)
    cheaper = [i for i in by_cost if cell is None or costs[i] < costs[cell]]
    more = min((verdicts[i].more_episodes for i in cheaper if verdicts[i].more_episodes), default=0)
    return Recommendation(
        cell=cell,
        best=best,
        margin=margin,
        confidence=confidence,
        cells=verdicts,
        more_episodes=more,
        sentence=_sentence(cell, best, by_cost[0], cells, margin, confidence, more),
    )


def episodes_needed(
    wins: ArrayLike, losses: ArrayLike, episodes: int, margin: float, *, alpha: float = 0.05, power: float = 0.8
) -> Array:
    """How many more episodes `non_inferiority_test` needs if the two cells are in truth equal.

    After M episodes the N episodes of today still count. The sum of differences is then wins - losses of today plus a
    sum with mean 0 and variance (M - N) d. The score test rejects at alpha when the total exceeds
    z_alpha sqrt(M v) - M margin. It does so with probability `power` at the least M with

        wins - losses + M margin >= z_alpha sqrt(M v) + z_power sqrt((M - N) d),

    where d = (wins + losses + 1) / (N + 2) is the observed rate of discordant episodes, shrunk slightly away from 0,
    and v is the variance per episode that the score test expects for a difference of -margin. This is the normal
    approximation of Nam (1997, Biometrics 53, 1422-1430), conditional on the episodes observed so far.

    Args:
        wins: (...), episodes that only the first cell solved.
        losses: (...), episodes that only the second cell solved.
        episodes: N, the number of episodes so far.
        margin: a difference of success rates, in (0, 1).
        alpha: level of the test, in (0, 1).
        power: probability that the test rejects, in (0, 1).

    Returns:
        (...) int, M - N; 0 where the test already rejects.

    Raises:
        ValueError: impossible counts, or a margin, alpha or power outside (0, 1).

    Example:
        >>> episodes_needed([2, 6, 6], [2, 6, 10], 50, 0.05).tolist()
        [198, 559, 902]
    """
    for name, fraction in (("margin", margin), ("alpha", alpha), ("power", power)):
        check_fraction(name, fraction)
    wins, losses = discordant_counts(wins, losses, episodes)
    discordant = (wins + losses + 1) / (episodes + 2)
    _, null = score_statistic(discordant / 2, discordant / 2, 1, -margin)
    z_null, z_power = -ndtri(alpha), max(ndtri(power), 0.0)

    def short(total: Array) -> Array:
        noise = z_null * null * np.sqrt(total) + z_power * np.sqrt(discordant * (total - episodes))
        return wins - losses + total * margin < noise

    # An upper bound on M: its square root x is the greater root of margin x^2 = noise x + |wins - losses|.
    noise = z_null * null + z_power * np.sqrt(discordant)
    enough = ((noise + np.sqrt(noise**2 + 4 * margin * abs(wins - losses))) / (2 * margin)) ** 2
    now = np.full(wins.shape, float(episodes))
    total = bisect(short, now, np.maximum(enough, episodes))
    return np.where(short(now), np.ceil(total - episodes), 0).astype(int)


def _verdicts(
    wins: Array, rates: Array, best: int, episodes: int, margin: float, alpha: float
) -> tuple[CellVerdict, ...]:
    """The verdicts on K cells, from their (K, K) `wins` over each other and their (K,) success `rates`."""
    p_values, verdicts, more_episodes = _judge(wins, episodes, margin, alpha)
    low, high = paired_interval(wins[:, best], wins[best], episodes, 1 - 2 * alpha)
    low[best] = high[best] = 0.0
    return tuple(
        CellVerdict(
            difference=float(rates[i] - rates[best]),
            low=float(low[i]),
            high=float(high[i]),
            p_value=float(p_values[i]),
            verdict=verdicts[i],
            more_episodes=int(more_episodes[i]),
        )
        for i in range(len(wins))
    )


def _judge(wins: Array, episodes: int, margin: float, alpha: float) -> tuple[Array, list[Verdict], Array]:
    """Compute `p_value`, `verdict` and `more_episodes` of each of K cells, from their (K, K) `wins` over each other."""
    cells = len(wins)
    if cells == 1:
        return np.zeros(1), ["not worse"], np.zeros(1, dtype=int)
    excess, deviation = score_statistic(wins, wins.T, episodes, -margin)
    z = excess / deviation
    np.fill_diagonal(z, np.inf)
    every, hardest = np.arange(cells), z.argmin(1)  # the least z has the greatest p-value
    p = non_inferiority_test(wins[every, hardest], wins[hardest, every], episodes, margin)
    p_not_worse = holm(p, most_true=cells - 1)
    p_worse = holm(np.minimum(1, (cells - 1) * ndtr(z.min(1))))
    verdicts: list[Verdict] = [
        "not worse" if good <= alpha else "worse" if bad <= alpha else "open"
        for good, bad in zip(p_not_worse, p_worse, strict=True)
    ]
    # Holm's level for the next cell to be called "not worse".
    level = alpha / np.clip(verdicts.count("open") + verdicts.count("worse"), 1, cells - 1)
    pairs = episodes_needed(wins, wins.T, episodes, margin, alpha=level)
    np.fill_diagonal(pairs, 0)
    # One or more: `episodes_needed` uses the score test, which may reject where the exact test does not yet.
    needed = np.where([verdict == "open" for verdict in verdicts], np.maximum(pairs.max(1), 1), 0)
    return p_not_worse, verdicts, needed


def _sentence(
    cell: int | None, best: int, cheapest: int, cells: int, margin: float, confidence: float, more: int
) -> str:
    digits = max(len(str(more)) - 2, 0)  # rounded up to two digits: the number is an estimate
    wait = f"not enough episodes: about {math.ceil(more / 10**digits) * 10**digits} more would decide"
    if cells == 1:
        return "there is one cell only, and nothing to compare it with"
    if cell is None:
        return wait + (" (the cheapest cell is the best so far)" if best == cheapest else "")
    if cell == best == cheapest:
        return "the cheapest cell is also the best"
    sure = f"the cheapest cell that is not worse than the best by {100 * margin:g} points ({100 * confidence:g} % sure)"
    return f"{sure}; of cheaper ones, {wait}" if more else sure


def _costs(cost: Any, cells: int) -> list[tuple[float, ...]]:
    costs = [tuple(float(part) for part in np.atleast_1d(entry)) for entry in cost]
    if len(costs) != cells:
        raise ValueError(f"cost must have one entry per cell; got {len(costs)} for {cells} cells")
    if len({len(entry) for entry in costs}) > 1 or not all(math.isfinite(part) for entry in costs for part in entry):
        raise ValueError(f"cost must be finite numbers, or tuples of the same length with finite numbers; got {cost}")
    return costs
