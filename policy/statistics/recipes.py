"""Recipes: what the success of several training seeds says about the settings that they share.

A *recipe* is a training with all its settings except the training seed; its success rate is the mean over all seeds
that it could be trained with. Its S checkpoints have run the same N episodes, so that outcomes vary in two ways at
once: between seeds and between episodes (a crossed two-way layout with random effects; Searle, Casella and McCulloch
1992, chapter 4). Pooling the S N outcomes as if they were independent ignores both, and its intervals are too narrow.

The variance of the recipe's mean has two parts:

- *seeds*: the variance between the seeds' means over S, with S - 1 degrees of freedom. It holds whatever a seed does to
  single episodes, and is never taken as smaller than that alone.
- *episodes*: what the shared difficulty of the N episodes adds. It counts as known, because N is large.

The quantile that multiplies their root is the mean of Student's and the normal one, weighted by the parts (Cochran
1964, Biometrics 20, 191-195). The interval of a success rate is symmetric on the scale of its *angle*, the arcsine of
its root (Anscombe 1948, Biometrika 35, 246-254): near 100 % the seeds lie more widely below the mean than above it, and
so does the interval. Few seeds may all miss a rare bad training, which their spread then does not show. So an end of an
interval is at least as far as *one further seed* would move the mean whose success lies 20 points nearer to one half.
`make bench-recipes` shows by simulation that the intervals cover, and how wide they are.

A single checkpoint is a recipe of one seed: no figure here holds what another training seed would change.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtrit

from policy.statistics.checks import Array, cells_by_episodes, check_bounds, check_fraction
from policy.statistics.intervals import bootstrap_interval
from policy.statistics.paired import bisect, paired_interval

FURTHER_SEED = 0.2  # how much nearer to one half the success of a training seed may lie that was not drawn
# Fewer episodes than this hide how much they differ. Simulated with three seeds that nearly agree on each episode, the
# interval that the variance gives covers 13 % with one episode and 88 % with five, and 94 to 95 % from 20 on.
FEW_EPISODES = 20


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A success rate, or a difference of two, with the parts of its variance.

    Attributes:
        value: the estimate.
        seeds: variance that training seeds give, and its degrees of freedom, for each recipe of two seeds or more.
        episodes: variance that the episodes give besides.
        reach: (at most 0, at least 0), how far one further seed would move the estimate down and up.
    """

    value: float
    seeds: tuple[tuple[float, int], ...]
    episodes: float
    reach: tuple[float, float]

    @property
    def variance(self) -> float:
        """The whole variance."""
        return self.episodes + sum(variance for variance, _ in self.seeds)

    @property
    def seeds_share(self) -> float:
        """The share of the variance that training seeds give."""
        return 1 - self.episodes / self.variance if self.variance else 0.0


def recipe_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a recipe's success rate, or of its mean score.

    Args:
        values: (S, N) in [0, 1], the checkpoints of two training seeds or more on the same N episodes.
        confidence: coverage of the interval, in (0, 1).

    Returns:
        Lower and upper end, within [0, 1].

    Raises:
        ValueError: a malformed array, fewer than two seeds, or a confidence outside (0, 1).

    Example:
        >>> seeds = [[True] * 90 + [False] * 10, [True] * 94 + [False] * 6, [True] * 85 + [False] * 15]
        >>> low, high = recipe_interval(seeds)
        >>> round(low, 2), round(high, 2)
        (0.76, 0.98)
    """
    check_fraction("confidence", confidence)
    matrix = cells_by_episodes(values, "values", float)
    if len(matrix) == 1:
        raise ValueError("a recipe needs checkpoints of two training seeds or more: one says nothing about the others")
    check_bounds(matrix, (0, 1))
    estimate = _estimate(matrix, _reach(matrix))
    low, high = _around(estimate.value, _half_width(estimate, confidence))
    low, high = min(low, estimate.value + estimate.reach[0]), max(high, estimate.value + estimate.reach[1])
    if not estimate.variance or matrix.shape[1] < FEW_EPISODES:  # the seeds may add nothing to the episodes of one
        least, most = bootstrap_interval(matrix.mean(0).tolist(), confidence, bounds=(0, 1))
        low, high = min(low, least), max(high, most)
    return max(low, 0.0), min(high, 1.0)


def difference_interval(estimate: Estimate, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of the difference of two success rates.

    Args:
        estimate: see `difference_estimate`.
        episodes: N, the number of episodes.
        confidence: coverage of the interval, in (0, 1).

    Returns:
        Lower and upper end, within [-1, 1].

    Raises:
        ValueError: a confidence outside (0, 1).
    """
    check_fraction("confidence", confidence)
    half_width = _half_width(estimate, confidence)
    low = estimate.value - max(half_width, -estimate.reach[0])
    high = estimate.value + max(half_width, estimate.reach[1])
    if not estimate.variance:  # all episodes differ alike: 1, 0 or -1
        wins, losses = max(round(estimate.value * episodes), 0), max(round(-estimate.value * episodes), 0)
        least, most = paired_interval(wins, losses, episodes, confidence)
        low, high = min(low, float(least)), max(high, float(most))
    return max(low, -1.0), min(high, 1.0)


