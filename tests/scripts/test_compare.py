"""The comparison of objectives and solvers: what it trains, what it skips, what it has done, and what it concludes."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from envs.errors import MissingExtraError
from policy.diffusion.coefficients import ddim_coefficients, dpmpp_2m_coefficients, takes_steps_of_ddim
from policy.diffusion.ddim import ddim_timesteps
from policy.diffusion.objective import OBJECTIVES
from policy.diffusion.schedule import PREDICTION_TYPES, make_schedule
from policy.statistics.results import EpisodeResult
from scripts.bench import compare, tasks
from scripts.bench.tasks import GIVEN, TASKS, task_named
from scripts.bench.trainings import Trained
from tests.scripts.test_quality import bench  # noqa: F401

EPISODES = 200
# Of a comparison with ddim_steps=[1,4]: with one step, dpmpp_2m would be ddim again.
CELLS = [
    ("diffusion", "ddim", 1),
    ("diffusion", "ddim", 4),
    ("diffusion", "dpmpp_2m", 4),
    ("flow", "euler", 1),
    ("flow", "euler", 4),
    ("regression", "one_call", 1),
    ("mip", "two_calls", 2),
]


def swept(cells):
    """The content of a `sweep.json` whose cells (solver, ddim_steps) solved so many of 100 episodes."""
    return {
        "cells": [
            {
                "cell": f"{solver}{steps}",
                "solver": solver,
                "ddim_steps": steps,
                "episodes": EPISODES,
                "success_rate": solved / 100,
                "score_mean": solved / 100,
                "multiply_adds": 1e6,
            }
            for (solver, steps), solved in cells.items()
        ],
        "episodes": [
            {
                "cell": f"{solver}{steps}",
                **EpisodeResult(
                    seed=100000 + n, success=n < solved * EPISODES // 100, score=1.0, return_=0.0, steps=1
                ).row(),
            }
            for (solver, steps), solved in cells.items()
            for n in range(EPISODES)
        ],
    }


def trained(unit, diffusion=100, regression=60):
    cells = {
        "diffusion": dict.fromkeys([("ddim", 1), ("ddim", 4), ("dpmpp_2m", 4)], diffusion),
        "flow": {("euler", steps): 80 for steps in (1, 4)},
        "regression": {("one_call", 1): regression},
        "mip": {("two_calls", 2): 100},
    }[Path(unit.folder).parent.name]
    return Trained(unit=unit, train_s=60.0, swept=swept(cells))


@pytest.fixture
def pretended(tmp_path, monkeypatch, capsys):
    """Run the comparison with results that no training made; gives what it printed and the units that it ran."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "FINISHED", tmp_path / "rows")
    monkeypatch.setattr(compare, "collect_missing", lambda commands: None)

    def run(*arguments, stop_after=None):
        units = []

        def run_units(wanted, title, done):
            found = []
            for unit in wanted:
                if len(units) == stop_after:
                    raise KeyboardInterrupt
                units.append(unit.name)
                found.append(trained(unit))
                done(found[-1])
            return found

        monkeypatch.setattr(compare, "run_units", run_units)
        monkeypatch.setattr(sys, "argv", ["compare", *arguments])
        compare.main()
        return capsys.readouterr().out, units

    return run


def test_a_stopped_comparison_goes_on_and_a_finished_row_is_not_run_again(pretended, tmp_path):
    command = ["tasks=[planar]", "seeds=[0,1]"]
    with pytest.raises(KeyboardInterrupt):
        pretended(*command, stop_after=3)
    kept = {file.stem for file in (tmp_path / "rows/compare").iterdir()}
    assert kept == {f"planar-{objective}-seed0" for objective in ("diffusion", "flow", "regression")}
    out, units = pretended(*command)
    assert units == ["planar-mip-seed0", *(f"planar-{objective}-seed1" for objective in OBJECTIVES)]
    again, units = pretended(*command)
    assert units == []
    assert again.split("trainings in")[0].endswith("0 ")
    table = [line for line in out.splitlines() if line.startswith("|") or "beat" in line]
    assert table == [line for line in again.splitlines() if line.startswith("|") or "beat" in line]
    assert len(pretended("tasks=[planar]", "seeds=[0,1,2]")[1]) == 4  # the rows of the other seeds are used


