"""Recipes: intervals and tests over training seeds and episodes. `make bench-recipes` simulates more of them."""

import numpy as np
import pytest

from policy.statistics.paired import compare_success
from policy.statistics.recipe_recommendation import compare_recipes, describe_recipes, recommend_recipes
from policy.statistics.recipes import (
    difference_estimate,
    difference_interval,
    equality_test,
    not_worse_test,
    recipe_interval,
    worse_test,
)
from scripts.bench.recipes import difference_row, rates_of, success_row


def outcomes(rates, episodes=200, seed=0):
    """(S, N) outcomes of seeds with these success rates, each to the episode."""
    generator = np.random.default_rng(seed)
    rows = [[True] * round(rate * episodes) + [False] * (episodes - round(rate * episodes)) for rate in rates]
    return np.array([generator.permutation(row) for row in rows])


def test_the_interval_is_that_of_cochran_for_two_way_mean_squares_on_the_scale_of_angles():
    solved = outcomes([0.5, 0.6, 0.7], 100)
    low, high = recipe_interval(solved)
    # By hand: mean squares of the crossed layout (statsmodels' anova of a two-way table gives the same).
    grand, seeds, episodes = solved.mean(), solved.mean(1), solved.mean(0)
    between = 100 * ((seeds - grand) ** 2).sum() / 2
    difficulty = 3 * ((episodes - grand) ** 2).sum() / 99
    residual = ((solved - seeds[:, None] - episodes + grand) ** 2).sum() / (2 * 99)
    parts = between / 300, max(difficulty - residual, 0) / 300
    quantile = (4.302653 * parts[0] + 1.959964 * parts[1]) / sum(parts)
    turned = quantile * sum(parts) ** 0.5 / (2 * (grand * (1 - grand)) ** 0.5)
    ends = np.sin(np.arcsin(grand**0.5) + np.array([-turned, turned])) ** 2
    assert (low, high) == pytest.approx(tuple(ends))
    flipped = recipe_interval(~solved)
    assert flipped == pytest.approx((1 - high, 1 - low))


def test_no_end_is_nearer_than_one_further_seed_could_move_it():
    low, high = recipe_interval(np.ones((3, 500)))
    assert low == pytest.approx(0.95)  # one of four seeds at 80 %
    assert high == 1
    assert recipe_interval(np.zeros((9, 500)))[1] == pytest.approx(0.02)


def test_few_episodes_without_a_failure_are_few_however_many_seeds():
    low, _ = recipe_interval(np.ones((10, 10)))
    assert low == pytest.approx(0.69, abs=0.02)  # Clopper and Pearson's for 10 of 10


def test_few_episodes_on_which_the_seeds_agree_are_few():
    low, high = recipe_interval([[0.28], [0.279]])
    assert low < 0.05
    assert high > 0.9
    generator, covered = np.random.default_rng(0), 0
    for _ in range(200):
        episodes = generator.beta(2, 2, 3)
        low, high = recipe_interval(np.clip(episodes + generator.normal(0, 0.02, (3, 3)), 0, 1))
        covered += low <= 0.5 <= high
    assert covered >= 190


def test_scores_have_an_interval_too():
    scores = np.clip(outcomes([0.4, 0.5, 0.6]) + 0.1, 0, 1)
    low, high = recipe_interval(scores)
    assert 0 < low < scores.mean() < high < 1
    assert recipe_interval([[1.0] * 100, [1.0] * 99 + [1 - 2e-16]]) == pytest.approx((14 / 15, 1))  # a mean of 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [([[1, 0, 1]], "two training seeds"), ([[1, 2], [0, 1]], "bounds"), ([[1, 0], [1]], "same episodes")],
)
def test_values_that_are_not_of_a_recipe(values, message):
    with pytest.raises(ValueError, match=message):
        recipe_interval(values)


def test_what_a_seed_does_to_both_cells_cancels():
    fast, slow = outcomes([0.5, 0.6, 0.7]), outcomes([0.52, 0.62, 0.72], seed=1)
    same = difference_interval(difference_estimate(fast, slow, same_seeds=True), 200)
    other = difference_interval(difference_estimate(fast, slow), 200)
    assert same[1] - same[0] < 0.6 * (other[1] - other[0])
    with pytest.raises(ValueError, match="checkpoints"):
        difference_estimate(fast, slow[:2], same_seeds=True)


def test_tests_agree_with_the_interval():
    first, second = outcomes([0.9, 0.91, 0.92, 0.93]), outcomes([0.8, 0.81, 0.82, 0.83], seed=1)
    estimate = difference_estimate(first, second)
    low, high = difference_interval(estimate, 200)
    assert low > 0
    assert equality_test(estimate) < 0.05
    assert not_worse_test(estimate, 200, 0.05) < 0.025
    assert worse_test(estimate, 200, 0.05) == 1
    back = difference_estimate(second, first)
    assert difference_interval(back, 200) == pytest.approx((-high, -low))
    assert worse_test(back, 200, 0.01) < 0.05
    assert not_worse_test(back, 200, 0.05) > 0.5


