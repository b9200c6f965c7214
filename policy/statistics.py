"""Figures with their uncertainty: of one cell, of two cells on the same episodes, and which cell to recommend.

A cell is a checkpoint with its settings. All cells of a sweep run the same episodes, so outcomes are *paired*: column
`n` of every array here is the same episode. Two cells then differ only on their discordant episodes, those that one of
them alone solved, and comparing the cells' own intervals would waste most of what the pairing tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtrc, ndtr, ndtri
from scipy.stats import binom, binomtest, bootstrap

Array = NDArray[Any]
Verdict = Literal["not worse", "worse", "open"]

CHUNK = 250  # resamples held in memory at once


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """A cell against the reference, on the same episodes.

    Attributes:
        difference: mean of the cell minus mean of the reference.
        low: lower end of its interval.
        high: upper end.
        p_value: two-sided, of no difference, for this pair alone.
        adjusted_p_value: the same after Holm over all pairs of cells: holds also where the data chose the reference.
    """

    difference: float
    low: float
    high: float
    p_value: float
    adjusted_p_value: float


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


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a success rate (Wilson 1927).

    Args:
        successes: 0..trials.
        trials: 1 or more.
        confidence: coverage of the interval.

    Returns:
        Lower and upper end, within [0, 1].

    Raises:
        ValueError: counts or a confidence that cannot be.

    Example:
        >>> low, high = wilson_interval(45, 50)
        >>> round(low, 3), round(high, 3)
        (0.786, 0.957)
    """
    _check_fraction("confidence", confidence)
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(
            f"successes must be 0 to trials and trials 1 or more; got {successes} of {trials}: count finished episodes"
        )
    interval = binomtest(int(successes), int(trials)).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, *, bounds: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Bootstrap interval of a mean, seeded; the order of the values does not matter.

    Without `bounds` the percentile bootstrap (Efron 1979): equal values give no width, so where rare failures may have
    been missed it covers too seldom. With `bounds` the interval of Gaffke (2005; Learned-Miller and Thomas 2019, arXiv
    1905.06208): a Bayesian bootstrap with one more observation at the bound, the lower for the lower end. It needs no
    large sample and errs towards too wide, at 95 % by up to 4 / N of the way to the bound. Of values at the bounds
    alone it is Clopper and Pearson's exact interval.

    Args:
        values: (N,), one or more.
        confidence: coverage of the interval.
        bounds: the least and the greatest value there can be, such as (0, 1) for scores.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: no values, NaN, or values out of bounds.

    Example:
        >>> bootstrap_interval([1.0, 1.0, 1.0])
        (1.0, 1.0)
        >>> low, high = bootstrap_interval([1.0] * 50, bounds=(0, 1))
        >>> round(low, 2), high
        (0.93, 1.0)
    """
    low, high = _mean_intervals(_matrix([values], "values", float), confidence, bounds)
    return float(low[0]), float(high[0])


def holm(p_values: ArrayLike, *, most_true: int | None = None) -> Array:
    """Adjusted p-values: those at most alpha hold together with an error probability of alpha (Holm 1979).

    Args:
        p_values: (M,), in [0, 1].
        most_true: how many of the hypotheses can be true at once, if not all (Shaffer 1986).

    Returns:
        (M,), none below `p_values`, in the same order.

    Raises:
        ValueError: no p-values, or some outside [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not p.size or not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p_values must be a list of one or more numbers in [0, 1]; got {p.tolist()}")
    order = np.argsort(p, kind="stable")
    left = np.minimum(np.arange(p.size, 0, -1), p.size if most_true is None else most_true)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(left * p[order]), 1)
    return adjusted


def mcnemar_test(wins: ArrayLike, losses: ArrayLike) -> Array:
    """Exact McNemar test of equal success (McNemar 1947; the conditional binomial test).

    Args:
        wins: (...), episodes that only the first of two cells solved.
        losses: (...), episodes that only the second solved.

    Returns:
        (...) two-sided p-values; 1 without discordant episodes.

    Raises:
        ValueError: negative counts.
    """
    wins, losses = np.asarray(wins), np.asarray(losses)
    if np.any(wins < 0) or np.any(losses < 0):
        raise ValueError("wins and losses must be 0 or more: count the episodes that one cell alone solved")
    # At a chance of 1/2 the two tails are equal: scipy.stats.binomtest for arrays.
    return np.minimum(1, 2 * binom.cdf(np.minimum(wins, losses), wins + losses, 0.5))