def test_the_table_has_a_row_for_each_cell_over_training_seeds_and_a_verdict_for_each_control(pretended, tmp_path):
    out, _ = pretended("tasks=[planar]", "seeds=[0,1,2]")
    rows = json.loads((tmp_path / "outputs/bench/compare.json").read_text())
    assert [(row["objective"], row["solver"], row["ddim_steps"]) for row in rows] == CELLS
    regression = next(row for row in rows if row["objective"] == "regression")
    assert regression["by training seed"] == "60, 60, 60"
    assert re.fullmatch(r"60 % \(\d\d to \d\d\)", regression["success (95 %)"])
    assert regression["difference to the best, points"].startswith("-40.0 (-")
    assert "Diffusion was shown to beat regression on this task" in out
    assert "Flow was shown to beat regression on this task" in out
    assert "Diffusion was shown not to beat mip by more than 5 points on this task" in out
    assert "over 3 training seeds" in out


@pytest.mark.parametrize(
    ("regression", "verdict"),
    [(60, "was shown to beat"), (100, "was shown not to beat regression by more than 5 points"), (98, "is open")],
)
def test_the_verdict_follows_from_the_outcomes(regression, verdict):
    request = compare.requested(["tasks=[planar]", "seeds=[0]", "objectives=[diffusion,regression]"])
    rows = [
        row
        for unit in compare.units_of(request)
        for row in compare.rows_of(trained(unit, diffusion=100, regression=regression))
    ]
    _, (sentence, scope) = compare.conclusion(rows)
    assert verdict in sentence
    assert "single checkpoints" in scope


def test_other_settings_keep_no_rows_and_get_folders_of_their_own(pretended, tmp_path):
    _, units = pretended("tasks=[planar]", "seeds=[0]", "train.steps=7", "episodes=3")
    assert len(units) == 4
    assert not (tmp_path / "rows").exists()
    assert (tmp_path / "outputs/bench/compare_train.steps-7_episodes-3.json").exists()
    plain, other = (
        compare.units_of(compare.requested(["tasks=[planar]", *more]))[0] for more in ([], ["denoiser=unet"])
    )
    assert plain.folder != other.folder
    assert plain.data == other.data
    assert compare.requested(["tasks=[planar]", "episodes=100", "ddim_steps=[1,2,4,8]"]).changes == []


def test_each_objective_is_trained_alike_and_only_diffusion_has_a_choice_of_solvers():
    units = compare.units_of(compare.requested(["tasks=[planar]", "denoiser.num_layers=1"]))
    assert [unit.name for unit in units[:5]] == [
        *(f"planar-{objective}-seed0" for objective in OBJECTIVES),
        "planar-diffusion-seed1",
    ]
    trainings = [{*unit.commands[0]} for unit in units]
    assert trainings[0] ^ trainings[1] == {
        *("objective=diffusion", "objective=flow"),
        *(f"output_dir={unit.folder}" for unit in units[:2]),
    }
    assert "denoiser.num_layers=1" in trainings[0]
    of_diffusion, *others = [unit.commands[1:] for unit in units[:4]]
    assert [[part for part in command if part.startswith(("sampler.", "ddim_steps="))] for command in of_diffusion] == [
        ["ddim_steps=[1,2,4,8]", "sampler.solver=ddim"],
        ["ddim_steps=[4,8]", "sampler.solver=dpmpp_2m"],
        [],
    ]
    folder = units[0].folder
    merged = f"merge=[{folder}/sweep_ddim,{folder}/sweep_dpmpp_2m]"
    assert of_diffusion[-1] == ["scripts.sweep", merged, f"output_dir={folder}/sweep"]
    assert all(f"output_dir={unit.folder}/sweep" in unit.commands[1] for unit in units[1:4])
    assert not any(part.startswith("sampler.") for commands in others for part in commands[0])


def test_cells_that_would_be_those_of_ddim_are_not_run_and_one_sentence_says_so(pretended):
    said = "dpmpp_2m with ddim_steps=[1,2] is ddim, to the bit: it has no cells of its own there"
    assert pretended("tasks=[planar]", "seeds=[0]")[0].splitlines().count(said) == 1
    assert "to the bit" not in pretended("tasks=[planar]", "seeds=[0]", "ddim_steps=[3,4]")[0]
    assert "to the bit" not in pretended("tasks=[planar]", "seeds=[0]", "objectives=[flow,regression]")[0]
    assert "to the bit" not in pretended("tasks=[planar]", "seeds=[0]", "solvers=[dpmpp_2m]")[0]
    alone = compare.units_of(compare.requested(["tasks=[planar]", "solvers=[dpmpp_2m]"]))[0]
    assert "ddim_steps=[1,2,4,8]" in alone.commands[1]
    few = compare.units_of(compare.requested(["tasks=[planar]", "ddim_steps=[1,2]"]))[0]
    assert few.commands[-1][1] == f"merge=[{few.folder}/sweep_ddim]"


