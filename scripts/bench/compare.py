"""Does diffusion pay, and how many steps does it need? Objective x solver x steps on several tasks, paired.

    python -m scripts.bench.compare
    python -m scripts.bench.compare pusht=pusht_cchi_v7_replay.zarr.zip tasks=[pusht,box-close-v3] seeds=[0]
    python -m scripts.bench.compare tasks=[planar] objectives=[diffusion,regression] ddim_steps=[1,2] episodes=20

On each task, each objective is trained with three training seeds, from the task's preset with 4,000 steps at most, and
rolled out on the same 100 held-out episodes in a cell for each solver and number of steps that it has; a solver has no
cell where it is `ddim`. The training seeds of an objective are one recipe, and the report says whether sampling was
shown to beat each control. A task whose package or demonstrations are missing is left out; those of Meta-World, OCBench
and the planar task are collected.

All tasks and objectives of one training seed come before the next seed: an interrupted comparison is a whole one of
fewer seeds. The rows of a finished training are written to `docs/rows/compare`, unless a setting of trainings or
episodes differs; one whose file is there is not run again. Other settings are passed to all trainings. The same command
resumes an interrupted comparison.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from policy.common.arguments import check_choice, unknown_name
from policy.diffusion.coefficients import SOLVERS, takes_steps_of_ddim
from policy.diffusion.objective import DEFAULT_OBJECTIVE, OBJECTIVES, check_objective
from policy.statistics.intervals import wilson_interval
from policy.statistics.recipes import recipe_interval
from policy.sweep.comparison import Comparison
from policy.sweep.controls import against_controls
from policy.sweep.grid import repeats
from policy.sweep.recipes import scope_of
from scripts.bench.arguments import given_settings, listed
from scripts.bench.finished import FINISHED, finished_rows, write_rows
from scripts.bench.report import machine, write_report
from scripts.bench.tasks import GIVEN, TASKS, Task, task_named
from scripts.bench.trainings import (
    Trained,
    Unit,
    collect_missing,
    file_name,
    run_units,
    sweep_command,
    train_command,
)
from scripts.settings import GROUPS
from scripts.train import TASK as TRAIN

FOLDER = Path("outputs/compare")
DEMONSTRATIONS = FOLDER / "demonstrations"
DEFAULTS = {
    "tasks": ",".join(TASKS),
    "objectives": ",".join(OBJECTIVES),
    "solvers": "ddim,dpmpp_2m",
    "ddim_steps": "1,2,4,8",
    "seeds": "0,1,2",
    "episodes": "100",
}
# Overrides that choose among trainings without changing one.
CHOICES = {"tasks", "objectives", "seeds", *GIVEN}
# Settings of trainings that the comparison sets itself, and what to give instead.
OWN_SETTINGS = {
    "experiment": "tasks=[...]",
    "env": "tasks=[...]",
    "dataset": "pusht=PATH",
    "objective": "objectives=[...]",
    "seed": "seeds=[...]",
    "output_dir": "no folder, it is outputs/compare",
}
MARGIN = 0.05
ONE_SEED = "These are intervals of single checkpoints: seeds=[0,1,2] takes in what another training seed would change."

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a comparison is asked for.

    Attributes:
        tasks: the tasks.
        objectives: names of objectives.
        solvers: solvers of diffusion.
        ddim_steps: numbers of steps of the objectives that have a choice.
        seeds: training seeds.
        episodes: number of held-out episodes.
        demonstrations: those that the user gives, by the name of the task.
        training: overrides of all trainings.
        changes: what distinguishes it from the comparison whose rows are kept, as names of files.
    """

    tasks: Sequence[Task]
    objectives: Sequence[str]
    solvers: Sequence[str]
    ddim_steps: Sequence[int]
    seeds: Sequence[int]
    episodes: int
    demonstrations: Mapping[str, Path]
    training: Mapping[str, str]
    changes: Sequence[str]


def main() -> None:
    """Run the comparison."""
    try:
        request = requested(sys.argv[1:])
        units = units_of(request)
    except ValueError as error:
        sys.exit(str(error))
    print(machine("gymnasium"))
    for sentence in _same_cells(request):
        print(sentence)
    began = time.perf_counter()
    folder = None if request.changes else FINISHED / "compare"
    kept = {unit.name: rows for unit in units if (rows := _kept(folder, unit.name))}
    missing = [unit for unit in units if unit.name not in kept]
    _collect(request, missing)
    found = run_units(missing, "compare", partial(_done, folder))
    kept |= {trained.unit.name: rows_of(trained) for trained in found}
    concluded = [
        conclusion([row for unit in units if unit.tasks == (task.name,) for row in kept[unit.name]])
        for task in request.tasks
    ]
    write_report("_".join(["compare", *request.changes]), [row for rows, _ in concluded for row in rows])
    for task, (_, sentences) in zip(request.tasks, concluded, strict=True):
        print(f"{task.name}: {' '.join(sentences)}")
    print(f"{len(missing)} trainings in {time.perf_counter() - began:.0f} s")


