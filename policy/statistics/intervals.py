"""Confidence intervals for one cell: of its success rate, and of the mean of its scores or returns.

A rollout's summary needs `wilson_interval` and `bootstrap_interval` with bounds. Neither loads scipy then, so that a
rollout starts sooner: scipy.stats takes about a second of CPU time to import, and scipy.special a third of a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from policy.statistics.checks import Array, cells_by_episodes, check_bounds, check_fraction

RESAMPLES_AT_ONCE = 250  # resamples held in memory at the same time
Z_95 = 1.959963984540054  # scipy.special.ndtri(0.975): the two-sided standard normal quantile for a confidence of 0.95


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a success rate (Wilson 1927).

    Args:
        successes: 0..trials.
        trials: 1 or more.
        confidence: coverage of the interval, in (0, 1).

    Returns:
        Lower and upper end, within [0, 1]; bit for bit those of scipy's `BinomTestResult.proportion_ci`.

    Raises:
        ValueError: impossible counts, or a confidence outside (0, 1).

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
    successes, trials = int(successes), int(trials)
    # The operations are those of scipy 1.17 in the same order, so that every float stays the same to the last bit.
    rate, z = successes / trials, _two_sided_quantile(confidence)
    denominator = 2 * (trials + z**2)
    centre = (2 * trials * rate + z**2) / denominator
    half_width = z / denominator * math.sqrt(4 * trials * rate * (1 - rate) + z**2)
    low = 0.0 if successes == 0 else centre - half_width
    high = 1.0 if successes == trials else centre + half_width
    return low, high


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, *, bounds: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Bootstrap interval of a mean, with a fixed seed; it does not depend on the order of the values.

    Without `bounds` this is the percentile bootstrap (Efron 1979). For equal values its width is zero, and where a
    small sample may have missed rare failures its coverage is too low. With `bounds` this is the interval of Gaffke
    (2005; Learned-Miller and Thomas 2019, arXiv 1905.06208): a Bayesian bootstrap of the values and one additional
    observation at a bound, the lower bound for the lower end and the upper bound for the upper end. It does not need a
    large sample, and it is conservative: at 95 %, too wide by up to 4 / N of the distance to the bound. If every value
    lies at a bound, it is the exact interval of Clopper and Pearson.

    Args:
        values: (N,), one or more.
        confidence: coverage of the interval, in (0, 1).
        bounds: the least and the greatest possible value, such as (0, 1) for scores.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: no values, NaN, values outside the bounds, or a confidence outside (0, 1).

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
    """Compute `bootstrap_interval` for each row of a (K, N) matrix, with the same resamples for all rows.

    Args:
        values: (K, N) float.
        confidence: as for `bootstrap_interval`.
        bounds: as for `bootstrap_interval`.

    Returns:
        Lower and upper ends, (K,) each.

    Raises:
        ValueError: values outside the bounds, or a confidence outside (0, 1).
    """
    check_fraction("confidence", confidence)
    values = np.sort(values, axis=1)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    generator = np.random.default_rng(0)
    if bounds is not None:
        check_bounds(values, bounds)
        lows, highs = [], []
        for _ in range(16):
            weights = generator.standard_exponential((RESAMPLES_AT_ONCE, values.shape[1] + 1))
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
        # Imported here: scipy.stats takes a second to load, and only intervals without bounds need it.
        from scipy.stats import bootstrap

        interval = bootstrap(
            (values[uneven],),
            np.mean,
            axis=1,
            n_resamples=2000,
            batch=RESAMPLES_AT_ONCE,
            confidence_level=confidence,
            method="percentile",
            rng=generator,
        ).confidence_interval
        low[uneven], high[uneven] = interval.low, interval.high
    return low, high


def _two_sided_quantile(confidence: float) -> float:
    """Standard normal quantile at (1 + confidence) / 2, computed as scipy's interval of a binomial proportion does."""
    if confidence == 0.95:
        return Z_95
    # Imported here: summaries use 0.95 only. statistics.NormalDist would load faster, but its last digits differ.
    from scipy.special import ndtri

    return float(ndtri(0.5 + 0.5 * confidence))