def test_equal_outcomes_are_not_certainty():
    estimate = difference_estimate(np.ones((3, 20)), np.ones((3, 20)), same_seeds=True)
    assert difference_interval(estimate, 20) == pytest.approx((-0.161, 0.161), abs=1e-3)  # Tango's
    assert not_worse_test(estimate, 20, 0.05) > 0.05
    assert not_worse_test(estimate, 500, 0.05) < 0.001
    assert equality_test(estimate) == 1


def test_a_single_checkpoint_has_no_part_of_training_seeds():
    recipe, single = outcomes([0.5, 0.55, 0.6]), outcomes([0.6], seed=1)
    estimate = difference_estimate(recipe, single)
    assert [freedom for _, freedom in estimate.seeds] == [2]
    assert difference_estimate(single, single).seeds_share == 0


def test_the_cheapest_recipe_that_is_not_worse_is_recommended():
    bad, good = outcomes([0.5] * 5, 500), outcomes([0.9] * 5, 500, seed=1)
    advice = recommend_recipes([bad, good, good], [0, 1, 1], cost=[1, 2, 8])
    assert (advice.cell, advice.best, advice.undecided) == (1, 1, None)
    assert [cell.verdict for cell in advice.cells] == ["worse", "not worse", "not worse"]
    assert "over training seeds and episodes" in describe_recipes(advice, ["a", "b", "c"])
    compared = compare_recipes([bad, good, good], [0, 1, 1], 1)
    assert compared[0].high < -0.3
    assert compared[0].adjusted_p_value < 0.01
    assert (compared[1].low, compared[1].high, compared[1].p_value) == (0, 0, 1)


def test_three_seeds_of_wide_spread_leave_it_undecided():
    first, second = outcomes([0.8, 0.9, 0.85]), outcomes([0.82, 0.91, 0.85], seed=1)
    advice = recommend_recipes([first, second], [0, 1], cost=[1, 2])
    assert advice.cell is None
    assert advice.undecided == 1
    words = describe_recipes(advice, ["a", "b"])
    assert words.startswith("no cell is shown to be not worse")
    assert "b is undecided: +1.0 points from a, give or take " in words
    assert "more training seeds would narrow it most" in words


def test_a_cell_that_costs_the_same_is_not_undecided():
    """It would not improve the recommendation, whatever more training seeds showed."""
    generator = np.random.default_rng(6)
    first, second = generator.random((2, 60)) < 0.93, generator.random((6, 60)) < 0.9
    advice = recommend_recipes([first, second, first[:1]], [0, 1, 2], cost=[1, 1, 2], margin=0.2, confidence=0.9)
    assert second.mean() > first.mean()
    assert [cell.verdict for cell in advice.cells[:2]] == ["not worse", "open"]
    assert (advice.cell, advice.undecided) == (0, None)


def test_of_equal_costs_the_more_successful_recipe_is_recommended():
    good, better = outcomes([0.9] * 5, 500), outcomes([0.94] * 5, 500, seed=1)
    assert recommend_recipes([good, better, better], [0, 1, 1], cost=[2, 2, 8], margin=0.2).cell == 1
    with pytest.raises(ValueError, match="one finite number per cell"):
        recommend_recipes([good, better], [0, 1], cost=[1])
    with pytest.raises(ValueError, match="reference must be the index of a cell, 0 to 1; got 2"):
        compare_recipes([good, better], [0, 1], 2)


def test_two_single_checkpoints_are_compared_alike_whatever_else_is_in_the_sweep():
    first, second = np.ones((1, 100), bool), np.arange(100)[None] >= 5
    recipe = np.random.default_rng(0).random((3, 100)) < 0.5
    alone = compare_success([first[0], second[0]], 0)[1]
    beside = compare_recipes([first, second, recipe], [0, 1, 2], 0)[1]
    assert (beside.low, beside.high) == (alone.low, alone.high)
    assert beside.difference == pytest.approx(alone.difference)
    assert beside.p_value == alone.p_value


def test_one_recipe_has_nothing_to_be_compared_with():
    advice = recommend_recipes([outcomes([0.8, 0.9])], [0], cost=[1])
    assert advice.cell == 0
    assert "one cell only" in describe_recipes(advice, ["a"])
    assert compare_recipes([outcomes([0.8, 0.9])], [0], 0)[0].p_value == 1


def test_simulated_rates_have_the_stated_mean_and_spread():
    uniform = (np.arange(20_000) + 0.5) / 20_000
    for family in ("beta", "logit-normal"):
        rates = rates_of(family, 0.9, 0.05, uniform)
        assert (rates.mean(), rates.std()) == pytest.approx((0.9, 0.05), abs=5e-4)


@pytest.mark.slow
def test_intervals_cover_in_a_small_simulation():
    """200 draws: a true coverage of 95 % shows at least 90 % of them."""
    row = success_row(200, seeds=3, success=0.9, spread=0.05, episodes=100)
    assert row["coverage"] >= 0.9
    assert row["pooled coverage"] < 0.7
    row = difference_row(200, same=True, seeds=3, success=0.9, spread=0.02, episodes=100)
    assert row["coverage"] >= 0.9
    assert row["wrongly not worse"] <= 0.09
