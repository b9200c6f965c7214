"""Which cell to recommend: the cheapest that is not worse than the best, or how many episodes would tell."""

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
    wins_over,
)

Verdict = Literal["not worse", "worse", "open"]


@dataclass(frozen=True, kw_only=True)
class CellVerdict:
    """What the episodes say of one cell of a `Recommendation`.

    Attributes:
        difference: success rate minus that of the best seen.
        low: one-sided lower confidence bound of it, of this pair alone.
        high: one-sided upper confidence bound.
        p_value: of "truly worse than the truly best by the margin or more", corrected for the number of cells.
        verdict: "not worse" (p_value is small), "worse" (the opposite is shown) or "open" (too few episodes).
        more_episodes: how many more would probably end an open verdict if the cell is as good as the best; else 0.
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
        cell: its index; None if no cell is shown to be so.
        best: index of the highest success rate seen (of equal ones the cheapest).
        margin: what counts as worse, a difference of rates.
        confidence: of the verdicts.
        cells: one verdict per cell.
        more_episodes: how many more episodes would probably improve the answer: give one, or a cheaper one. 0 if none.
        sentence: all that for people.
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
) -> Recommendation:
    """The cheapest cell whose success is not worse than the best cell's by `margin` or more.

    A cell is "not worse" when `non_inferiority_test` says so against *every* other cell, not only the best seen. The
    truly best is among them whichever it is, so it makes no difference that the data chose the best seen (Hsu 1984,
    Ann. Stat. 12, 1136-1144: multiple comparisons with the best). Each cell's p-value is the greatest of these, then
    goes through Holm over the cells; the truly best is never in the wrong, so at most K - 1 hypotheses are true. Hence
    the probability that *any* cell called "not worse" is truly worse than the truly best by the margin or more, and
    with it that of a wrong recommendation, is at most 1 - confidence for any rates, correlation and number of episodes
    (to a hundredth of it: the exact test takes its maximum over a grid). The best seen is tested like the others: after
    few episodes it may be the best by luck.

    That is for one look at one set of episodes. Adding episodes until a recommendation appears gives it more chances
    to be wrong; for two looks, ask for `confidence=0.975` at both.

    A cell is "worse" when it is shown (one-sided score tests, Bonferroni over the cells it is compared with and Holm
    over the cells) to be worse than some cell by more than the margin, otherwise "open". See `episodes_needed` for
    `more_episodes`.

    Args:
        success: (K, N) bool, K cells on the same N episodes.
        cost: (K,) numbers or tuples, compared like tuples: `ddim_steps`, then latency. Of equally cheap cells the more
            successful one is recommended.
        margin: a difference of success rates, in (0, 1).
        confidence: one-sided, of all verdicts "not worse" together; `low` and `high` have it each alone.

    Returns:
        The recommended cell and the verdicts.

    Raises:
        ValueError: arrays, costs, a margin or a confidence that cannot be.

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
    best = max(by_cost, key=lambda i: rates[i])  # the first, hence cheapest, of equal ones

    wins = wins_over(solved)
    alpha = 1 - confidence
    p_values, verdicts, needed = _judge(wins, episodes, margin, alpha)
    cell = next((i for i in by_cost if verdicts[i] == "not worse"), None)
    cheaper = [i for i in by_cost if (cell is None or costs[i] < costs[cell]) and needed[i]]
    more = min((int(needed[i]) for i in cheaper), default=0)
    low, high = paired_interval(wins[:, best], wins[best], episodes, 1 - 2 * alpha)
    low[best] = high[best] = 0.0
    return Recommendation(
        cell=cell,
        best=best,
        margin=margin,
        confidence=confidence,
        cells=tuple(
            CellVerdict(
                difference=float(rates[i] - rates[best]),
                low=float(low[i]),
                high=float(high[i]),
                p_value=float(p_values[i]),
                verdict=verdicts[i],
                more_episodes=int(needed[i]),
            )
            for i in range(cells)
        ),
        more_episodes=more,
        sentence=_sentence(cell, best, by_cost[0], cells, margin, confidence, more),
    )


