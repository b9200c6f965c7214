"""Success rates with their uncertainty, against published intervals."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.statistics import bootstrap_interval, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_intervals(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5.1e-5)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(15, 20, 0.5313, 0.8881), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)],
)
def test_small_samples_of_a_sweep(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5.1e-5)


COUNTS = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@settings(deadline=None, max_examples=200)
@given(counts=COUNTS, confidence=st.floats(0.5, 0.999))
def test_the_ends_are_where_the_score_test_just_rejects(counts, confidence):
    successes, trials = counts
    low, high = wilson_interval(successes, trials, confidence)
    rate, z = successes / trials, NormalDist().inv_cdf((1 + confidence) / 2)
    assert 0 <= low <= rate + 1e-12
    assert rate - 1e-12 <= high <= 1
    # Wilson 1927: the interval holds the p with |rate - p| <= z √(p (1 - p) / n).
    for end in (low, high):
        assert abs(rate - end) == pytest.approx(z * math.sqrt(end * (1 - end) / trials), abs=1e-7)


@settings(deadline=None, max_examples=50)
@given(counts=COUNTS)
def test_failures_mirror_successes(counts):
    successes, trials = counts
    low, high = wilson_interval(successes, trials)
    assert wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_more_trials_and_less_confidence_narrow_it():
    def width(*arguments):
        low, high = wilson_interval(*arguments)
        return high - low

    assert width(5, 10) > width(50, 100) > width(500, 1000)
    assert width(5, 10, 0.99) > width(5, 10, 0.95) > width(5, 10, 0.8)


@pytest.mark.parametrize("arguments", [(0, 0), (5, 4), (-1, 3), (1, 2, 1.5), (1, 2, -0.1)])
def test_impossible_counts_are_refused(arguments):
    with pytest.raises(ValueError):
        wilson_interval(*arguments)


def test_bootstrap_interval_of_a_mean_covers_it_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval(generator.beta(5, 1, 60).tolist())
        covered += low <= 5 / 6 <= high
    assert 0.88 <= covered / 200 <= 0.99  # 95 %, less a little for 60 skewed values


def test_bootstrap_interval_is_repeatable_and_close_to_the_normal_one():
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    low, high = bootstrap_interval(values.tolist())
    assert (low, high) == bootstrap_interval(values.tolist())
    margin = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - margin, abs=0.15 * margin)
    assert high == pytest.approx(values.mean() + margin, abs=0.15 * margin)


def test_bootstrap_interval_of_one_value_or_equal_ones_has_no_width():
    assert bootstrap_interval([0.5]) == (0.5, 0.5)
    assert bootstrap_interval([1.0] * 7) == (1.0, 1.0)
