"""Policies with a fixed number of calls in a sweep: one cell, a line across, and whether others beat them."""

import dataclasses

import pytest
import torch

from policy import DiffusionPolicy, Sampler
from policy.inference.backends import compile_sampler
from policy.statistics.paired import compare_success
from policy.statistics.results import EpisodeResult
from policy.statistics.superiority import superiority
from policy.sweep.conclusion import Swept, conclude
from policy.sweep.controls import against_controls
from policy.sweep.grid import fixed_calls, make_cells, repeats
from policy.sweep.panels import facets_of, marks_of
from policy.sweep.plot import draw_rows
from policy.sweep.rows import label_of, varying
from tests.conftest import randomize, small_config
from tests.sweep.test_conclusion import row
from tests.sweep.test_sweep import ENV, make_checkpoint


def checkpoint_of(objective):
    made = make_checkpoint(objective)
    config = dataclasses.replace(made.policy.config, objective=objective)
    return dataclasses.replace(made, policy=DiffusionPolicy(config).eval(), digest=objective)


def cells_of(*objectives, **settings):
    given = {"ddim_steps": [1, 2, 4], "sampler": {}, "controller": {}, "execution_horizon": None} | settings
    cells = make_cells([checkpoint_of(objective) for objective in objectives], ENV, backend="fused", **given)
    return [
        (one.checkpoint.policy.config.objective, one.cell.sampler.ddim_steps, one.cell.sampler.solver, one.cell.sampler)
        for one in cells
    ]


def test_a_control_has_one_cell_whatever_the_steps():
    cells = cells_of("diffusion", "regression", "mip", "flow")
    assert [cell[:3] for cell in cells] == [
        *(("diffusion", steps, "ddim") for steps in (1, 2, 4)),
        ("regression", 1, "one_call"),
        ("mip", 2, "two_calls"),
        *(("flow", steps, "euler") for steps in (1, 2, 4)),
    ]
    assert [cell[:2] for cell in cells_of("regression")] == [("regression", 1)]
    said = fixed_calls([checkpoint_of(name) for name in ("diffusion", "mip", "mip")])
    assert said == [
        "a policy with objective=mip always takes 2 calls of its network: it is one cell for all ddim_steps"
    ]


def test_a_solver_has_no_cell_where_it_would_be_that_of_ddim_again():
    axes = {"ddim_steps": [1, 2, 3], "sampler": {"solver": ["ddim", "dpmpp_2m"], "start": [1.0, 0.5]}}
    cells = [cell[:3] for cell in cells_of("diffusion", "flow", **axes)]
    assert cells == [
        *(("diffusion", steps, "ddim") for _ in range(2) for steps in (1, 2, 3)),
        *(("diffusion", 3, "dpmpp_2m") for _ in range(2)),
        *(("flow", steps, "euler") for _ in range(2) for steps in (1, 2, 3)),
    ]
    alone = cells_of("diffusion", ddim_steps=[1, 3], sampler={"solver": "dpmpp_2m"})
    assert [cell[1:3] for cell in alone] == [(1, "dpmpp_2m"), (3, "dpmpp_2m")]
    assert repeats([1, 2, 3], ["dpmpp_2m", "ddim"], [0.0]) == [
        "dpmpp_2m with ddim_steps=[1,2] is ddim, to the bit: it has no cells of its own there"
    ]
    assert repeats([1, 2, 3], ["dpmpp_2m"], [0.0]) == repeats([3], ["ddim", "dpmpp_2m"], [0.0]) == []


