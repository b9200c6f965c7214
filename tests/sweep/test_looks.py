"""Plans of looks in the ledger: kept, found again, followed by another, and never spent twice."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.rollout.ledger import Ledger
from policy.statistics.results import EpisodeResult
from policy.statistics.sequential import stage_alpha
from policy.sweep.looks import (
    LookPlan,
    can_stop_early,
    counted_results,
    describe_plan,
    describe_saving,
    keep,
    missing_tasks,
    planned_looks,
    plans_of,
    settle,
)

RATES = (0.1, 0.9, 0.95)
OUTCOMES = np.random.default_rng(0).random((3, 120)) < np.array(RATES)[:, None]


def result(cell, seed):
    solved = bool(OUTCOMES[cell, seed])
    return EpisodeResult(seed=seed, success=solved, score=float(solved), return_=0.0, steps=1)


def planned(ledger, **changes):
    plan = settle(ledger, wish(ledger, **changes))
    keep(ledger, plan)
    return plan


def wish(ledger, **changes):
    cells = tuple(ledger.introduce({"ddim_steps": steps}) for steps in (1, 2, 8))
    wanted = LookPlan(
        asked=cells,
        max_ms=None,
        left_out="",
        cells=cells,
        recipes=(1, 1, 1),
        cost=(1.0, 2.0, 8.0),
        seed=0,
        looks=(40, 80, 120),
        margin=0.2,
        alpha=0,
    )
    return dataclasses.replace(wanted, **changes)


def run(plan, ledger, most=10**6):
    """Run what the plan asks for, one episode after the other, and return the order in which they ran."""
    ran = []
    while len(ran) < most and (tasks := missing_tasks(plan, ledger)):
        for number, seed in tasks[: most - len(ran)]:
            ledger.add(plan.cells[number], result(number, seed))
            ran.append((number, seed))
    return ran


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with Ledger(tmp_path_factory.mktemp("whole") / "episodes.jsonl") as ledger:
        plan = planned(ledger)
        return plan, run(plan, ledger), counted_results(plan, ledger)


def test_a_cell_that_is_decided_runs_no_further_and_the_others_do(whole):
    plan, ran, counted = whole
    stops = [len(found) for found in counted]
    assert stops[0] == 40 < max(stops)
    assert len(ran) == sum(stops) < 3 * 120
    assert describe_saving(plan, counted, decided=True) == f"{len(ran)} of at most 360 episodes decided this."
    assert "as the rest would hardly have decided it" in describe_saving(plan, counted, decided=False)
    assert not describe_saving(plan, [[result(0, 0)] * 120] * 3, decided=False)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=3))
def test_a_sweep_that_is_interrupted_anywhere_ends_as_one_that_is_not(whole, tmp_path_factory, pauses):
    file = tmp_path_factory.mktemp("paused") / "episodes.jsonl"
    ran = []
    for most in [*pauses, 10**6]:
        with Ledger(file) as ledger:
            plan = planned(ledger)
            ran += run(plan, ledger, most)
            counted = counted_results(plan, ledger)
    assert len(plans_of(Ledger(file))) == 1
    assert (plan, sorted(ran), counted) == (whole[0], sorted(whole[1]), whole[2])


def test_the_same_wish_finds_its_plan_again_and_another_one_gets_less_of_what_is_left(tmp_path):
    with Ledger(tmp_path / "episodes.jsonl") as ledger:
        first = planned(ledger)
        run(first, ledger)
        before = counted_results(first, ledger)
        others = [
            planned(ledger, **changes)
            for changes in ({"margin": 0.1}, {"looks": (60, 120)}, {"looks": (120,)}, {"cost": (1.0, 2.0, 3.0)})
        ]
        for plan in others:
            run(plan, ledger)
        assert planned(ledger) == first
        assert counted_results(first, ledger) == before  # what another plan ran does not change what this one saw
    plans = [first, *others]
    assert plans_of(Ledger(tmp_path / "episodes.jsonl")) == plans
    assert len({plan.alpha for plan in plans}) == len(plans)
    assert sum(plan.alpha for plan in plans) < 0.05
    assert "plan 2 on this ledger, with 0.24 % of wrong answers left to it" in describe_plan(others[0], 2)


def test_the_same_cells_as_other_recipes_are_another_question_that_gets_less_of_what_is_left(tmp_path):
    with Ledger(tmp_path / "episodes.jsonl") as ledger:
        shapes = ((1, 1, 1), (2, 1), (1, 2), (3,))
        ledger.add(wish(ledger).cells[0], result(0, 0))
        plans = [planned(ledger, looks=(120,), recipes=recipes) for recipes in shapes]
        assert [planned(ledger, looks=(120,), recipes=recipes) for recipes in shapes] == plans
    assert len(plans_of(Ledger(tmp_path / "episodes.jsonl"))) == 4
    assert [plan.alpha for plan in plans] == pytest.approx([stage_alpha(stage) for stage in (1, 2, 3, 4)])


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.3]), st.integers(0, 3)), max_size=8))
@settings(deadline=None)
def test_whatever_is_planned_run_and_stopped_the_plans_that_have_run_spend_at_most_a_twentieth(
    tmp_path_factory, commands
):
    used = {}
    with Ledger(tmp_path_factory.mktemp("looks") / "episodes.jsonl") as ledger:
        for margin, most in commands:
            plan = planned(ledger, margin=margin, looks=(3, 6, 9))
            if run(plan, ledger, most):
                used[margin] = {*used.get(margin, ()), plan.alpha}
    spent = [alpha for alphas in used.values() for alpha in alphas]
    assert sum(spent) < 0.05
    assert len({*spent}) == len(spent)


def test_a_wish_that_leaves_out_what_was_seen_is_refused(tmp_path):
    with Ledger(tmp_path / "episodes.jsonl") as ledger:
        first = planned(ledger)
        run(first, ledger)
        fewer = {"cells": first.cells[1:], "recipes": (1, 1), "cost": first.cost[1:]}
        with pytest.raises(ValueError, match="has results of 1 more cell for these seeds"):
            settle(ledger, wish(ledger, **fewer))
        for part in ({"looks": (60,)}, {"seed": 40, "looks": (80,)}, {"seed": 20}):
            with pytest.raises(ValueError, match="holds a sweep of these cells with seed=0 and 120 episodes"):
                settle(ledger, wish(ledger, **part))
        assert settle(ledger, wish(ledger, looks=(60, 150))).alpha < first.alpha
        assert settle(ledger, wish(ledger, seed=120, **fewer)).alpha < first.alpha  # nobody has seen these seeds
        assert settle(
            ledger, wish(ledger, cells=first.cells[:1], recipes=(1,), cost=(1.0,), looks=(60,))
        )  # compares nothing
        other = ledger.introduce({"ddim_steps": 50})
        assert settle(
            ledger, wish(ledger, cells=(*first.cells, other), recipes=(1, 1, 1, 1), cost=(1.0, 2.0, 8.0, 50.0))
        )
        assert settle(ledger, wish(ledger, recipes=(1, 2))).alpha < first.alpha  # asks something else of the same cells


def test_episodes_that_were_seen_may_be_continued_at_both_ends(tmp_path):
    """A single cell's episodes 40 to 100 do not keep a comparison from beginning earlier, as it leaves none out."""
    with Ledger(tmp_path / "episodes.jsonl") as ledger:
        cell = wish(ledger).cells[:1]
        single = planned(ledger, cells=cell, asked=cell, recipes=(1,), cost=(1.0,), seed=40, looks=(60,))
        run(single, ledger)
        assert settle(ledger, wish(ledger)).alpha < single.alpha
        advice = "take them all, with seed=40 and episodes=80 or more, or begin with seeds that nobody has seen"
        with pytest.raises(ValueError, match=advice):
            settle(ledger, wish(ledger, seed=60, looks=(60,)))


