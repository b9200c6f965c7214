"""What errors say about a training: intervals against scipy, and conclusions about errors whose origin is known."""

import numpy as np
import pytest
from scipy import stats

from policy.statistics.fit import (
    FEWEST_EPISODES,
    HELD_OUT,
    OVER_FITTED,
    PRECISE,
    STILL_FALLING,
    TRAINING,
    compared_episodes,
    conclude,
    paired_ratio,
    unpaired_ratio,
)


def errors(mean, count=16, spread=0.2, seed=0):
    """Errors of episodes, of which the geometric mean is as given."""
    logs = np.random.default_rng(seed).normal(size=count)
    return mean * np.exp(spread * (logs - logs.mean()))


def entry(held_out, training, neighbours=None, step=1000):
    """An entry of a history, from the errors of episodes."""
    return {
        "step": step,
        HELD_OUT: float(np.mean(held_out)),
        TRAINING: float(np.mean(training)),
        **compared_episodes(held_out, training, neighbours),
    }


def test_the_intervals_are_those_of_scipy():
    one, other = errors(0.5, 7), errors(0.2, 5, spread=0.4, seed=1)
    found = unpaired_ratio(one, other)
    expected = stats.ttest_ind(np.log(one), np.log(other), equal_var=False).confidence_interval(0.95)
    assert found == pytest.approx((2.5, *np.exp([expected.low, expected.high])))
    found = paired_ratio(one, errors(0.2, 7, seed=2))
    expected = stats.ttest_rel(np.log(one), np.log(errors(0.2, 7, seed=2))).confidence_interval(0.95)
    assert found == pytest.approx((2.5, *np.exp([expected.low, expected.high])))


def test_one_episode_has_no_interval_and_equal_ones_have_no_width():
    assert unpaired_ratio([0.3], [0.1, 0.2]) is None
    assert paired_ratio([0.3], [0.1]) is None
    assert paired_ratio([0.3, 0.3], [0.1, 0.1]) == pytest.approx((3, 3, 3))
    assert unpaired_ratio([0.0, 0.0], [0.0, 0.0]) == (1, 1, 1)
    assert compared_episodes([0.3], [0.1, 0.2], [0.2]) == {"fit/episodes": 1}


def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says_with_few_episodes():
    drawn = np.random.default_rng(0)
    covered = [
        found.low <= 2 <= found.high
        for _ in range(400)
        for found in [unpaired_ratio(2 * np.exp(drawn.normal(size=4)), np.exp(0.5 * drawn.normal(size=16)))]
    ]
    assert 0.91 < np.mean(covered) < 0.985


@pytest.mark.parametrize(
    ("held_out", "training", "neighbours", "kind", "words"),
    [
        (errors(0.5), errors(0.2, seed=1), errors(0.6, seed=2), "over-fitted", "more demonstrations"),
        (errors(0.8), errors(0.78, seed=1), errors(0.4, seed=2), "under-trained", "train.steps"),
        (errors(PRECISE / 2), errors(PRECISE / 4, seed=1), errors(0.3, seed=2), "precise", "precise"),
        (errors(0.5), errors(0.48, seed=1), errors(0.6, seed=2), "undecided", "perhaps under-trained"),
        (errors(0.5), errors(0.48, seed=1), None, "undecided", "2000 steps"),
        (errors(0.5, 4, spread=1), errors(0.4, seed=1), errors(0.6, 4, seed=2), "undecided", "held-out episodes (4)"),
        (
            errors(0.5, 16, spread=3),
            errors(0.4, seed=1),
            errors(0.6, 16, seed=2),
            "undecided",
            "differ too much to tell",
        ),
        (errors(5, 3), errors(0.2, seed=1), errors(6, 3, seed=2), "undecided", "held-out episodes (3)"),
        (errors(5, 1), errors(0.2, seed=1), errors(6, 1, seed=2), "undecided", "train.val_fraction"),
    ],
)
def test_the_conclusion_about_known_errors(held_out, training, neighbours, kind, words):
    found = conclude([{"step": 10, "train/loss": 0.5}, entry(held_out, training, neighbours)])
    assert found.kind == kind
    assert words in found.sentence
    assert found.sentence.count("\n") == 0


def test_without_held_out_episodes_or_a_measurement_nothing_is_concluded():
    assert conclude([]) is None
    assert conclude([{"step": 10, "val/loss": 0.5}]) is None
    found = conclude([{"step": 10, TRAINING: 0.3}])
    assert found.kind == "undecided"
    assert "held-out episodes (0)" in found.sentence


@pytest.mark.parametrize(
    ("steps", "factor", "kind"),
    [
        ([500, 1000], 1.05 * STILL_FALLING, "under-trained"),
        ([500, 1000], 0.95 * STILL_FALLING, "limited"),
        ([500, 1000], 1, "limited"),
        ([100, 900, 1000], 3, "undecided"),
        ([100, 520, 900, 1000], 2, "under-trained"),
    ],
)
def test_an_error_that_still_falls_in_the_second_half_means_too_few_steps(steps, factor, kind):
    def measured(step):
        return entry((factor if step <= 600 else 1) * errors(0.5), errors(0.48, seed=1), errors(0.6, seed=2), step=step)

    found = conclude([measured(step) for step in steps])
    assert found.kind == kind
    if kind == "under-trained":
        assert f"{factor:.2g} times as much halfway" in found.sentence
    if kind == "limited":
        assert found.sentence.startswith("neither over-fitted nor under-trained: ")


def test_a_small_or_uncertain_difference_is_not_over_fitting():
    small = entry(errors(0.5), errors(0.5 / 1.2, seed=1, spread=0.05), step=500)
    assert small["fit/ratio_low"] > 1
    assert conclude([small, {**small, "step": 1000}]).kind == "limited"
    found = conclude([entry(errors(0.5, FEWEST_EPISODES, spread=1), errors(0.5 / OVER_FITTED / 1.1, seed=1))])
    assert found.kind == "undecided"


@pytest.mark.parametrize("missing", ["fit/error", "fit/ratio_low", HELD_OUT, "fit/neighbour_ratio_high"])
def test_an_entry_that_lacks_figures_is_no_error(missing):
    whole = entry(errors(0.5), errors(0.48, seed=1), errors(0.6, seed=2), step=1000)
    lacking = {name: value for name, value in whole.items() if name != missing}
    of_neighbours = missing == "fit/neighbour_ratio_high"
    assert conclude([{**whole, "step": 500}, lacking]).kind == ("limited" if of_neighbours else "undecided")


def test_the_end_of_a_run_that_went_on_is_not_its_middle():
    """There the learning rate has come down to 0, and with it the error."""
    early, late = (entry(errors(0.5), errors(0.48, seed=1), errors(0.6, seed=2), step=step) for step in (600, 1000))
    assert conclude([{**early, "train/learning_rate": 5e-4}, late]).kind == "limited"
    ended = conclude([{**early, "train/learning_rate": 0.0}, {**late, "train/learning_rate": 0.0}])
    assert ended.kind == "undecided"
    assert "perhaps under-trained" in ended.sentence