def paired_interval(wins: ArrayLike, losses: ArrayLike, episodes: int, confidence: float = 0.95) -> tuple[Array, Array]:
    """Tango's score interval of the difference of two paired success rates (Tango 1998, Stat. Med. 17, 891-908).

    It inverts the score test, as Wilson's does for one rate, and keeps its coverage in small samples and near 0 and 1
    (Fagerland, Lydersen and Laake 2014, Stat. Med. 33, 2850-2875).

    Args:
        wins: (...), episodes that only the first cell solved.
        losses: (...), episodes that only the second solved.
        episodes: all of them.
        confidence: two-sided coverage of the interval; each end alone is a bound at (1 + confidence) / 2.

    Returns:
        Lower and upper ends, (...), within [-1, 1], of the first rate minus the second.

    Raises:
        ValueError: counts or a confidence that cannot be.

    Example:
        >>> low, high = paired_interval(6, 16, 161)  # Cavo et al. 2012
        >>> round(float(low), 4), round(float(high), 4)
        (-0.124, -0.0054)
    """
    _check_fraction("confidence", confidence)
    wins, losses = _counts(wins, losses, episodes)
    z = float(ndtri((1 + confidence) / 2))

    def lower(wins: Array, losses: Array) -> Array:
        def below(difference: Array) -> Array:
            excess, deviation = _score(wins, losses, episodes, difference)
            return excess > z * deviation

        return _bisect(below, np.full(wins.shape, -1.0), np.full(wins.shape, 1.0))

    return lower(wins, losses), -lower(losses, wins)


def non_inferiority_test(wins: ArrayLike, losses: ArrayLike, episodes: int, margin: float) -> Array:
    """Test that a cell's true success rate is lower than another's by `margin` or more.

    The exact unconditional test on Tango's statistic (Hsueh, Liu and Chen 2001, Biometrics 57, 478-483): the greatest
    probability of a statistic at least this large, over the unknown rate of episodes that only the first cell solves,
    taken from a grid; never below the p-value of Tango's own (asymptotic) test, so that it agrees with
    `paired_interval`: p at most alpha implies a lower end, at confidence 1 - 2 alpha, of -margin or more.

    Args:
        wins: (...), episodes that only the first cell solved.
        losses: (...), episodes that only the second solved.
        episodes: N, all of them.
        margin: in (0, 1).

    Returns:
        (...) one-sided p-values; small means not worse than that.

    Raises:
        ValueError: counts or a margin that cannot be.
    """
    _check_fraction("margin", margin)
    excess, deviation = _score(*_counts(wins, losses, episodes), episodes, -margin)
    z = np.asarray(excess / deviation)
    return np.maximum(ndtr(-z), _exact_p_values(z.ravel(), episodes, margin).reshape(z.shape))


def compare_success(success: ArrayLike, reference: int, confidence: float = 0.95) -> tuple[PairedDifference, ...]:
    """Success of every cell against a reference cell: Tango's interval, exact McNemar test, Holm over all pairs.

    Args:
        success: (K, N) bool, K cells on the same N episodes.
        reference: index of the cell to compare with, such as the best.
        confidence: two-sided coverage of each interval by itself.

    Returns:
        One per cell; the reference differs from itself by 0, with p 1.

    Raises:
        ValueError: arrays, a reference or a confidence that cannot be.
    """
    solved = _matrix(success, "success", bool)
    _check_reference(reference, len(solved))
    wins = _wins(solved)
    first, second = np.triu_indices(len(solved), 1)
    p = mcnemar_test(wins[first, second], wins[second, first])
    low, high = paired_interval(wins[:, reference], wins[reference], solved.shape[1], confidence)
    return _differences(solved.mean(1), low, high, p, reference)


