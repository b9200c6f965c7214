"""The plan of successive halving."""

import itertools

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from policy.recipe.halving import (
    LEAST_EPISODES,
    SHARE,
    Cost,
    Plan,
    Rung,
    plan_fastest,
    plan_halving,
    plan_last_rung,
    seconds_needed,
    sizes_of,
)

costs = st.builds(Cost, step=st.floats(1e-4, 2), rung=st.floats(0, 20))


def seconds_of_course(plan, costs, order, episode_seconds):
    """What a search costs in which the recipes survive in this order."""
    total, before = 0.0, 0
    for rung in plan.rungs:
        on_rung = [costs[number] for number in order[: rung.candidates]]
        total += sum((rung.steps - before) * cost.step + cost.rung for cost in on_rung)
        total += rung.candidates * plan.episodes * episode_seconds
        before = rung.steps
    return total


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
    assert plan.rungs[-1].candidates == 2 or (len(plan.rungs) == 1 and plan.episodes)
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


def test_rollouts_are_on_every_rung_or_on_a_single_one_or_are_left_out():
    costs = [Cost(step=0.01, rung=0.0)] * 4
    shape = [
        (len(plan.rungs), plan.episodes)
        for seconds in (1e6, 300, 200, 100)
        for plan in [plan_halving(costs, seconds, 0, 100, 2.0)]
    ]
    assert shape == [(2, 100), (2, 10), (1, 10), (2, 0)]


def test_the_slowest_recipes_are_left_out_of_a_budget_that_is_too_small_for_all():
    costs = {"given": Cost(step=0.5, rung=0.0), "slow": Cost(step=5.0, rung=0.0), "fast": Cost(step=0.01, rung=0.0)}
    tried = {seconds: plan_fastest(costs, seconds, 0, 160, None)[1] for seconds in (1000, 20)}
    assert tried == {1000: ["given", "slow", "fast"], 20: ["given", "fast"]}
    with pytest.raises(
        ValueError, match=r"too small for 2 recipes.*: raise it, or name two of these 3 in recipe\.cand"
    ):
        plan_fastest(costs, 1, 0, 160, None)
    with pytest.raises(ValueError, match=r"too small for 2 recipes.*: raise it$"):
        plan_fastest({name: costs[name] for name in ("given", "fast")}, 1, 0, 160, None)
    plan, names = plan_fastest(costs, 150, 0, 160, 3.0)  # all three fit without rollouts
    assert (names, plan.episodes >= LEAST_EPISODES) == (["given", "fast"], True)
    alike = {name: Cost(step=step, rung=0.0) for name, step in [("given", 0.15), ("first", 0.17), ("second", 0.14)]}
    assert plan_fastest(alike, 6, 0, 160, None)[1] == ["given", "first"]


def test_recipes_that_rollouts_do_not_tell_apart_share_what_is_left():
    plan = Plan(rungs=(Rung(candidates=3, steps=100), Rung(candidates=2, steps=200)), episodes=10)
    costs = [Cost(step=0.1, rung=1.0)] * 3
    new = plan_last_rung(plan, 1, costs, 100, 1000, 1.0)
    assert new.rungs == (plan.rungs[0], Rung(candidates=3, steps=100 + int((SHARE * 100 - 33) / 0.3)))
    assert plan_last_rung(plan, 1, costs, 1e6, 1000, 1.0).rungs[-1].steps == 1000
    assert plan_last_rung(plan, 1, costs, 5, 1000, 1.0).rungs == plan.rungs[:1]


def test_sizes_halve_until_two_remain():
    assert sizes_of(8) == [8, 4, 2]
    assert sizes_of(5) == [5, 3, 2]
    assert sizes_of(2) == [2]
