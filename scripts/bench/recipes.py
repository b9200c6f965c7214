"""Whether the intervals and tests of recipes keep their promise, by simulation.

    python -m scripts.bench.recipes [draws=1000]

A draw is a recipe: the success rates of its training seeds come from a distribution with the stated mean and spread
(standard deviation), and all of them run the same episodes, some of which are harder for all seeds alike. An outcome is
a normal variable below the seed's threshold; `difficulty` is the share of its variance that belongs to the episode.

Each row is the worst of difficulties 0, 0.5 and 0.9, and in the first table of two distributions of seeds, beta and
logit-normal, which are skewed near 0 and 1. The first table holds the interval of a recipe's success beside the pooled
one, Wilson's over all outcomes as if they were independent. The second holds that of a difference of two cells of which
the first is in truth worse by 5 points, and how often the first is wrongly shown to be "not worse by 5 points".
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import root
from scipy.special import betaincinv, expit, logit, ndtr, ndtri

from policy.common.progress import progress
from policy.statistics.intervals import wilson_interval
from policy.statistics.recipes import difference_estimate, difference_interval, not_worse_test, recipe_interval
from scripts.bench.report import write_report

DRAWS = 1000
SEEDS = (3, 5, 10)
SUCCESS = (0.5, 0.9, 0.98)
SPREADS = (0.0, 0.02, 0.05)
EPISODES = (100, 500)
DIFFICULTIES = (0, 0.5, 0.9)
MARGIN = 0.05
ALPHA = 0.05
# How alike two cells of one checkpoint are: correlation of the seeds' rates, and of what is left of the outcomes.
ALIKE_SEEDS, ALIKE_OUTCOMES = 0.8, 0.5

Array = NDArray[Any]


def main() -> None:
    """Simulate both tables."""
    draws = DRAWS
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name != "draws" or not value.isdigit():
            sys.exit(f"usage: python -m scripts.bench.recipes [draws={DRAWS}]; got {argument}")
        draws = int(value)
    scenarios = list(itertools.product(SEEDS, SUCCESS, SPREADS, EPISODES))
    write_report(
        "recipes",
        [
            success_row(draws, *one)
            for one in progress(scenarios, total=len(scenarios), desc="success", unit="scenario")
        ],
    )
    compared = [(same, *one) for same in (True, False) for one in scenarios]
    write_report(
        "recipe_differences",
        [
            difference_row(draws, *one)
            for one in progress(compared, total=len(compared), desc="differences", unit="scenario")
        ],
    )


def success_row(draws: int, seeds: int, success: float, spread: float, episodes: int) -> dict[str, Any]:
    """Coverage and width of a recipe's interval, and of the pooled one."""
    found = []
    for family, difficulty in itertools.product(("beta", "logit-normal") if spread else ("beta",), DIFFICULTIES):
        generator = np.random.default_rng([seeds, episodes, int(1000 * spread), int(100 * success)])
        ends = []
        for _ in range(draws):
            rates = rates_of(family, success, spread, ndtr(generator.standard_normal(seeds)))
            solved = next(outcomes([rates], episodes, difficulty, generator))
            ends.append([*recipe_interval(solved), *wilson_interval(int(solved.sum()), solved.size)])
        low, high, pooled_low, pooled_high = np.transpose(ends)
        found.append([*held(low, high, success), *held(pooled_low, pooled_high, success)])
    coverage, width, pooled_coverage, pooled_width = np.transpose(found)
    return {
        **named(seeds, success, spread, episodes),
        "coverage": float(coverage.min()),
        "width, points": 100 * float(width.mean()),
        "pooled coverage": float(pooled_coverage.min()),
        "pooled width, points": 100 * float(pooled_width.mean()),
    }