def test_the_advice_to_take_all_episodes_can_be_followed(tmp_path):
    """Of several sweeps, each of which the wish cuts or would cut when it followed the advice of the one before."""
    with Ledger(tmp_path / "episodes.jsonl") as ledger:
        for seed, episodes in ((0, 30), (20, 60), (110, 10)):
            cell = ledger.introduce({"ddim_steps": 1})
            single = {"cells": (cell,), "asked": (cell,), "recipes": (1,), "cost": (1.0,)}
            run(planned(ledger, **single, seed=seed, looks=(episodes,)), ledger)
        with pytest.raises(ValueError, match=r"seed=20 and 60 episodes, .* with seed=0 and episodes=100 or more"):
            settle(ledger, wish(ledger, seed=70, looks=(30,)))
        assert settle(ledger, wish(ledger, seed=0, looks=(100,)))


def test_a_plan_that_nobody_followed_is_replaced_and_costs_nothing(tmp_path):
    file = tmp_path / "episodes.jsonl"
    for margin in (0.3, 0.2, 0.3, 0.1):
        with Ledger(file) as ledger:
            planned(ledger, margin=margin, looks=(40,))
    with Ledger(file) as ledger:
        first = planned(ledger)
        assert plans_of(ledger) == [first]
        assert first.alpha == stage_alpha(1)
        run(first, ledger, 1)
        before = [planned(ledger, margin=margin, seed=1000) for margin in (0.3, 0.1)]  # seeds that nobody has seen
        assert planned(ledger) == first
    with Ledger(file) as ledger:
        assert plans_of(ledger) == [first, before[1]]
        assert [plan.alpha for plan in before] == [stage_alpha(2)] * 2
        assert planned(ledger, margin=0.3, looks=(150,)).alpha == stage_alpha(2)
        assert planned(ledger, margin=0.3, seed=1000).alpha == stage_alpha(3)  # the plan of before was replaced