def episodes_needed(
    wins: ArrayLike, losses: ArrayLike, episodes: int, margin: float, *, alpha: float = 0.05, power: float = 0.8
) -> Array:
    """How many more episodes `non_inferiority_test` needs, should the two cells truly be equal.

    After M episodes the N of today still count. The sum of differences is then wins - losses today plus one of mean 0
    and variance (M - N) d; the score test rejects at alpha when it exceeds z_alpha sqrt(M v) - M margin. It does so
    with probability `power` at the least M with

        wins - losses + M margin >= z_alpha sqrt(M v) + z_power sqrt((M - N) d),

    where d = (wins + losses + 1) / (N + 2) is the observed rate of discordant episodes, drawn a little away from 0, and
    v the variance that the score test expects on the margin. The normal approximation of Nam (1997, Biometrics 53,
    1422-1430), conditional on what was seen.

    Args:
        wins: (...), episodes that only the first cell solved.
        losses: (...), episodes that only the second solved.
        episodes: N so far.
        margin: in (0, 1).
        alpha: level of the test.
        power: probability of success.

    Returns:
        (...) int, M - N; 0 where the test already rejects.

    Raises:
        ValueError: counts that cannot be, or a margin, alpha or power outside (0, 1).

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

    # The greater root of margin x^2 = noise x + |wins - losses| in x = sqrt(M) is enough for certain.
    noise = z_null * null + z_power * np.sqrt(discordant)
    enough = ((noise + np.sqrt(noise**2 + 4 * margin * abs(wins - losses))) / (2 * margin)) ** 2
    now = np.full(wins.shape, float(episodes))
    total = bisect(short, now, np.maximum(enough, episodes))
    return np.where(short(now), np.ceil(total - episodes), 0).astype(int)


def _judge(wins: Array, episodes: int, margin: float, alpha: float) -> tuple[Array, list[Verdict], Array]:
    """`p_value`, `verdict` and `more_episodes` of each of K cells, from their (K, K) `wins` over each other."""
    cells = len(wins)
    if cells == 1:
        return np.zeros(1), ["not worse"], np.zeros(1, dtype=int)
    excess, deviation = score_statistic(wins, wins.T, episodes, -margin)
    z = excess / deviation
    np.fill_diagonal(z, np.inf)
    every, hardest = np.arange(cells), z.argmin(1)  # the p-value falls with z: the least z has the greatest
    p = non_inferiority_test(wins[every, hardest], wins[hardest, every], episodes, margin)
    p_not_worse = holm(p, most_true=cells - 1)
    p_worse = holm(np.minimum(1, (cells - 1) * ndtr(z.min(1))))
    verdicts: list[Verdict] = [
        "not worse" if good <= alpha else "worse" if bad <= alpha else "open"
        for good, bad in zip(p_not_worse, p_worse, strict=True)
    ]
    # Holm's level for the next cell to pass.
    level = alpha / np.clip(verdicts.count("open") + verdicts.count("worse"), 1, cells - 1)
    pairs = episodes_needed(wins, wins.T, episodes, margin, alpha=level)
    np.fill_diagonal(pairs, 0)
    # At least one, where the exact test is just short of the score test that `episodes_needed` thinks of.
    needed = np.where([verdict == "open" for verdict in verdicts], np.maximum(pairs.max(1), 1), 0)
    return p_not_worse, verdicts, needed


def _sentence(
    cell: int | None, best: int, cheapest: int, cells: int, margin: float, confidence: float, more: int
) -> str:
    digits = max(len(str(more)) - 2, 0)  # two are enough for an estimate
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
        raise ValueError(f"cost must be finite numbers, or tuples of the same length of them; got {cost}")
    return costs
