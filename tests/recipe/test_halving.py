"""The plan of successive halving."""

import itertools

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from policy.recipe.halving import LEAST_EPISODES, SHARE, Cost, plan_halving, seconds_needed, sizes_of

costs = st.builds(Cost, step=st.floats(1e-4, 2), rung=st.floats(0, 20))


def seconds_of_course(plan, costs, order, episode_seconds):
    """What a search costs in which the recipes survive in this order."""
    total, before = 0.0, 0
    for rung in plan.rungs:
        on_rung = [costs[number] for number in order[: rung.candidates]]
        total += sum((rung.steps - before) * cost.step + cost.rung for cost in on_rung)
        before = rung.steps
    return total + plan.rungs[-1].candidates * plan.episodes * episode_seconds


@given(
    costs=st.lists(costs, min_size=2, max_size=9),
    seconds=st.floats(1, 1e5),
    spent=st.floats(0, 1e4),
    steps=st.integers(1, 20_000),
    episode_seconds=st.none() | st.floats(1e-3, 60),
    data=st.data(),
)
def test_no_course_of_a_plan_exceeds_the_budget_and_every_rung_halves(
    costs, seconds, spent, steps, episode_seconds, data
):
    try:
        plan = plan_halving(costs, spent + seconds, spent, steps, episode_seconds)
    except ValueError:
        reject()
    order = data.draw(st.permutations(range(len(costs))))
    assert seconds_of_course(plan, costs, order, episode_seconds or 0) <= SHARE * seconds * (1 + 1e-6)
    assert plan.rungs[0].candidates == len(costs)
    assert plan.rungs[-1].candidates == 2
    for before, after in itertools.pairwise(plan.rungs):
        assert after.candidates == -(-before.candidates // 2)
        assert after.steps == min(steps, 2 * before.steps)
    assert plan.rungs[-1].steps <= steps
    assert plan.episodes == 0 or plan.episodes >= LEAST_EPISODES
    assert episode_seconds is not None or plan.episodes == 0


@given(costs=st.lists(costs, min_size=2, max_size=9), steps=st.integers(16, 20_000))
def test_the_budget_that_a_refusal_names_is_enough(costs, steps):
    with pytest.raises(ValueError) as refused:
        plan_halving(costs, 3.0, 5.0, steps, None)
    needed = str(refused.value).split("which need ")[1].split()[0]
    unit = {"s": 1, "n": 60, "h": 3600}[needed[-1]]
    plan_halving(costs, float(needed.rstrip("shmin")) * unit, 5.0, steps, None)


def test_the_longest_rungs_that_fit_are_planned():
    costs = [Cost(step=0.01, rung=1.0)] * 8
    plan = plan_halving(costs, 300, 0, 8000, None)
    longer = [rung.steps + 2**number for number, rung in enumerate(plan.rungs)]
    assert seconds_needed(plan, costs, 0) <= SHARE * 300
    assert 0.01 * (8 * longer[0] + 4 * (longer[1] - longer[0]) + 2 * (longer[2] - longer[1])) + 14 > SHARE * 300
    assert [rung.steps for rung in plan_halving(costs, 1e6, 0, 8000, None).rungs] == [2000, 4000, 8000]


def test_rollouts_that_the_budget_does_not_allow_are_left_out():
    costs = [Cost(step=0.01, rung=0.0)] * 2
    assert plan_halving(costs, 60, 0, 100, 0.1).episodes == 85
    assert plan_halving(costs, 60, 0, 100, 5.0).episodes == 0
    assert plan_halving(costs, 1e6, 0, 100, 5.0).episodes == 100


def test_sizes_halve_until_two_remain():
    assert sizes_of(8) == [8, 4, 2]
    assert sizes_of(5) == [5, 3, 2]
    assert sizes_of(2) == [2]