def test_a_ledger_without_a_plan_is_compared_on_all_its_episodes(tmp_path):
    with Ledger(tmp_path / "episodes.jsonl") as ledger:
        for cell in wish(ledger).cells:
            for seed in range(100):
                ledger.add(cell, result(0, seed))
        with pytest.raises(ValueError, match="with seed=0 and 100 episodes"):
            settle(ledger, wish(ledger, looks=(80,)))
        assert settle(ledger, wish(ledger, looks=(100,))).looks == (100,)


def test_a_plan_whose_line_was_removed_stays_spent(tmp_path):
    file = tmp_path / "episodes.jsonl"
    with Ledger(file) as ledger:
        first = planned(ledger)
        run(first, ledger, 10)
        second = planned(ledger, margin=0.1)
    lines = file.read_text().splitlines(keepends=True)
    plans = [line for line in lines if "looks" in line]
    for lost in (plans[:1], plans):
        file.write_text("".join(line for line in lines if line not in lost))
        with Ledger(file) as ledger:
            assert settle(ledger, wish(ledger, looks=(120,))).alpha <= second.alpha
            assert settle(ledger, wish(ledger, looks=(120,))).alpha < first.alpha


def test_cells_that_cannot_be_paired_and_ledgers_of_earlier_versions_are_compared_once(tmp_path):
    with Ledger(tmp_path / "new.jsonl") as ledger:
        assert can_stop_early(ledger)
        ledger.note_unpaired("seed 0 did not repeat")
        assert not can_stop_early(ledger)
    with Ledger(tmp_path / "old.jsonl") as ledger:
        ledger.add(ledger.introduce({"ddim_steps": 1}), result(0, 0))
        assert not can_stop_early(ledger)


def test_looks_by_default_are_six_and_never_closer_than_20_episodes():
    assert planned_looks(600, None, adaptive=True) == (100, 200, 300, 400, 500, 600)
    assert planned_looks(50, None, adaptive=True) == (25, 50)
    assert planned_looks(4, None, adaptive=True) == planned_looks(4, None, adaptive=False) == (4,)
    with pytest.raises(ValueError, match="looks must be 1 to the number of episodes, 4, and at most 100; got 5"):
        planned_looks(4, 5, adaptive=True)
    with pytest.raises(ValueError, match="adaptive=false looks once, after all episodes: leave looks=3 out"):
        planned_looks(600, 3, adaptive=False)


def test_a_plan_survives_json_and_what_is_none_is_refused(tmp_path):
    with Ledger(tmp_path / "episodes.jsonl") as ledger:
        plan = wish(ledger)
    plan = dataclasses.replace(plan, alpha=0.01)
    row = json.loads(json.dumps(dataclasses.asdict(plan)))
    assert LookPlan.from_row(row) == plan
    del row["recipes"]  # as an earlier version wrote it, of single checkpoints
    assert LookPlan.from_row(row) == plan
    with pytest.raises(ValueError, match="is no plan of looks"):
        LookPlan.from_row({"looks": [1]})
    for wrong in ({"looks": [5, 3]}, {"alpha": 0.7}, {"margin": "much"}, {"more": 1}):
        with pytest.raises(ValueError, match="is no plan of looks"):
            LookPlan.from_row({**row, **wrong})