def compare_means(
    values: ArrayLike, reference: int, confidence: float = 0.95, *, bounds: tuple[float, float] | None = None
) -> tuple[PairedDifference, ...]:
    """Scores or returns of every cell against a reference cell: paired bootstrap, sign-flip test, Holm over all pairs.

    The interval is `bootstrap_interval` of the per-episode differences, which reach twice as far as the values: with
    `bounds` it allows for rare failures not seen yet and is wide until there are some hundred episodes. The p-value
    flips the sign of each difference at random, 10000 times (Fisher 1935; the paired `scipy.stats.permutation_test`),
    so it is never below 1 / 10001.

    Args:
        values: (K, N), K cells on the same N episodes.
        reference: index of the cell to compare with, such as the best.
        confidence: two-sided coverage of each interval by itself.
        bounds: the least and the greatest value there can be, such as (0, 1) for scores; None for returns.

    Returns:
        One per cell; the reference differs from itself by 0, with p 1.

    Raises:
        ValueError: arrays, a reference, bounds or a confidence that cannot be.
    """
    matrix = _matrix(values, "values", float)
    _check_reference(reference, len(matrix))
    span = None
    if bounds is not None:
        _check_bounds(matrix, bounds)
        span = (bounds[0] - bounds[1], bounds[1] - bounds[0])
    first, second = np.triu_indices(len(matrix), 1)
    p = _sign_flip_test(matrix[first] - matrix[second])
    low, high = _mean_intervals(matrix - matrix[reference], confidence, span)
    return _differences(matrix.mean(1), low, high, p, reference)


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
    _check_fraction("margin", margin)
    _check_fraction("confidence", confidence, above=0.5)
    solved = _matrix(success, "success", bool)
    costs = _costs(cost, len(solved))
    cells, episodes = solved.shape
    rates = solved.mean(1)
    by_cost = sorted(range(cells), key=lambda i: (costs[i], -rates[i]))
    best = max(by_cost, key=lambda i: rates[i])  # the first, hence cheapest, of equal ones

    wins = _wins(solved)
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
        _check_fraction(name, fraction)
    wins, losses = _counts(wins, losses, episodes)
    discordant = (wins + losses + 1) / (episodes + 2)
    _, null = _score(discordant / 2, discordant / 2, 1, -margin)
    z_null, z_power = -ndtri(alpha), max(ndtri(power), 0.0)

    def short(total: Array) -> Array:
        noise = z_null * null * np.sqrt(total) + z_power * np.sqrt(discordant * (total - episodes))
        return wins - losses + total * margin < noise

    # The greater root of margin x^2 = noise x + |wins - losses| in x = sqrt(M) is enough for certain.
    noise = z_null * null + z_power * np.sqrt(discordant)
    enough = ((noise + np.sqrt(noise**2 + 4 * margin * abs(wins - losses))) / (2 * margin)) ** 2
    now = np.full(wins.shape, float(episodes))
    total = _bisect(short, now, np.maximum(enough, episodes))
    return np.where(short(now), np.ceil(total - episodes), 0).astype(int)


def _judge(wins: Array, episodes: int, margin: float, alpha: float) -> tuple[Array, list[Verdict], Array]:
    """`p_value`, `verdict` and `more_episodes` of each of K cells, from their (K, K) `wins` over each other."""
    cells = len(wins)
    if cells == 1:
        return np.zeros(1), ["not worse"], np.zeros(1, dtype=int)
    excess, deviation = _score(wins, wins.T, episodes, -margin)
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


def _score(wins: Array, losses: Array, episodes: int, difference: ArrayLike) -> tuple[Array, Array]:
    """Numerator and denominator of Tango's score statistic, under a rate of wins - rate of losses = `difference`.

    Args:
        wins: (...) float.
        losses: (...) float.
        episodes: N.
        difference: (...), in (-1, 1).

    Returns:
        (...) wins - losses less what is expected, and its standard deviation at the restricted maximum likelihood
        estimate of the rate of losses (Tango 1998).
    """
    difference = np.asarray(difference)
    a = 2 * episodes
    b = (2 * episodes - wins + losses) * difference - wins - losses
    c = -losses * difference * (1 - difference)
    rate = (np.sqrt(np.maximum(b * b - 4 * a * c, 0)) - b) / (2 * a)
    variance = episodes * (2 * rate + difference * (1 - difference))
    return wins - losses - episodes * difference, np.sqrt(np.maximum(variance, 0))