def test_noise_on_the_way_has_no_cell_with_one_step():
    axes = {"ddim_steps": [1, 2], "sampler": {"eta": [1.0, 0.0, 0.5]}}
    cells = [(sampler.ddim_steps, sampler.eta) for *_, sampler in cells_of("diffusion", **axes)]
    assert cells == [(2, 1.0), (1, 0.0), (2, 0.0), (2, 0.5)]
    alone = cells_of("diffusion", ddim_steps=[1, 2], sampler={"eta": 1.0})
    assert [sampler.eta for *_, sampler in alone] == [1.0, 1.0]
    assert repeats([1, 2], ["ddim"], [1.0, 0.0, 0.5]) == [
        "sampler.eta=[1,0.5] with ddim_steps=1 is eta=0, to the bit: it has no cells of its own there"
    ]
    assert repeats([2], ["ddim"], [0.0, 1.0]) == repeats([1, 2], ["ddim"], [1.0]) == []


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("start", [1.0, 0.6])
def test_one_step_with_noise_on_the_way_is_one_without_to_the_bit(prediction_type, start):
    config = dataclasses.replace(small_config(obs_size=8, hidden_size=8), prediction_type=prediction_type)
    policy = DiffusionPolicy(config)
    randomize(policy)
    observations = {key: torch.ones(3, config.obs_horizon, *shape) for key, shape in config.observation_shapes.items()}
    for backend in ("eager", "fused"):
        chunks = [
            compile_sampler(policy, Sampler(ddim_steps=1, eta=eta, start=start), backend=backend).sample_actions(
                observations, generator=torch.Generator().manual_seed(3)
            )
            for eta in (0.0, 1.0)
        ]
        assert torch.equal(*chunks)


def test_an_axis_is_one_of_those_checkpoints_that_have_it():
    cells = cells_of(
        *("diffusion", "flow", "regression"), ddim_steps=4, sampler={"eta": [0.0, 0.5], "noise_scale": [1.0, 0.0]}
    )
    assert [(name, sampler.eta, sampler.noise_scale) for name, *_, sampler in cells] == [
        *(("diffusion", eta, scale) for eta in (0.0, 0.5) for scale in (1.0, 0.0)),
        *(("flow", 0.0, scale) for scale in (1.0, 0.0)),
        ("regression", 0.0, 1.0),
    ]
    solvers = cells_of("diffusion", "flow", ddim_steps=4, sampler={"solver": ["ddim", "dpmpp_2m"]})
    assert [cell[2] for cell in solvers] == ["ddim", "dpmpp_2m", "euler"]


@pytest.mark.parametrize(
    ("objectives", "sampler", "message"),
    [
        (["regression", "mip"], {"eta": [0.0, 0.5]}, "objective=regression has no sampler.eta; got 0.5"),
        (["flow"], {"solver": "dpmpp_2m"}, "no sampler.solver=dpmpp_2m"),
        (["regression"], {"noise_scale": 0.5}, "no sampler.noise_scale"),
    ],
)
def test_a_setting_that_no_checkpoint_has_is_refused(objectives, sampler, message):
    with pytest.raises(ValueError, match=message):
        cells_of(*objectives, sampler=sampler)


def outcomes(solved, count=400):
    return [True] * solved + [False] * (count - solved)


def rows_of(*cells):
    """Rows and outcomes of cells, given as (objective, ddim_steps, solved of 400)."""
    rows = [
        {**row(steps, solved / 400), "checkpoint": objective, "objective": objective, "cell": f"{objective}{steps}"}
        for objective, steps, solved in cells
    ]
    return rows, [[outcomes(solved)] for *_, solved in cells]


@pytest.mark.parametrize(
    ("regression", "verdict", "words"),
    [
        (
            200,
            "better",
            "Diffusion was shown to beat regression on this task: ddim_steps 8, checkpoint diffusion differs",
        ),
        (398, "not better", "Diffusion was shown not to beat regression by more than 5 points on this task: ddim_"),
        (
            345,
            "open",
            "It is open whether diffusion beats regression on this task, and more episodes or seeds",
        ),
    ],
)
def test_the_report_says_whether_diffusion_beats_its_control(regression, verdict, words):
    rows, success = rows_of(("diffusion", 1, 300), ("diffusion", 8, 350), ("regression", 1, regression))
    (found,) = against_controls(rows, success, 0.05, paired=False)
    assert (found["verdict"], found["cell"], found["reference"]) == (verdict, "diffusion8", "regression1")
    assert found["sentence"].startswith(words)
    assert "with 95 % for all 2 cells together" in found["sentence"]
    (later,) = against_controls(rows, success, 0.05, paired=False, looks=6)
    assert later["difference_low"] < found["difference_low"]