def requested(arguments: Sequence[str]) -> Request:
    """Read the command line, and print a sentence about each task that is left out.

    Raises:
        ValueError: a setting that does not fit, or no task that can be run here.
    """
    given = given_settings(arguments, "compare")
    training = {name: value for name, value in given.items() if name not in CHOICES | DEFAULTS.keys()}
    _check_training(training)
    objectives, solvers = _items("objectives", given), _items("solvers", given)
    for objective in objectives:
        check_objective(objective)
    for solver in solvers:
        check_choice("solver of diffusion", solver, SOLVERS)
    demonstrations = {name: Path(given[name]).expanduser() for name in GIVEN if name in given}
    request = Request(
        tasks=[task_named(name) for name in _items("tasks", given)],
        objectives=objectives,
        solvers=solvers,
        ddim_steps=_numbers("ddim_steps", given, least=1),
        seeds=_numbers("seeds", given, least=0),
        episodes=_number("episodes", given),
        demonstrations=demonstrations,
        training=training,
        changes=file_name({name: value for name, value in given.items() if _is_change(name, value)}),
    )
    return _possible(request)


def _is_change(name: str, value: str) -> bool:
    """Whether an override makes the comparison another one than that whose rows are kept."""
    return name not in CHOICES and listed(value) != listed(DEFAULTS.get(name, ""))


def _items(name: str, given: Mapping[str, str]) -> list[str]:
    names = listed(given.get(name, DEFAULTS[name]))
    if not all(names) or len({*names}) < len(names):
        raise ValueError(f"{name}={given[name]} must be a list without repetitions, such as {name}=[{DEFAULTS[name]}]")
    return names


def _numbers(name: str, given: Mapping[str, str], least: int) -> list[int]:
    texts = _items(name, given)
    if not all(text.isdecimal() and int(text) >= least for text in texts):
        raise ValueError(
            f"{name}={given[name]} must be whole numbers from {least} on, such as {name}=[{DEFAULTS[name]}]"
        )
    return [int(text) for text in texts]


def _number(name: str, given: Mapping[str, str]) -> int:
    text = given.get(name, DEFAULTS[name])
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name}={text} must be a whole number from 1 on, such as {name}={DEFAULTS[name]}")
    return int(text)


def _check_training(training: Mapping[str, str]) -> None:
    """Reject overrides that training does not know, or that the comparison itself sets; hours later would be too late.

    Raises:
        ValueError: such an override.
    """
    settings = {*GROUPS, *TRAIN.parameters} - OWN_SETTINGS.keys()
    for name in training:
        first = name.split(".")[0]
        if first in OWN_SETTINGS:
            raise ValueError(f"{name} is set by the comparison: give {OWN_SETTINGS[first]}, and leave {name} out")
        if first not in settings:
            raise unknown_name("setting", name, settings | CHOICES | DEFAULTS.keys())


def _possible(request: Request) -> Request:
    """Leave out the tasks whose package or demonstrations are missing, with a sentence each.

    Raises:
        ValueError: none is left, or one does not exist.
    """
    reasons = {task.name: task.missing(request.demonstrations.get(task.name)) for task in request.tasks}
    said = [f"{name} is left out: {reason}" for name, reason in reasons.items() if reason]
    if all(reasons.values()):
        raise ValueError("; ".join(["no task can be run here", *said]))
    for sentence in said:
        print(sentence)
    return dataclasses.replace(request, tasks=[task for task in request.tasks if not reasons[task.name]])


def units_of(request: Request) -> list[Unit]:
    """The trainings of each task and objective, one training seed after the other."""
    return [
        _unit(request, task, objective, seed)
        for seed, task, objective in itertools.product(request.seeds, request.tasks, request.objectives)
    ]


def _unit(request: Request, task: Task, objective: str, seed: int) -> Unit:
    folder = FOLDER.joinpath(*request.changes, task.name, objective, f"seed_{seed}")
    data = request.demonstrations.get(task.name, task.dataset(DEMONSTRATIONS))
    overrides = [f"{name}={value}" for name, value in request.training.items()]
    training = [*task.training, f"objective={objective}", f"seed={seed}", f"dataset.path={data}", *overrides]
    return Unit(
        name=f"{task.name}-{objective}-seed{seed}",
        folder=folder,
        tasks=(task.name,),
        data=data,
        commands=[train_command(folder, training), *_sweeps(request, objective, folder)],
    )


def _sweeps(request: Request, objective: str, folder: Path) -> list[list[str]]:
    """The commands that roll a policy out; diffusion has a sweep for each solver, and then all of them as one."""
    settings = [f"episodes={request.episodes}"]
    if objective != DEFAULT_OBJECTIVE:
        return [sweep_command(folder, "sweep", settings, request.ddim_steps)]
    own = {solver: steps for solver in request.solvers if (steps := _own_steps(request, solver))}
    sweeps = [
        sweep_command(folder, f"sweep_{solver}", [*settings, f"sampler.solver={solver}"], steps)
        for solver, steps in own.items()
    ]
    parts = ",".join(f"{folder}/sweep_{solver}" for solver in own)
    return [*sweeps, ["scripts.sweep", f"merge=[{parts}]", f"output_dir={folder}/sweep"]]