def _exact_p_values(z: Array, episodes: int, margin: float) -> Array:
    """Greatest probability of a score statistic of `z` or more when the true difference is -margin.

    Args:
        z: (K,).
        episodes: N.
        margin: in (0, 1).

    Returns:
        (K,).
    """
    losses = np.arange(episodes + 1)
    # For each number of losses the least number of wins that reaches z; the statistic grows with the wins.
    few, many = np.zeros((len(z), episodes + 1), dtype=int), np.tile(episodes - losses + 1, (len(z), 1))
    for _ in range(episodes.bit_length() + 1):
        middle = (few + many) // 2
        excess, deviation = _score(middle.astype(float), losses.astype(float), episodes, -margin)
        reached = excess >= (z[:, None] - 1e-9) * deviation
        few, many = np.where(reached | (few == many), few, middle + 1), np.where(reached, middle, many)
    # The unknown rate of wins: a grid from 0 to its greatest value, finer at 0.
    win_rate = (1 - margin) / 2 * np.linspace(0, 1, 33) ** 2
    weight = binom.pmf(losses, episodes, (win_rate + margin)[:, None])
    likely, lost = np.nonzero(weight > 1e-10)
    # Given the losses, wins are binomial among the other episodes.
    trials, rate = episodes - lost, np.minimum(win_rate / (1 - margin - win_rate), 1)[likely]
    needed = many[:, lost]
    tail = np.where(needed > trials, 0.0, np.where(needed == 0, 1.0, bdtrc(needed - 1.0, trials, rate)))
    sums = np.zeros((len(z), len(win_rate)))
    np.add.at(sums.T, likely, (weight[likely, lost] * tail).T)
    return np.minimum(sums.max(1), 1)