def difference_estimate(first: ArrayLike, second: ArrayLike, *, same_seeds: bool = False) -> Estimate:
    """Estimate the difference of two success rates, of two recipes or of one recipe's checkpoints used in two ways.

    Where equal seeds are different episodes, columns pair independent outcomes, and the estimate holds as well.

    Args:
        first: (S, N) bool, the checkpoints of S training seeds on the same N episodes.
        second: (T, N) bool, on the same episodes as the first.
        same_seeds: whether rows of both are the same checkpoints, used in two ways, so that T = S. What a seed does to
            both then cancels. Otherwise the training seeds of the two recipes are independent.

    Returns:
        The estimate of the first rate minus the second.

    Raises:
        ValueError: malformed arrays, or different numbers of episodes, or of checkpoints with `same_seeds`.
    """
    a, b = (cells_by_episodes(success, "success", bool).astype(float) for success in (first, second))
    if a.shape[1] != b.shape[1] or (same_seeds and len(a) != len(b)):
        raise ValueError(f"success must be of the same episodes and checkpoints; got shapes {a.shape} and {b.shape}")
    if same_seeds:
        return _estimate(a - b, (0.0, 0.0))
    (down_a, up_a), (down_b, up_b) = _reach(a), _reach(b)
    seeds_a, seeds_b = _seed_variance(a), _seed_variance(b)
    return Estimate(
        value=float(a.mean() - b.mean()),
        seeds=(*seeds_a.part, *seeds_b.part),
        episodes=max(_mean_variance(a.mean(0) - b.mean(0)) - seeds_a.within - seeds_b.within, 0.0),
        reach=(min(down_a, -up_b), max(up_a, -down_b)),
    )


def not_worse_test(estimate: Estimate, episodes: int, margin: float) -> float:
    """Test that the first success rate is lower than the second by `margin` or more.

    The variance is never taken as smaller than that of one checkpoint each under this hypothesis, margin (1 - margin)
    over N: where hardly any episode differs, the observed variance says little.

    Args:
        estimate: see `difference_estimate`.
        episodes: N, the number of episodes.
        margin: a difference of success rates, in (0, 1).

    Returns:
        One-sided p-value; a small one shows that the first rate is not lower by `margin` or more.

    Raises:
        ValueError: a margin outside (0, 1).
    """
    check_fraction("margin", margin)
    if estimate.value + estimate.reach[0] <= -margin:
        return 1.0
    return _p_value(_floored(estimate, episodes, margin), estimate.value + margin)


def worse_test(estimate: Estimate, episodes: int, margin: float) -> float:
    """Test that the first success rate is *not* lower than the second by more than `margin`; see `not_worse_test`."""
    check_fraction("margin", margin)
    if estimate.value + estimate.reach[1] >= -margin:
        return 1.0
    return _p_value(_floored(estimate, episodes, margin), -margin - estimate.value)