def _own_steps(request: Request, solver: str) -> list[int]:
    """The numbers of steps at which a solver of diffusion has a cell: not where it would be that of `ddim` again."""
    return [
        steps for steps in request.ddim_steps if "ddim" not in request.solvers or not takes_steps_of_ddim(solver, steps)
    ]


def _same_cells(request: Request) -> list[str]:
    """Say which solvers have no cell of their own at which numbers of steps."""
    return repeats(request.ddim_steps, request.solvers if DEFAULT_OBJECTIVE in request.objectives else (), ())


def _collect(request: Request, units: Sequence[Unit]) -> None:
    """Collect the demonstrations that the trainings need and the user does not give."""
    needed = [task for task in request.tasks if any(unit.tasks == (task.name,) for unit in units)]
    own = [task for task in needed if task.name not in request.demonstrations]
    collect_missing({task.dataset(DEMONSTRATIONS): task.collection(DEMONSTRATIONS) for task in own})


def _done(folder: Path | None, trained: Trained) -> None:
    """Print the success of a training, and keep its rows where they are kept."""
    rows = rows_of(trained)
    rates = (f"{row['success_rate']:.0%} at {row['ddim_steps']} ({row['solver']})" for row in rows)
    print(f"{trained.unit.name}: {', '.join(rates)}, trained in {trained.train_s:.0f} s", flush=True)
    write_rows(folder, trained.unit.name, rows)


def _kept(folder: Path | None, name: str) -> list[Row]:
    """The kept rows of a finished training, without the cells that are those of `ddim` again, which old files have."""
    return [row for row in finished_rows(folder, name) if not takes_steps_of_ddim(row["solver"], row["ddim_steps"])]


def rows_of(trained: Trained) -> list[Row]:
    """One row per cell of a training's sweep, with the outcomes from which cells are compared."""
    task, objective, seed = trained.unit.name.rsplit("-", 2)
    rows = []
    for cell in trained.swept["cells"]:
        results = trained.results_of(cell)
        rows.append(
            {
                "task": task,
                "objective": objective,
                "solver": cell.get("solver", "ddim"),  # a column that sweeps have where a cell has another one
                "ddim_steps": cell["ddim_steps"],
                "seed": int(seed.removeprefix("seed")),
                **{name: cell[name] for name in ("episodes", "success_rate", "score_mean", "multiply_adds")},
                "train_s": trained.train_s,
                "first_episode": min(result.seed for result in results),
                "solved_seeds": sorted(result.seed for result in results if result.success),
            }
        )
    return rows


def conclusion(rows: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """Compare the cells of a task.

    Args:
        rows: those of `rows_of` for all its objectives, each with the same training seeds and episodes.

    Returns:
        A row of the table for each cell, and the sentences on whether sampling was shown to beat each control, and on
        what their intervals hold.
    """
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["objective"], row["solver"], row["ddim_steps"]), []).append(row)
    success = [np.array([_outcomes(row) for row in trained]) for trained in cells.values()]
    named = [
        {
            "cell": f"{objective}, {solver}, {steps}",
            "checkpoint": objective,
            "objective": objective,
            "solver": solver,
            "ddim_steps": steps,
            "training_seeds": len(solved),
        }
        for (objective, solver, steps), solved in zip(cells, success, strict=True)
    ]
    compared = Comparison(rows=named, success=[solved.ravel().tolist() for solved in success], paired=True)
    best = max(range(len(success)), key=lambda number: success[number].mean())
    shown = []
    for number, (row, solved, pair) in enumerate(zip(named, success, compared.with_best(best), strict=True)):
        points = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * end for end in (pair.difference, pair.low, pair.high)))
        shown.append(
            {
                "task": rows[0]["task"],
                **{name: row[name] for name in ("objective", "solver", "ddim_steps")},
                "success (95 %)": "{:.0f} % ({:.0f} to {:.0f})".format(*(100 * end for end in _rate(solved))),
                "by training seed": ", ".join(f"{100 * rate:.0f}" for rate in solved.mean(axis=1)),
                "difference to the best, points": "the best" if number == best else points,
            }
        )
    verdicts = against_controls(named, success, MARGIN, paired=True)
    return shown, [*(verdict["sentence"] for verdict in verdicts), scope_of(named) if len(success[0]) > 1 else ONE_SEED]


def _outcomes(row: Row) -> list[bool]:
    solved = {*row["solved_seeds"]}
    return [row["first_episode"] + number in solved for number in range(row["episodes"])]


def _rate(solved: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """The success rate over (S, N) outcomes, with its interval: that of the recipe where there are several seeds."""
    low, high = recipe_interval(solved) if len(solved) > 1 else wilson_interval(int(solved.sum()), solved.size)
    return float(solved.mean()), low, high


if __name__ == "__main__":
    main()
