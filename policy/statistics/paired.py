"""Two cells on the same episodes: tests of their difference, and intervals for it.

All cells of a sweep run the same episodes, so outcomes are *paired*: column `n` of every array here is the same
episode. Two cells then differ only on their discordant episodes, which are the episodes that exactly one of the two
solved. Comparing the cells' separate intervals would lose most of the information that the pairing gives.

`counts` has the numbers of these episodes, also where a seed does not fix the episode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln, ndtr, ndtri, xlogy

from policy.statistics.checks import Array, check_fraction, check_reference
from policy.statistics.counts import discordant_counts, pair_counts

# Score statistics are told apart in steps of 10 / BINS: at 4, a step changes a p-value by a thousandth of it.
BINS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """A cell compared with the reference cell on the same episodes.

    Attributes:
        difference: mean of the cell minus mean of the reference.
        low: lower end of the difference's interval.
        high: upper end of the difference's interval.
        p_value: two-sided, for the hypothesis of no difference in this pair alone.
        adjusted_p_value: `p_value` after Holm's adjustment over all pairs of cells, so that it remains valid if the
            reference was chosen by looking at the data.
    """

    difference: float
    low: float
    high: float
    p_value: float
    adjusted_p_value: float


def holm(p_values: ArrayLike, weights: ArrayLike = 1.0) -> Array:
    """Adjust p-values for multiple testing (Holm 1979).

    If every hypothesis with an adjusted p-value of at most alpha is rejected, the probability of one or more false
    rejections is at most alpha.

    Args:
        p_values: (..., M), in [0, 1]; the M of a row are adjusted together.
        weights: positive, of a shape that broadcasts to that of `p_values`; a hypothesis with twice the weight starts
            with twice the level.

    Returns:
        (..., M) adjusted p-values in the same order, each at least its p-value.

    Raises:
        ValueError: no p-values, or p-values outside [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    if not p.ndim or not p.size or not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p_values must be a list of one or more numbers in [0, 1]; got {p.tolist()}")
    weights = np.broadcast_to(np.asarray(weights, dtype=float), p.shape)
    order = np.argsort(p / weights, axis=-1, kind="stable")
    sorted_weights = np.take_along_axis(weights, order, -1)
    left = sorted_weights[..., ::-1].cumsum(-1)[..., ::-1]
    steps = np.maximum.accumulate(left / sorted_weights * np.take_along_axis(p, order, -1), axis=-1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(steps, 1), -1)
    return adjusted


def mcnemar_test(wins: ArrayLike, losses: ArrayLike) -> Array:
    """Exact McNemar test of equal success rates (McNemar 1947; the conditional binomial test).

    Args:
        wins: (...), episodes that only the first cell solved.
        losses: (...), episodes that only the second cell solved.

    Returns:
        (...) two-sided p-values; 1 if there are no discordant episodes.

    Raises:
        ValueError: negative counts.
    """
    wins, losses = np.asarray(wins), np.asarray(losses)
    if np.any(wins < 0) or np.any(losses < 0):
        raise ValueError("wins and losses must be 0 or more: count the episodes that one cell alone solved")
    # Imported here: scipy.stats takes a second to load, and intervals do not need it.
    from scipy.stats import binom

    # This is scipy.stats.binomtest for arrays: at a probability of 1/2 the two tails are equal.
    return np.minimum(1, 2 * binom.cdf(np.minimum(wins, losses), wins + losses, 0.5))


def paired_interval(
    wins: ArrayLike, losses: ArrayLike, episodes: ArrayLike, confidence: float = 0.95
) -> tuple[Array, Array]:
    """Tango's score interval for the difference of two paired success rates (Tango 1998, Stat. Med. 17, 891-908).

    It inverts the score test, as Wilson's interval does for one rate. It keeps its coverage in small samples and for
    rates near 0 and 1 (Fagerland, Lydersen and Laake 2014, Stat. Med. 33, 2850-2875).

    Args:
        wins: (...), episodes that only the first cell solved.
        losses: (...), episodes that only the second cell solved.
        episodes: (...), the number of all episodes.
        confidence: two-sided coverage of the interval, in (0, 1); each end alone is a one-sided bound at a confidence
            of (1 + confidence) / 2.

    Returns:
        Lower and upper ends, (...) each, within [-1, 1], for the first rate minus the second.

    Raises:
        ValueError: impossible counts, or a confidence outside (0, 1).

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

    This is the exact unconditional test on Tango's statistic (Hsueh, Liu and Chen 2001, Biometrics 57, 478-483). Its
    p-value is the probability of a statistic at least as large as the observed one, maximised over a grid of the
    unknown rate of episodes that only the first cell solves. The returned p-value is never below that of Tango's own
    asymptotic test, so that the two methods here agree: if it is at most alpha, the lower end of `paired_interval` at
    confidence 1 - 2 alpha is -margin or more.

    Args:
        wins: (...), episodes that only the first cell solved.
        losses: (...), episodes that only the second cell solved.
        episodes: N, the number of all episodes.
        margin: a difference of success rates, in (0, 1).

    Returns:
        (...) one-sided p-values; a small one shows that the first cell is not worse by `margin` or more.

    Raises:
        ValueError: impossible counts, or a margin outside (0, 1).
    """
    z = _margin_statistic(wins, losses, episodes, margin)
    return np.maximum(ndtr(-z), _tails(episodes, margin)[_bins(z)])


def inferiority_test(wins: ArrayLike, losses: ArrayLike, episodes: int, margin: float) -> Array:
    """Test that a cell's true success rate is not lower than another's by more than `margin`: Tango's score test.

    Args:
        wins: (...), episodes that only the first cell solved.
        losses: (...), episodes that only the second cell solved.
        episodes: N, the number of all episodes.
        margin: a difference of success rates, in (0, 1).

    Returns:
        (...) one-sided asymptotic p-values; a small one shows that the first cell is worse by more than `margin`.

    Raises:
        ValueError: impossible counts, or a margin outside (0, 1).
    """
    return np.asarray(ndtr(_margin_statistic(wins, losses, episodes, margin)))


def _margin_statistic(wins: ArrayLike, losses: ArrayLike, episodes: int, margin: float) -> Array:
    """Tango's statistic (...) for the hypothesis that the first cell is worse by exactly `margin`."""
    check_fraction("margin", margin)
    excess, deviation = score_statistic(*discordant_counts(wins, losses, episodes), episodes, -margin)
    return np.asarray(excess / deviation)


def compare_success(
    success: Sequence[ArrayLike], reference: int, confidence: float = 0.95, *, paired: bool = True
) -> tuple[PairedDifference, ...]:
    """Compare the success rate of every cell with that of a reference cell, chosen without looking at the outcomes.

    The intervals are Tango's. The p-values are those of the exact McNemar test, adjusted by Holm over all pairs of
    cells. For a reference that the outcomes decide, such as the best cell, see `simultaneous.compare_with_best`.

    Args:
        success: for each cell its outcomes, true or false; column n is the same episode. Cells may have run different
            numbers of episodes; a pair is compared on those that both ran.
        reference: index of the cell to compare with.
        confidence: two-sided coverage of each interval separately, in (0, 1).
        paired: whether a column is the same episode for all cells; otherwise see `counts.unpaired_wins`.

    Returns:
        One comparison per cell; for the reference itself the difference is 0 and the p-value 1.

    Raises:
        ValueError: malformed outcomes, a reference that does not exist, or a confidence outside (0, 1).
    """
    wins, episodes = pair_counts(success, paired=paired)
    check_reference(reference, len(wins))
    first, second = np.triu_indices(len(wins), 1)
    p = mcnemar_test(wins[first, second], wins[second, first])
    low, high = paired_interval(wins[:, reference], wins[reference], episodes[:, reference], confidence)
    return _differences((wins[:, reference] - wins[reference]) / episodes[:, reference], low, high, p, reference)


def score_statistic(wins: Array, losses: Array, episodes: ArrayLike, difference: ArrayLike) -> tuple[Array, Array]:
    """Numerator and denominator of Tango's score statistic for a hypothesis about the difference of two rates.

    Args:
        wins: (...) float, episodes that only the first cell solved.
        losses: (...) float, episodes that only the second cell solved.
        episodes: (...), the number of all episodes.
        difference: (...), in (-1, 1), the hypothesis: the rate of wins minus the rate of losses.

    Returns:
        (...) wins - losses minus its expectation under the hypothesis, and its standard deviation at the restricted
        maximum likelihood estimate of the rate of losses (Tango 1998).
    """
    difference, episodes = np.asarray(difference), np.asarray(episodes)
    a = 2 * episodes
    b = (2 * episodes - wins + losses) * difference - wins - losses
    c = -losses * difference * (1 - difference)
    rate = (np.sqrt(np.maximum(b * b - 4 * a * c, 0)) - b) / (2 * a)
    variance = episodes * (2 * rate + difference * (1 - difference))
    return wins - losses - episodes * difference, np.sqrt(np.maximum(variance, 0))


def null_deviation(discordant: Array, margin: float) -> Array:
    """Standard deviation per episode that the score test expects under a difference of -margin.

    Args:
        discordant: (...), the rate of episodes that exactly one of both cells solved.
        margin: in (0, 1).
    """
    return score_statistic(discordant / 2, discordant / 2, 1, -margin)[1]


@lru_cache(maxsize=64)
def _tails(episodes: int, margin: float) -> Array:
    """Compute the upper tails of the score statistic when the true difference is -margin.

    Args:
        episodes: N, the number of all episodes.
        margin: in (0, 1).

    Returns:
        For each of `_bins`, the probability of a statistic in this bin or above it, at the rate of wins for which it is
        greatest. Values that share a bin count as equal, so that no probability is too small.
    """
    log_factorial = gammaln(np.arange(episodes + 1) + 1.0)
    greatest = np.zeros(2 * BINS + 1)
    # The rate of wins is unknown: try a grid from 0 to its greatest possible value, finer near 0.
    for win_rate in (1 - margin) / 2 * np.linspace(0, 1, 33) ** 2:
        wins, losses = (_likely_counts(episodes, rate) for rate in (win_rate, win_rate + margin))
        wins, losses = np.meshgrid(wins, losses)
        possible = wins + losses <= episodes
        wins, losses = wins[possible], losses[possible]
        neither = episodes - wins - losses
        logarithm = log_factorial[-1] - log_factorial[wins] - log_factorial[losses] - log_factorial[neither]
        rates = (win_rate, win_rate + margin, max(1 - 2 * win_rate - margin, 0.0))
        chance = np.exp(logarithm + sum(map(xlogy, (wins, losses, neither), rates)))
        excess, deviation = score_statistic(wins.astype(float), losses.astype(float), episodes, -margin)
        found = np.bincount(_bins(excess / deviation), chance, minlength=len(greatest))
        # What is left out as too unlikely counts as a statistic of any size.
        greatest = np.maximum(greatest, found[::-1].cumsum()[::-1] + max(1 - found.sum(), 0.0))
    return np.minimum(greatest, 1)


def _bins(z: Array) -> Array:
    """Number the intervals of width 10 / BINS in which score statistics lie; the last ones are open."""
    return np.floor((np.clip(z, -10, 10) + 10 + 1e-9) * (BINS / 10)).astype(int).clip(0, 2 * BINS)


def _likely_counts(episodes: int, rate: float) -> Array:
    """The numbers of events of this rate in so many episodes, without those whose probability is below about 1e-10."""
    reach = 6.5 * math.sqrt(episodes * rate * (1 - rate)) + 7
    low, high = math.floor(episodes * rate - reach), math.ceil(episodes * rate + reach)
    return np.arange(max(low, 0), min(high, episodes) + 1) if rate > 0 else np.zeros(1, dtype=int)


def bisect(below: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Find, for each element, the point at which `below` changes from true to false.

    Args:
        below: an elementwise predicate, true up to one point between `low` and `high` and false beyond it.
        low: (...) float, lower ends of the search.
        high: (...) float, upper ends of the search.

    Returns:
        (...) the points, from below, after 60 bisections.
    """
    for _ in range(60):
        middle = (low + high) / 2
        more = below(middle)
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    return low


def _differences(differences: Array, low: Array, high: Array, p: Array, reference: int) -> tuple[PairedDifference, ...]:
    """Combine differences, intervals and p-values into one comparison per cell.

    Args:
        differences: (K,) from the reference cell.
        low: (K,) lower ends of the differences from the reference.
        high: (K,) upper ends of the differences from the reference.
        p: (K (K - 1) / 2,) p-values of all pairs, row by row above the diagonal of the matrix of pairs.
        reference: index of the reference cell.

    Returns:
        One comparison per cell.
    """
    count = len(differences)
    raw, adjusted = np.ones((count, count)), np.ones((count, count))
    upper = np.triu_indices(count, 1)
    if p.size:
        raw[upper], adjusted[upper] = p, holm(p)
    raw, adjusted = np.minimum(raw, raw.T), np.minimum(adjusted, adjusted.T)
    low[reference] = high[reference] = 0.0
    return tuple(
        PairedDifference(
            difference=float(differences[i]),
            low=float(low[i]),
            high=float(high[i]),
            p_value=float(raw[i, reference]),
            adjusted_p_value=float(adjusted[i, reference]),
        )
        for i in range(count)
    )
