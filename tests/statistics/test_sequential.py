"""Looks planned in advance: their levels against published ones and exact integrals, and which cells run on."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri
from scipy.stats import multivariate_normal

from policy.statistics.recommendation import recommend
from policy.statistics.sequential import (
    ERROR,
    Plan,
    follow,
    nominal_levels,
    plan_looks,
    sequential_p_values,
    stage_alpha,
)

SIX = plan_looks(600, 6)


def test_the_first_look_spends_its_share_and_nothing_else():
    assert nominal_levels(SIX, 0, 0.036) == pytest.approx(0.001, rel=1e-6)


@pytest.mark.parametrize("looks", [(1, 2), (10, 25, 70)])
@pytest.mark.parametrize("level", [0.05, 0.001])
def test_the_looks_together_reject_with_the_overall_level(looks, level):
    bounds = -ndtri([nominal_levels(looks, look, level) for look in range(len(looks))])
    times = np.array(looks, dtype=float)
    correlation = np.sqrt(np.minimum.outer(times, times) / np.maximum.outer(times, times))
    for look in range(len(looks)):
        below = multivariate_normal(cov=correlation[: look + 1, : look + 1], abseps=1e-7, releps=1e-7)
        spent = 1 - below.cdf(bounds[: look + 1])
        assert spent == pytest.approx(level * (looks[look] / looks[-1]) ** 2, rel=2e-3, abs=1e-7)


def test_one_look_changes_nothing():
    p = np.array([1e-6, 0.003, 0.04, 0.2])
    assert sequential_p_values(p, (50,), 0) == pytest.approx(p, rel=1e-6)
    assert sequential_p_values([0.0, 0.9, 1.0], (50,), 0) == pytest.approx([1e-8, 1, 1])


@settings(deadline=None, max_examples=50)
@given(p=st.floats(1e-7, 0.3), look=st.integers(0, 5))
def test_a_sequential_p_value_is_the_overall_level_at_which_a_look_just_rejects(p, look):
    overall = float(sequential_p_values(p, SIX, look))
    assert overall >= p * (1 - 1e-3)
    if 1e-8 < overall < 0.5:
        assert nominal_levels(SIX, look, overall) == pytest.approx(p, rel=1e-6)


def test_looks_are_equal_steps():
    assert SIX == (100, 200, 300, 400, 500, 600)
    assert plan_looks(10, 3) == (4, 7, 10)
    assert plan_looks(3, 3) == (1, 2, 3)
    for bad in ((5, 6), (5, 0), (0, 1), (1000, 101)):
        with pytest.raises(ValueError, match="looks must be 1 to the number of episodes"):
            plan_looks(*bad)


def test_the_stages_together_spend_no_more_than_there_is():
    spent = [stage_alpha(stage) for stage in range(1, 40)]
    assert sum(spent) <= ERROR
    assert sorted(spent, reverse=True) == spent
    with pytest.raises(ValueError, match="1 or more"):
        stage_alpha(0)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"looks": ()}, "rising numbers"),
        ({"looks": (10, 10)}, "rising numbers"),
        ({"looks": (0, 10)}, "rising numbers"),
        ({"margin": 5}, "margin must be"),
        ({"alpha": 0.6}, "alpha must be"),
    ],
)
def test_a_plan_refuses(changed, says):
    with pytest.raises(ValueError, match=says):
        Plan(**({"looks": SIX, "margin": 0.05, "alpha": 0.045} | changed))


def outcomes(rates, episodes, seed):
    return np.random.default_rng(seed).random((len(rates), episodes)) < np.array(rates)[:, None]


def sweep(plan, success, cost, before=None):
    """Run a sweep look by look, as the command does: its progress at each look."""
    ran = np.zeros(len(success), dtype=int) if before is None else np.array(before)
    seen = []
    while True:
        progress = follow(plan, [row[:n] for row, n in zip(success, ran, strict=True)], cost)
        seen.append(progress)
        if not progress.running:
            return seen
        ran[list(progress.running)] = progress.target


PLAN = Plan(looks=(20, 40, 60, 80), margin=0.2, alpha=0.045)
RATES = st.lists(st.sampled_from([0.1, 0.5, 0.8, 0.95, 1.0]), min_size=2, max_size=5)


@settings(deadline=None, max_examples=25)
@given(rates=RATES, seed=st.integers(0, 99), extra=st.integers(0, 30))
def test_an_interrupted_sweep_stops_at_the_same_looks(rates, seed, extra):
    success, cost = outcomes(rates, 80, seed), range(len(rates))
    seen = sweep(PLAN, success, cost)
    for earlier, later in pairwise(seen):
        assert all(a <= b for a, b in zip(earlier.stopped, later.stopped, strict=True))
        assert later.target >= earlier.target
    end = seen[-1]
    assert set(end.stopped) <= set(PLAN.looks)
    # Killed in the middle of a look, or with episodes that nobody asked for, it comes to the same end.
    partial = np.minimum(np.array(end.stopped), 20 + extra)
    assert sweep(PLAN, success, cost, before=partial)[-1] == end
    more = [row[: min(n + extra, 80)] for row, n in zip(success, end.stopped, strict=True)]
    assert follow(PLAN, more, cost) == end


@settings(deadline=None, max_examples=15)
@given(rates=RATES, seed=st.integers(0, 99))
def test_a_plan_of_one_look_is_the_fixed_grid(rates, seed):
    success, cost = outcomes(rates, 80, seed), range(len(rates))
    one = follow(Plan(looks=(80,), margin=0.2, alpha=ERROR), success, cost)
    fixed = recommend(success, cost, margin=0.2, confidence=1 - ERROR)
    assert (one.running, one.stopped) == ((), (80,) * len(rates))
    assert (one.recommendation.cell, one.recommendation.best) == (fixed.cell, fixed.best)
    assert [cell.verdict for cell in one.recommendation.cells] == [cell.verdict for cell in fixed.cells]


def test_before_the_first_look_everything_runs_and_nothing_is_recommended():
    progress = follow(PLAN, [[], [True] * 7, []], [1, 2, 3])
    assert (progress.running, progress.target, progress.stopped) == ((0, 1, 2), 20, (0, 0, 0))
    assert progress.recommendation is None


def test_a_hopeless_cell_stops_at_once_and_the_cheapest_good_one_ends_the_stage():
    plan = Plan(looks=SIX, margin=0.05, alpha=0.045)
    success = outcomes([0.05, 0.97, 0.97, 0.97], 600, 0)
    end = sweep(plan, success, [1, 2, 4, 8])[-1]
    assert end.stopped[0] == 100
    assert end.recommendation.cell == 1
    assert end.recommendation.cells[0].verdict == "worse"
    assert max(end.stopped) < 600


def test_a_cell_that_stopped_catches_up_when_it_is_needed_again():
    # The second cell stops, because the first one, which is the cheapest, is clearly better than it. The first one then
    # turns out to be worse than the third one, and the second one is compared with that.
    episodes = np.arange(600)
    first, second, third = np.ones((3, 600), dtype=bool)
    second[:100] = episodes[:100] % 20 > 0
    first[150:] = episodes[150:] % 5 > 0
    seen = sweep(Plan(looks=SIX, margin=0.05, alpha=0.045), [first, second, third], [1, 2, 3])
    stopped = [progress.stopped[1] for progress in seen]
    assert stopped == sorted(stopped)
    assert seen[-1].recommendation.cell in (1, 2)
    assert seen[-1].recommendation.cells[0].verdict == "worse"


@pytest.mark.parametrize(
    ("looks", "rates", "cost"),
    [((100, 200), (0.1, 0.5, 1, 0.1, 0.5, 1), (1, 2, 8, 1, 2, 8)), ((100, 200), (0.2, 0.9, 1, 1), (1, 2, 4, 8))],
)
def test_cells_that_solve_everything_go_on_as_long_as_the_last_look_would_accept_them(looks, rates, cost):
    """They never differ; the approximation of the power takes it that they do, and gave up."""
    success = outcomes(rates, looks[-1], 0)
    end = sweep(Plan(looks=looks, margin=0.05, alpha=0.0475), success, cost)[-1]
    assert end.recommendation.cell == 2
    assert recommend(success, cost, margin=0.05).cell == 2


def test_of_equal_costs_the_more_successful_is_recommended_then_the_first():
    plan = Plan(looks=(300, 600), margin=0.1, alpha=0.045)
    success = outcomes([0.9], 600, 1)
    better = success | (np.arange(600) % 6 == 0)
    assert follow(plan, [success[0], better[0], better[0]], [3, 3, 3]).recommendation.cell == 1


def test_outcomes_and_costs_are_checked():
    with pytest.raises(ValueError, match="true or false"):
        follow(PLAN, [[0.5] * 80, [1] * 80], [1, 2])
    with pytest.raises(ValueError, match="one finite number per cell"):
        follow(PLAN, [[1] * 80, [1] * 80], [1])