def equality_test(estimate: Estimate) -> float:
    """Two-sided p-value of the hypothesis that both success rates are equal."""
    if estimate.reach[0] <= -estimate.value <= estimate.reach[1] and any(estimate.reach):
        return 1.0
    return min(2 * _p_value(estimate, abs(estimate.value)), 1.0)


@dataclass(frozen=True, kw_only=True)
class _SeedVariance:
    """Variance of the mean over (S, N) values that S seeds give: `part` as in `Estimate`, empty for a single seed.

    `within` is what remains of it if all seeds have the same mean, so that they differ on single episodes only.
    """

    part: tuple[tuple[float, int], ...]
    within: float


def _estimate(values: Array, reach: tuple[float, float]) -> Estimate:
    """The estimate of the mean of (S, N) values, S seeds on the same N episodes."""
    seeds = _seed_variance(values)
    episodes = max(_mean_variance(values.mean(0)) - seeds.within, 0.0)
    return Estimate(value=float(values.mean()), seeds=seeds.part, episodes=episodes, reach=reach)


def _seed_variance(values: Array) -> _SeedVariance:
    """The part of the variance that S seeds give, from (S, N) values."""
    count, episodes = values.shape
    if count == 1:
        return _SeedVariance(part=(), within=0.0)
    residual = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    within = float((residual**2).sum()) / ((count - 1) * max(episodes - 1, 1)) / (count * episodes)
    return _SeedVariance(part=((max(_mean_variance(values.mean(1)), within), count - 1),), within=within)


def _mean_variance(values: Array) -> float:
    """Variance of the mean of (M,) independent values."""
    return float(values.var(ddof=1)) / values.size if values.size > 1 else 0.0


def _reach(solved: Array) -> tuple[float, float]:
    """How far one further seed may move a recipe's success rate down and up; a single checkpoint has none."""
    count, rate = len(solved), float(solved.mean())
    if count == 1:
        return 0.0, 0.0
    moved = (min(max(0.5, rate - FURTHER_SEED), rate + FURTHER_SEED) - rate) / (count + 1)
    return min(moved, 0.0), max(moved, 0.0)


def _quantile(estimate: Estimate, tail: ArrayLike) -> Array:
    """Cochran's quantile: the mean of Student's and the normal one, weighted by the parts of the variance."""
    total = estimate.variance
    if not total:
        return -ndtri(tail)
    student = sum(variance * -stdtrit(freedom, tail) for variance, freedom in estimate.seeds)
    return np.asarray((student - estimate.episodes * ndtri(tail)) / total)


def _half_width(estimate: Estimate, confidence: float) -> float:
    """Half the width of the interval that the variance gives."""
    return float(_quantile(estimate, (1 - confidence) / 2)) * estimate.variance**0.5


def _around(rate: float, half_width: float) -> tuple[float, float]:
    """Both ends of the interval rate ± half_width, made symmetric on the scale of the rate's angle."""
    angle, slope = math.asin(rate**0.5), 2 * (rate * (1 - rate)) ** 0.5
    turned = half_width / slope if slope else 0.0
    return math.sin(max(angle - turned, 0.0)) ** 2, math.sin(min(angle + turned, math.pi / 2)) ** 2


def _p_value(estimate: Estimate, excess: float) -> float:
    """One-sided p-value of an `excess` over the hypothesis: the tail whose quantile it just reaches."""
    if not estimate.variance:
        return 0.5 if not excess else float(excess < 0)
    z = np.asarray(abs(excess) / estimate.variance**0.5)
    tail = float(bisect(lambda tail: _quantile(estimate, tail) > z, np.zeros(()), np.full((), 0.5)))
    return tail if excess > 0 else 1 - tail


def _floored(estimate: Estimate, episodes: int, margin: float) -> Estimate:
    """The estimate with the least variance that a difference of `margin` can have in N episodes of one checkpoint."""
    missing = margin * (1 - margin) / episodes - estimate.variance
    return dataclasses.replace(estimate, episodes=estimate.episodes + max(missing, 0.0))
