"""Two cells on the same episodes: tests and intervals of their difference.

All cells of a sweep run the same episodes, so outcomes are *paired*: column `n` of every array here is the same
episode. Two cells then differ only on their discordant episodes, those that one of them alone solved, and comparing the
cells' own intervals would waste most of what the pairing tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtrc, ndtr, ndtri
from scipy.stats import binom

from policy.statistics.checks import Array, cells_by_episodes, check_bounds, check_fraction
from policy.statistics.intervals import CHUNK, mean_intervals


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
    check_fraction("confidence", confidence)
    wins, losses = discordant_counts(wins, losses, episodes)
    z = float(ndtri((1 + confidence) / 2))

    def lower(wins: Array, losses: Array) -> Array:
        def below(difference: Array) -> Array:
            excess, deviation = score_statistic(wins, losses, episodes, difference)
            return excess > z * deviation

        return bisect(below, np.full(wins.shape, -1.0), np.full(wins.shape, 1.0))

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
    check_fraction("margin", margin)
    excess, deviation = score_statistic(*discordant_counts(wins, losses, episodes), episodes, -margin)
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
    solved = cells_by_episodes(success, "success", bool)
    _check_reference(reference, len(solved))
    wins = wins_over(solved)
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
    matrix = cells_by_episodes(values, "values", float)
    _check_reference(reference, len(matrix))
    span = None
    if bounds is not None:
        check_bounds(matrix, bounds)
        span = (bounds[0] - bounds[1], bounds[1] - bounds[0])
    first, second = np.triu_indices(len(matrix), 1)
    p = _sign_flip_test(matrix[first] - matrix[second])
    low, high = mean_intervals(matrix - matrix[reference], confidence, span)
    return _differences(matrix.mean(1), low, high, p, reference)


def score_statistic(wins: Array, losses: Array, episodes: int, difference: ArrayLike) -> tuple[Array, Array]:
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
        excess, deviation = score_statistic(middle.astype(float), losses.astype(float), episodes, -margin)
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


def bisect(below: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Where `below`, true up to a point between `low` and `high` and false from there on, turns."""
    for _ in range(60):
        middle = (low + high) / 2
        more = below(middle)
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    return low


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


def discordant_counts(wins: ArrayLike, losses: ArrayLike, episodes: int) -> tuple[Array, Array]:
    """Check the discordant episodes of pairs of cells; as arrays of one shape."""
    first, second = np.broadcast_arrays(np.asarray(wins, dtype=float), np.asarray(losses, dtype=float))
    if episodes < 1 or not np.all((first >= 0) & (second >= 0) & (first + second <= episodes)):
        raise ValueError(
            f"wins and losses must be 0 or more, together at most the {episodes} episodes, which are 1 or more"
        )
    return first, second


def wins_over(solved: Array) -> Array:
    """(K, K) episodes that the row's cell solved and the column's did not, of (K, N) bool."""
    counts = solved.astype(float)
    return counts @ (1 - counts).T


def _check_reference(reference: int, cells: int) -> None:
    if not 0 <= reference < cells:
        raise ValueError(f"reference must be the index of a cell, 0 to {cells - 1}; got {reference}")