def _bisect(below: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Where `below`, true up to a point between `low` and `high` and false from there on, turns."""
    for _ in range(60):
        middle = (low + high) / 2
        more = below(middle)
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    return low


def _mean_intervals(values: Array, confidence: float, bounds: tuple[float, float] | None) -> tuple[Array, Array]:
    """`bootstrap_interval` of each row of (K, N), with the same resamples for all."""
    _check_fraction("confidence", confidence)
    values = np.sort(values, axis=1)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    generator = np.random.default_rng(0)
    if bounds is not None:
        _check_bounds(values, bounds)
        lows, highs = [], []
        for _ in range(16):
            weights = generator.standard_exponential((CHUNK, values.shape[1] + 1))
            weights /= weights.sum(1, keepdims=True)
            sums = values @ weights[:, :-1].T
            lows.append(sums + weights[:, -1] * bounds[0])
            highs.append(sums + weights[:, -1] * bounds[1])
        low = np.quantile(np.concatenate(lows, 1), tails[0], axis=1)
        high = np.quantile(np.concatenate(highs, 1), tails[1], axis=1)
        return low.clip(*bounds), high.clip(*bounds)
    low, high = values[:, 0].copy(), values[:, -1].copy()
    uneven = np.asarray(low < high)
    if uneven.any():
        interval = bootstrap(
            (values[uneven],),
            np.mean,
            axis=1,
            n_resamples=2000,
            batch=CHUNK,
            confidence_level=confidence,
            method="percentile",
            rng=generator,
        ).confidence_interval
        low[uneven], high[uneven] = interval.low, interval.high
    return low, high


def _sign_flip_test(differences: Array) -> Array:
    """Two-sided p-values of a mean of 0, one per row of (M, N), when either sign of a difference is as likely."""
    sizes = np.sort(abs(differences), axis=1)
    observed = abs(differences.sum(1)) * (1 - 1e-12)
    generator = np.random.default_rng(0)
    as_far = np.ones(len(differences))  # the data are one of the arrangements
    for _ in range(40):
        signs = generator.choice([-1.0, 1.0], (CHUNK, sizes.shape[1]))
        as_far += (abs(signs @ sizes.T) >= observed).sum(0)
    return as_far / (40 * CHUNK + 1)


def _differences(means: Array, low: Array, high: Array, p: Array, reference: int) -> tuple[PairedDifference, ...]:
    """One row per cell; `p` is of the pairs above the diagonal, row by row."""
    count = len(means)
    raw, adjusted = np.ones((count, count)), np.ones((count, count))
    upper = np.triu_indices(count, 1)
    if p.size:
        raw[upper], adjusted[upper] = p, holm(p)
    raw, adjusted = np.minimum(raw, raw.T), np.minimum(adjusted, adjusted.T)
    low[reference] = high[reference] = 0.0
    return tuple(
        PairedDifference(
            difference=float(means[i] - means[reference]),
            low=float(low[i]),
            high=float(high[i]),
            p_value=float(raw[i, reference]),
            adjusted_p_value=float(adjusted[i, reference]),
        )
        for i in range(count)
    )


def _counts(wins: ArrayLike, losses: ArrayLike, episodes: int) -> tuple[Array, Array]:
    """Check the discordant episodes of pairs of cells; as arrays of one shape."""
    first, second = np.broadcast_arrays(np.asarray(wins, dtype=float), np.asarray(losses, dtype=float))
    if episodes < 1 or not np.all((first >= 0) & (second >= 0) & (first + second <= episodes)):
        raise ValueError(
            f"wins and losses must be 0 or more, together at most the {episodes} episodes, which are 1 or more"
        )
    return first, second


def _wins(solved: Array) -> Array:
    """(K, K) episodes that the row's cell solved and the column's did not, of (K, N) bool."""
    counts = solved.astype(float)
    return counts @ (1 - counts).T


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


def _matrix(values: Any, name: str, kind: type) -> Array:
    """Check and convert an array of cells times episodes."""
    try:
        matrix = np.asarray(values)
        lengths = None
    except ValueError:
        lengths = [np.size(row) for row in values]
    if lengths is not None:
        raise ValueError(
            f"{name} must have the same episodes in every cell; got {lengths} episodes: use those that all cells ran"
        )
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{name} must be cells x episodes, one or more of each; got shape {matrix.shape}")
    if matrix.dtype == object or not np.all(np.isfinite(matrix.astype(float))):
        raise ValueError(f"{name} must be finite numbers; got NaN, infinity or something else: leave such episodes out")
    if kind is bool and not np.all((matrix == 0) | (matrix == 1)):
        raise ValueError(f"{name} must be true or false (1 or 0); got {matrix.min()} to {matrix.max()}")
    return matrix.astype(kind)


def _costs(cost: Any, cells: int) -> list[tuple[float, ...]]:
    costs = [tuple(float(part) for part in np.atleast_1d(entry)) for entry in cost]
    if len(costs) != cells:
        raise ValueError(f"cost must have one entry per cell; got {len(costs)} for {cells} cells")
    if len({len(entry) for entry in costs}) > 1 or not all(math.isfinite(part) for entry in costs for part in entry):
        raise ValueError(f"cost must be finite numbers, or tuples of the same length of them; got {cost}")
    return costs


def _check_reference(reference: int, cells: int) -> None:
    if not 0 <= reference < cells:
        raise ValueError(f"reference must be the index of a cell, 0 to {cells - 1}; got {reference}")


def _check_bounds(values: Array, bounds: tuple[float, float]) -> None:
    if not bounds[0] <= values.min() <= values.max() <= bounds[1]:
        raise ValueError(f"values must lie within the bounds {bounds}; got {values.min():g} to {values.max():g}")


def _check_fraction(name: str, value: float, above: float = 0) -> None:
    if not above < value < 1:
        raise ValueError(f"{name} must be above {above:g} and below 1; got {value}")
