"""A small version of `make bench-sweep`: simulated sweeps that stop early keep their promise and save episodes."""

import numpy as np
import pytest

from policy.statistics.sequential import ERROR, follow
from scripts.bench import sweep


@pytest.mark.parametrize("cells", [2, 5])
def test_many_sweeps_at_once_are_followed_as_each_one_is(cells):
    plan = sweep.first_plan()
    (solved,) = sweep.outcomes(np.linspace(0.85, 0.95, cells), sweep.ADAPTIVE, 0.5, 12)
    chosen, stopped = sweep.follow_all(plan, solved, np.arange(cells))
    for one, cell, episodes in zip(solved, chosen, stopped, strict=True):
        progress = follow(plan, one, range(cells))
        assert progress.stopped == tuple(episodes)
        assert (-1 if progress.recommendation.cell is None else progress.recommendation.cell) == cell


@pytest.mark.slow
@pytest.mark.parametrize("cells", [2, 6])
@pytest.mark.parametrize("behaviour", sweep.behaviours())
def test_cells_that_are_worse_by_the_margin_are_seldom_recommended(behaviour, cells):
    assert sweep.error(behaviour, cells, 0.5, 500)["wrong"] <= sweep.most(ERROR, 500)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "saved"), [("demo", 0.5), ("all equal", 0.15), ("Push-T", 0.08)])
def test_episodes_are_saved_for_about_as_many_right_answers(name, saved):
    row = sweep.scenario(name, 0.5, 1000)
    assert row["episodes saved"] >= saved
    assert row["right"] >= row["right, fixed"] - 0.05