def difference_row(draws: int, same: bool, seeds: int, success: float, spread: float, episodes: int) -> dict[str, Any]:
    """Coverage and width of the interval of a difference, and how often the worse cell is shown to be "not worse"."""
    found = []
    for difficulty in DIFFICULTIES:
        generator = np.random.default_rng([seeds, episodes, int(1000 * spread), int(100 * success), int(same)])
        drawn = []
        for _ in range(draws):
            first = generator.standard_normal(seeds)
            other = generator.standard_normal(seeds)
            second = ALIKE_SEEDS**0.5 * first + (1 - ALIKE_SEEDS) ** 0.5 * other if same else other
            rates = [
                rates_of("beta", mean, spread, ndtr(z)) for mean, z in ((success - MARGIN, first), (success, second))
            ]
            pair = list(outcomes(rates, episodes, difficulty, generator, alike=ALIKE_OUTCOMES if same else 0))
            estimate = difference_estimate(pair[0], pair[1], same_seeds=same)
            wrong = not_worse_test(estimate, episodes, MARGIN) <= ALPHA
            drawn.append([*difference_interval(estimate, episodes), wrong])
        low, high, wrongs = np.transpose(drawn)
        found.append([*held(low, high, -MARGIN), wrongs.mean()])
    coverage, width, error = np.transpose(found)
    return {
        "compared": "one recipe, used in two ways" if same else "two recipes",
        **named(seeds, success, spread, episodes),
        "coverage": float(coverage.min()),
        "width, points": 100 * float(width.mean()),
        "wrongly not worse": float(error.max()),
    }


def named(seeds: int, success: float, spread: float, episodes: int) -> dict[str, Any]:
    """The first columns of a row."""
    return {"seeds": seeds, "success": f"{success:.0%}", "spread, points": 100 * spread, "episodes": episodes}


def held(low: Array, high: Array, truth: float) -> tuple[float, float]:
    """How often intervals hold the truth, and their mean width."""
    return float(((low <= truth + 1e-12) & (high >= truth - 1e-12)).mean()), float((high - low).mean())


def rates_of(family: str, mean: float, spread: float, uniform: Array) -> Array:
    """Success rates of training seeds: quantiles of the distribution with this mean and standard deviation."""
    if not spread:
        return np.full(uniform.shape, mean)
    if family == "beta":
        total = mean * (1 - mean) / spread**2 - 1
        return np.asarray(betaincinv(mean * total, (1 - mean) * total, uniform))
    centre, scale = logit_normal(mean, spread)
    return np.asarray(expit(centre + scale * ndtri(uniform)))


@cache
def logit_normal(mean: float, spread: float) -> tuple[float, float]:
    """Mean and standard deviation of the logits of rates that have this mean and standard deviation."""
    points, weights = np.polynomial.hermite_e.hermegauss(61)
    weights = weights / weights.sum()

    def missed(guess: Array) -> list[float]:
        rates = expit(guess[0] + np.exp(guess[1]) * points)
        found = float(weights @ rates)
        return [found - mean, float(weights @ (rates - found) ** 2) ** 0.5 - spread]

    solved = root(missed, [logit(mean), np.log(spread / (mean * (1 - mean))) - 0.8 * (mean > 0.95)])
    assert solved.success
    return float(solved.x[0]), float(np.exp(solved.x[1]))


def outcomes(
    rates: Sequence[Array], episodes: int, difficulty: float, generator: np.random.Generator, alike: float = 0
) -> Iterator[Array]:
    """Outcomes of one cell or two on the same episodes.

    Args:
        rates: (S,) success rates of the seeds, for each cell.
        episodes: N.
        difficulty: share of an outcome's variance that its episode has.
        generator: draws them.
        alike: share of what is left that both cells of a seed have in common.

    Yields:
        (S, N) bool for each cell.
    """
    shared = generator.standard_normal(episodes, dtype=np.float32)
    common = generator.standard_normal((len(rates[0]), episodes), dtype=np.float32)
    for rate in rates:
        own = generator.standard_normal((len(rate), episodes), dtype=np.float32)
        rest = alike**0.5 * common + (1 - alike) ** 0.5 * own
        yield difficulty**0.5 * shared + (1 - difficulty) ** 0.5 * rest < ndtri(rate)[:, None]


if __name__ == "__main__":
    main()
