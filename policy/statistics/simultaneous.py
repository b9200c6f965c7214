"""Differences to the best cell, with intervals that hold for all cells together.

Which cell is the best seen is decided by the data, so an interval for one pair that was chosen beforehand is too narrow
for the difference to the best: of truly equal cells, the luckiest one looks better than it is. The intervals here hold
for *all* pairs of cells together, and so for those with the best cell, whichever it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri, stdtrit

from policy.statistics.checks import Array, cells_by_episodes, check_fraction
from policy.statistics.counts import outcomes_of, pair_counts
from policy.statistics.paired import PairedDifference, compare_success, paired_interval

RESAMPLES = 2000


def compare_with_best(
    success: Sequence[ArrayLike], best: int, confidence: float = 0.95, *, paired: bool = True
) -> tuple[PairedDifference, ...]:
    """Compare the success rate of every cell with that of the best one, with simultaneous intervals.

    Each interval is Tango's for its pair, at a critical value that takes all pairs into account: the quantile of the
    greatest standardised deviation of any pair in a bootstrap that resamples whole episodes, so that it follows the
    correlation of the cells (max-T; Romano and Wolf 2005, Econometrica 73, 1237-1282). The p-values are those of
    `compare_success`. Both are those of a number of episodes that was fixed beforehand.

    Args:
        success: for each cell its outcomes, true or false; column n is the same episode. Cells may have run different
            numbers of episodes; a pair is compared on those that both ran.
        best: index of the best cell, or of any other one.
        confidence: the probability that all intervals together cover, in (0.5, 1).
        paired: whether a column is the same episode for all cells; otherwise see `counts.unpaired_wins`.

    Returns:
        One comparison per cell; for the best cell itself the difference is 0 and the p-value 1.

    Raises:
        ValueError: malformed outcomes, a cell that does not exist, or a confidence outside (0.5, 1).
    """
    check_fraction("confidence", confidence, above=0.5)
    separate = compare_success(success, best, confidence, paired=paired)
    wins, episodes = pair_counts(success, paired=paired)
    if len(wins) == 1:
        return separate
    bound = _critical_value(outcomes_of(success), wins, episodes, confidence, paired=paired)
    low, high = paired_interval(wins[:, best], wins[best], episodes[:, best], 2 * float(ndtr(bound)) - 1)
    return tuple(
        cell if number == best else replace(cell, low=float(low[number]), high=float(high[number]))
        for number, cell in enumerate(separate)
    )


def compare_means_with_best(values: ArrayLike, best: int, confidence: float = 0.95) -> list[tuple[float, float, float]]:
    """Compare the mean of every cell with that of the best one, with simultaneous intervals for few episodes.

    Each interval is Student's for the differences on the same episodes, with Bonferroni's adjustment over all pairs.

    Args:
        values: (K, N), K cells on the same N episodes, two or more.
        best: index of the cell with the best mean.
        confidence: the probability that all intervals together cover, in (0, 1).

    Returns:
        For each cell its mean minus that of the best one, and the ends of the interval; zeros for the best cell.

    Raises:
        ValueError: a malformed array, fewer than two episodes, or a confidence outside (0, 1).

    Example:
        >>> [tuple(round(end, 2) for end in cell) for cell in compare_means_with_best([[1, 2, 3], [2, 3, 5]], best=0)]
        [(0.0, 0.0, 0.0), (1.33, -0.1, 2.77)]
    """
    matrix = cells_by_episodes(values, "values", float)
    check_fraction("confidence", confidence)
    cells, episodes = matrix.shape
    if episodes < 2:
        raise ValueError(f"intervals need two episodes or more; got {episodes}")
    differences = matrix - matrix[best]
    errors = differences.std(axis=1, ddof=1) / np.sqrt(episodes)
    reach = errors * stdtrit(episodes - 1, 1 - (1 - confidence) / max(2, cells * (cells - 1)))
    means = differences.mean(axis=1)
    return [(float(mean), float(mean - r), float(mean + r)) for mean, r in zip(means, reach, strict=True)]


def _critical_value(solved: Sequence[Array], wins: Array, episodes: Array, confidence: float, *, paired: bool) -> float:
    """The quantile of the greatest standardised deviation of the difference of any pair, at least that of one pair."""
    generator = np.random.default_rng(0)
    difference = (wins - wins.T) / episodes
    # Shrunk slightly away from 0, so that a pair without discordant episodes has a deviation.
    deviation = np.sqrt(np.maximum((wins + wins.T + 1) / (episodes + 2) - difference**2, 1 / episodes) / episodes)
    greatest = np.zeros(RESAMPLES)
    for number, rates in _resampled(solved, generator, paired=paired):
        first, second = np.nonzero(np.triu(episodes == number, 1))
        shift = rates[:, first] - rates[:, second] - difference[first, second]
        greatest = np.maximum(greatest, (abs(shift) / deviation[first, second]).max(1, initial=0.0))
    return max(float(np.quantile(greatest, confidence)), float(ndtri((1 + confidence) / 2)))


def _resampled(solved: Sequence[Array], generator: np.random.Generator, *, paired: bool) -> Iterator[tuple[int, Array]]:
    """For each number of episodes that cells ran, (RESAMPLES, K) success rates over resamples of that many of them."""
    longest = max(map(len, solved))
    drawn = generator.multinomial(longest, np.full(longest, 1 / longest), RESAMPLES).astype(np.float32)
    for number in sorted(set(map(len, solved))):
        matrix = np.stack([np.resize(row, longest)[:number] for row in solved]).astype(np.float32)
        if paired:
            times = drawn[:, :number]
            yield number, times @ matrix.T / np.maximum(times.sum(1, keepdims=True), 1)
        else:
            yield number, generator.binomial(number, matrix.mean(1), (RESAMPLES, len(solved))) / number