@pytest.mark.parametrize(("cells", "looks"), [(1, 1), (4, 1), (4, 3)])
def test_the_intervals_of_all_cells_and_looks_hold_together(cells, looks):
    others = [("diffusion", steps, 300) for steps in range(1, cells)]
    rows, success = rows_of(*others, ("diffusion", 8, 350), ("regression", 1, 300))
    (found,) = against_controls(rows, success, 0.05, paired=False, looks=looks)
    alone = compare_success([success[-1][0], success[-2][0]], 0, 1 - 0.05 / (cells * looks), paired=False)[1]
    assert (found["difference_low"], found["difference_high"]) == (alone.low, alone.high)


def test_each_curve_is_compared_with_each_control():
    rows, success = rows_of(("diffusion", 1, 300), ("mip", 2, 390), ("flow", 4, 390), ("regression", 1, 200))
    found = against_controls(rows, success, 0.05, paired=True)
    assert [(one["reference"], one["cell"]) for one in found] == [
        ("mip2", "diffusion1"),
        ("mip2", "flow4"),
        ("regression1", "diffusion1"),
        ("regression1", "flow4"),
    ]
    assert against_controls(rows[:1], success[:1], 0.05, paired=True) == []
    assert against_controls(rows[1:2], success[1:2], 0.05, paired=True) == []


def test_recipes_are_compared_over_their_training_seeds():
    rows, _ = rows_of(("diffusion", 4, 390), ("regression", 1, 200))
    seeds = [[outcomes(count) for count in counts] for counts in ((396, 390, 392), (190, 210, 205))]
    (found,) = against_controls(rows, seeds, 0.05, paired=True)
    assert found["verdict"] == "better"
    assert found["difference"] == pytest.approx(1178 / 1200 - 605 / 1200)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        ([0.001], [0.02], ("better", 0)),  # by less than the margin, and yet better
        ([-0.3, -0.1], [-0.2, 0.0], ("not better", 1)),
        ([-0.1], [0.05], ("open", 0)),
    ],
)
def test_a_verdict_follows_from_the_intervals(low, high, expected):
    found = superiority(low, high, margin=0.05)
    assert (found.verdict, found.cell) == expected


def test_a_control_is_a_line_across_named_by_its_objective_and_said_once():
    rows, _ = rows_of(("diffusion", 1, 300), ("diffusion", 8, 350), ("regression", 1, 200), ("mip", 2, 340))
    rows = [{**one, "solver": {"diffusion": "ddim"}.get(one["objective"], "x")} for one in rows]
    assert label_of(rows[:3], rows[2]) == "ddim_steps 1, checkpoint regression"  # the objective is not said twice
    assert varying([{**one, "checkpoint": f"{one['checkpoint']}/0"} for one in rows[:3]]) == ["checkpoint", "objective"]
    (facet,) = facets_of(rows, margin=None)
    by_steps, by_latency = facet.panels
    assert [line.level for line in by_steps.lines] == [False, True, True]
    assert not any(line.level for line in by_latency.lines)
    assert marks_of(rows, None).count("A line across") == 1
    assert "A line across" not in marks_of(rows[:2], None)
    drawn = draw_rows(rows, margin=None).axes[0].get_lines()
    low, high = by_steps.x.low, by_steps.x.high
    assert [tuple(line.get_xdata()) for line in drawn].count((low, high)) == 2


def test_a_conclusion_holds_the_verdict_and_older_rows_are_diffusion():
    rows, success = rows_of(("diffusion", 8, 398), ("regression", 1, 200))
    older = {name: value for name, value in rows[0].items() if name != "objective"}
    results = [
        [
            EpisodeResult(seed=seed, success=done, score=float(done), return_=0.0, steps=1)
            for seed, done in enumerate(cell)
        ]
        for (cell,) in success
    ]
    concluded = conclude(Swept(rows=[older, rows[1]], results=results, env={"name": "planar"}), 0.05)
    assert [row["objective"] for row in concluded.rows] == ["diffusion", "regression"]
    assert concluded.between[-1]["verdict"] == "better"
