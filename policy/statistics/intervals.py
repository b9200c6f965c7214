"""Intervals of one cell: of a success rate, and of a mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest, bootstrap

from policy.statistics.checks import Array, cells_by_episodes, check_bounds, check_fraction

CHUNK = 250  # resamples held in memory at once


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
    check_fraction("confidence", confidence)
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
    low, high = mean_intervals(cells_by_episodes([values], "values", float), confidence, bounds)
    return float(low[0]), float(high[0])


def mean_intervals(values: Array, confidence: float, bounds: tuple[float, float] | None) -> tuple[Array, Array]:
    """`bootstrap_interval` of each row of (K, N), with the same resamples for all."""
    check_fraction("confidence", confidence)
    values = np.sort(values, axis=1)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    generator = np.random.default_rng(0)
    if bounds is not None:
        check_bounds(values, bounds)
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