def test_rows_that_were_kept_with_these_cells_go_on_beside_new_ones(pretended, tmp_path):
    before, _ = pretended("tasks=[planar]", "seeds=[0,1]")
    file = tmp_path / "rows/compare/planar-diffusion-seed0.json"
    content = json.loads(file.read_text())
    content["rows"].insert(2, {**content["rows"][0], "solver": "dpmpp_2m"})
    file.write_text(json.dumps(content))
    after, units = pretended("tasks=[planar]", "seeds=[0,1]")
    assert units == []
    assert [line for line in after.splitlines() if line.startswith("|") or "beat" in line] == [
        line for line in before.splitlines() if line.startswith("|") or "beat" in line
    ]


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_these_cells_are_those_of_ddim(beta_schedule, prediction_type):
    schedule = make_schedule(num_steps=100, beta_schedule=beta_schedule)
    same = []
    for ddim_steps in (1, 2, 3, 4, 8):
        given = (schedule, ddim_timesteps(100, ddim_steps), 0.0, prediction_type)
        ddim, multistep = ddim_coefficients(*given), dpmpp_2m_coefficients(*given)
        if torch.equal(multistep[:, :5], ddim) and not multistep[:, 5].any():
            same.append(ddim_steps)
    assert same == [steps for steps in (1, 2, 3, 4, 8) if takes_steps_of_ddim("dpmpp_2m", steps)]


def test_a_task_that_cannot_be_run_here_is_named_and_left_out(pretended, monkeypatch):
    out, units = pretended("tasks=[pusht,planar]", "seeds=[0]")
    assert "pusht is left out: it has no scripted expert: give its demonstrations as pusht=PATH" in out
    assert {name.split("-")[0] for name in units} == {"planar"}

    def without_metaworld(name, **settings):
        raise MissingExtraError("Meta-World is not installed; run: pip install 'ddim-policy[metaworld]'")

    monkeypatch.setattr(tasks, "make_env", without_metaworld)
    with pytest.raises(SystemExit, match=r"no task can be run here; reach-v3 is left out: Meta-World is not installed"):
        pretended("tasks=[reach-v3]")


def test_the_expert_of_a_task_collects_where_the_training_reads():
    soccer = task_named("soccer-v3")
    assert {"env=metaworld", "env.task=soccer-v3", "episodes=50", "output_dir=x"} <= {*soccer.collection(Path("x"))}
    assert soccer.dataset(Path("x")) == Path("x/metaworld-soccer-v3-v0")
    assert GIVEN == ("pusht",)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_tasks_of_the_table_are_there(name):
    """Where the package is installed; importing every simulator takes seconds."""
    reason = task_named(name).missing(Path(__file__))
    assert reason == "" or "pip install" in reason


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("tasks", "usage: python -m scripts.bench.compare"),
        ("tasks=[puhst]", "unknown task 'puhst' (did you mean 'pusht'?)"),
        ("tasks=[planar,planar]", "must be a list without repetitions"),
        ("objectives=[regresion]", "unknown objective 'regresion' (did you mean 'regression'?)"),
        ("solvers=[dpmpp2m]", "unknown solver of diffusion 'dpmpp2m' (did you mean 'dpmpp_2m'?)"),
        ("seeds=[a]", "seeds=[a] must be whole numbers from 0 on, such as seeds=[0,1,2]"),
        ("ddim_steps=[0]", "ddim_steps=[0] must be whole numbers from 1 on"),
        ("episodes=0", "episodes=0 must be a whole number from 1 on, such as episodes=100"),
        ("episodes=[1,2]", "episodes=[1,2] must be a whole number from 1 on, such as episodes=100"),
        ("epsiodes=3", "unknown setting 'epsiodes' (did you mean 'episodes'?)"),
        ("objective=flow", "objective is set by the comparison: give objectives=[...], and leave objective out"),
        ("dataset.path=x", "dataset.path is set by the comparison: give pusht=PATH"),
        ("pusht=nowhere", "pusht=nowhere does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(argument, reason, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare", *(["tasks=[pusht]"] if "pusht=" in argument else []), argument])
    with pytest.raises(SystemExit, match=re.escape(reason)):
        compare.main()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_from_demonstrations_to_the_verdict(bench, tmp_path):  # noqa: F811
    sizes = ["train.steps=5", "denoiser.hidden_size=16", "denoiser.num_layers=1", "episodes=3", "ddim_steps=[1,4]"]
    out = bench(compare, "tasks=[planar]", "seeds=[0,1]", *sizes)
    (report,) = (tmp_path / "outputs/bench").glob("compare_*.json")
    found = [(row["objective"], row["solver"], row["ddim_steps"]) for row in json.loads(report.read_text())]
    assert found == CELLS
    assert re.search(r"diffusion beats? regression|Diffusion was shown (not )?to beat regression", out)
    assert len([*(tmp_path / "outputs/compare").glob("*/**/seed_1/sweep/sweep.json")]) == 4
