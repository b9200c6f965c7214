"""Confidence intervals for one cell: of its success rate, and of the mean of its scores.

A rollout's summary needs both. Neither loads scipy, so that a rollout starts sooner: scipy.stats takes about a second
of CPU time to import, and scipy.special a third of a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from policy.statistics.checks import cells_by_episodes, check_bounds, check_fraction

RESAMPLES_AT_ONCE = 250  # resamples held in memory at the same time
Z_95 = 1.959963984540054  # scipy.special.ndtri(0.975): the two-sided standard normal quantile for a confidence of 0.95


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % Wilson score interval of a success rate (Wilson 1927).

    Args:
        successes: 0..trials.
        trials: 1 or more.

    Returns:
        Lower and upper end, within [0, 1]; bit for bit those of scipy's `BinomTestResult.proportion_ci`.

    Raises:
        ValueError: impossible counts.

    Example:
        >>> low, high = wilson_interval(45, 50)
        >>> round(low, 3), round(high, 3)
        (0.786, 0.957)
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(
            f"successes must be 0 to trials and trials 1 or more; got {successes} of {trials}: count finished episodes"
        )
    successes, trials = int(successes), int(trials)
    # The operations are those of scipy 1.17 in the same order, so that every float stays the same to the last bit.
    rate, z = successes / trials, Z_95
    denominator = 2 * (trials + z**2)
    centre = (2 * trials * rate + z**2) / denominator
    half_width = z / denominator * math.sqrt(4 * trials * rate * (1 - rate) + z**2)
    low = 0.0 if successes == 0 else centre - half_width
    high = 1.0 if successes == trials else centre + half_width
    return low, high


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, *, bounds: tuple[float, float]
) -> tuple[float, float]:
    """Bootstrap interval of the mean of bounded values, with a fixed seed; it does not depend on their order.

    This is the interval of Gaffke (2005; Learned-Miller and Thomas 2019, arXiv 1905.06208): a Bayesian bootstrap of the
    values and one additional observation at a bound, the lower bound for the lower end and the upper bound for the
    upper end. It does not need a large sample, and allows for rare failures that the sample may have missed. It is
    conservative: at 95 %, too wide by up to 4 / N of the distance to the bound. If every value lies at a bound, it is
    the exact interval of Clopper and Pearson.

    Args:
        values: (N,), one or more.
        confidence: coverage of the interval, in (0, 1).
        bounds: the least and the greatest possible value, such as (0, 1) for scores.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: no values, NaN, values outside the bounds, or a confidence outside (0, 1).

    Example:
        >>> low, high = bootstrap_interval([1.0] * 50, bounds=(0, 1))
        >>> round(low, 2), high
        (0.93, 1.0)
    """
    check_fraction("confidence", confidence)
    # A matrix of one row: the last bit of a product with a vector may differ, and files keep their figures.
    row = np.sort(cells_by_episodes([values], "values", float), axis=1)
    check_bounds(row, bounds)
    generator = np.random.default_rng(0)
    lows, highs = [], []
    for _ in range(16):
        weights = generator.standard_exponential((RESAMPLES_AT_ONCE, row.shape[1] + 1))
        weights /= weights.sum(1, keepdims=True)
        sums = row @ weights[:, :-1].T
        lows.append(sums + weights[:, -1] * bounds[0])
        highs.append(sums + weights[:, -1] * bounds[1])
    low, high = np.quantile(lows, (1 - confidence) / 2), np.quantile(highs, (1 + confidence) / 2)
    return float(low.clip(*bounds)), float(high.clip(*bounds))
