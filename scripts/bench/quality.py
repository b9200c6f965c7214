"""Retrain a preset, roll it out on held-out episodes, and compare with the score that the preset states.

    python -m scripts.bench.quality pusht_state dataset.path=pusht_cchi_v7_replay.zarr.zip
    python -m scripts.bench.quality metaworld
    python -m scripts.bench.quality metaworld tasks=[assembly-v3,reach-v3] episodes=20 train.steps=500
    python -m scripts.bench.quality metaworld demonstrations=10
    python -m scripts.bench.quality metaworld demonstrations=10 tasks=[very_hard] train.rollout_every=500
    python -m scripts.bench.quality metaworld_image
    python -m scripts.bench.quality metaworld_tasks
    python -m scripts.bench.quality metaworld_mt50
    python -m scripts.bench.quality ocbench

A preset of recorded human demonstrations is trained with three seeds, which are one recipe: it reaches its score where
the interval over training seeds and episodes does. The others have scripted demonstrations, and `demonstrations` and
`episodes` are numbers per task. `metaworld` is trained on every task, `metaworld_image` on each of five,
`metaworld_tasks` once on ten tasks together, and `metaworld_mt50` once on all fifty; the report has the mean of each
difficulty too, and `tasks` may name one. Two columns follow DP3 (Ze et al. 2024) and its successors: `within_200` is
the success within 200 control steps, their time limit, in place of Meta-World's 500; with rollouts during training,
`best_five` is the mean of the five best of them. `ocbench` is trained on each of 27 tasks twice, on demonstrations
without mistakes and with them, and its rows say why a task fails.

The rows of a finished training of `ocbench`, `metaworld_image`, `metaworld_mt50`, and of `metaworld` with
`demonstrations=10`, are written to `docs/rows`; one whose file is there is not run again.

As many trainings as there are cores run side by side, with one thread each. Runs with other training settings or other
`demonstrations` get folders and a report of their own, and are not compared with the preset's score. The same command
resumes an interrupted benchmark.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hydra import compose, initialize_config_dir

from envs.errors import choose
from envs.metaworld_tasks import DIFFICULTIES, MT10, MT50
from policy.checkpoint import read_history
from policy.data.minari_writer import dataset_name
from policy.diffusion.sampler import Sampler
from policy.statistics.intervals import wilson_interval
from policy.statistics.recipes import recipe_interval
from policy.statistics.results import EpisodeResult, summarize
from scripts.bench import ocbench
from scripts.bench.arguments import given_settings, listed, refuse
from scripts.bench.finished import finished_rows, keep_rows, kept_folder
from scripts.bench.report import machine, write_report
from scripts.bench.trainings import Trained, Unit, file_name, run_units, train_and_sweep
from scripts.command import CONF

FOLDER = Path("outputs/quality")
SEEDS = (0, 1, 2)
DDIM_STEPS = [8, 1]
# Overrides of the benchmark itself; all others are passed to the training.
OWN = ("tasks", "seeds", "episodes", "demonstrations")
# Overrides that choose among tasks, or look at a training without changing it.
CHOICES = ("tasks", "train.rollout_every", "train.rollout_episodes")
# Overrides that do not make a run another training of the preset.
SAME = ("tasks", "train.rollout_every", "seeds", "episodes", "dataset.path")
# By preset, the overrides besides `CHOICES` of the runs whose rows are kept.
KEPT: dict[str, list[Mapping[str, str]]] = {
    "metaworld": [{"demonstrations": "10"}],
    "metaworld_image": [{}],
    "metaworld_mt50": [{}],
    "ocbench": [{}, {"train.precision": "bfloat16"}],
}
# The tasks of `metaworld_image`: two medium, two hard and one very hard.
IMAGE_TASKS = ("assembly-v3", "basketball-v3", "peg-insert-side-v3", "pick-place-v3", "stick-push-v3")
BEST_ROLLOUTS = 5
# The time limit of an episode of DP3 and its successors, in control steps; ours is Meta-World's own, 500.
SHORT_LIMIT = 200
# Columns beside our own success rate, as the literature reports it.
REPORTED = ("within_200", "best_five")
SUMMARY = ("episodes", "successes", "success_rate", "success_low", "success_high", "score_mean")

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """A preset whose trainings are of tasks with scripted demonstrations, not of training seeds.

    Attributes:
        env: settings of the environment besides its tasks.
        demonstrations: number of demonstrations of each task.
        episodes: number of held-out episodes of each task.
    """

    env: Mapping[str, str]
    demonstrations: int = 50
    episodes: int = 100

    @property
    def together(self) -> bool:
        """Whether one policy plays all tasks."""
        return self.env["name"] == "metaworld_tasks"


SCRIPTED = {
    "metaworld": Scripted(env={"name": "metaworld"}),
    "metaworld_image": Scripted(env={"name": "metaworld", "observation": "image"}),
    "metaworld_mt50": Scripted(env={"name": "metaworld_tasks"}, demonstrations=10, episodes=20),
    "metaworld_tasks": Scripted(env={"name": "metaworld_tasks"}),
    "ocbench": Scripted(env={"name": "ocbench"}, demonstrations=200),
}


def main() -> None:
    """Run the benchmark; exit with code 1 if the preset does not reach its score."""
    preset, overrides = _arguments(sys.argv[1:])
    promised = _promised(preset)
    ddim_steps = list(promised) or DDIM_STEPS
    units = _units(preset, overrides, ddim_steps)
    print(machine("gymnasium"))
    began = time.perf_counter()
    folder = rows_folder(preset, overrides)
    kept = {unit.name: rows for unit in units if (rows := finished_rows(folder, unit.name))}
    found = run_units([unit for unit in units if unit.name not in kept], preset, partial(_done, folder))
    kept |= {trained.unit.name: _rows(trained) for trained in found}
    rows = [row for unit in units for row in kept[unit.name]]
    changes = variant(overrides)
    binding = {} if changes else promised  # the preset states no score of another training
    seeds = [] if preset in SCRIPTED else found
    cells = [
        [row for row in rows if row["ddim_steps"] == k and row.get("mistakes") == mistakes]
        for mistakes in dict.fromkeys(row.get("mistakes") for row in rows)
        for k in ddim_steps
    ]
    totals = [
        total(cell, [one.results(k) for one in seeds], binding.get(k, {}))
        for cell in cells
        for k in [cell[0]["ddim_steps"]]
    ]
    difficulties = [row for cell in cells for row in by_difficulty(cell)]
    write_report("_".join(["quality", preset, *changes]), rows + difficulties + totals)
    print(f"{len(found)} trainings in {time.perf_counter() - began:.0f} s")
    if any(row.get("reached") is False for row in totals):
        sys.exit(f"{preset} does not reach the score that {_file(preset)} promises")


def _arguments(arguments: Sequence[str]) -> tuple[str, dict[str, str]]:
    presets = sorted(file.stem for file in _file("").parent.glob("*.yaml"))
    usage = f"quality {'|'.join(presets)}"
    if not arguments or arguments[0] not in presets:
        refuse(arguments, usage)
    return arguments[0], given_settings(arguments[1:], usage)


def _file(preset: str) -> Path:
    return CONF / "experiment" / f"{preset}.yaml"


def _promised(preset: str) -> dict[int, Row]:
    """The figures that the preset states, by `ddim_steps`; empty if it has no `expected`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", [f"experiment={preset}"])
    return {row["ddim_steps"]: dict(row) for row in composed.get("expected") or ()}


def variant(overrides: Mapping[str, str]) -> list[str]:
    """The overrides that change the preset's training, as names of files, sorted; empty for the preset itself.

    >>> variant({"dataset.path": "data/pusht.zarr.zip", "episodes": "20", "denoiser": "unet", "env.id": "a/B-v0"})
    ['denoiser-unet', 'env.id-a-B-v0']
    """
    return file_name({name: value for name, value in sorted(overrides.items()) if name not in SAME})


def rows_folder(preset: str, overrides: Mapping[str, str]) -> Path | None:
    """The folder in the repository with the rows of a run; None if they are not kept."""
    return kept_folder(preset, overrides, CHOICES, KEPT.get(preset, []))


def _units(preset: str, overrides: dict[str, str], ddim_steps: Sequence[int]) -> list[Unit]:
    own = {name: overrides[name] for name in OWN if name in overrides}
    if useless := own.keys() & ({"seeds"} if preset in SCRIPTED else {"tasks", "demonstrations"}):
        sys.exit(f"{preset} has no {', '.join(sorted(useless))}: leave {'it' if len(useless) == 1 else 'them'} out")
    training = [f"{name}={value}" for name, value in overrides.items() if name not in OWN]
    folder, collected = (FOLDER.joinpath(preset, *variant(given)) for given in (overrides, own))
    common: dict[str, Any] = {"training": training, "ddim_steps": ddim_steps}
    if preset in SCRIPTED:
        scripted = SCRIPTED[preset]
        tasks = _named(listed(own["tasks"])) if "tasks" in own else list(_tasks(preset))
        groups = [tasks] if scripted.together else [[task] for task in tasks]
        common |= {name: int(own.get(name, getattr(scripted, name))) for name in ("demonstrations", "episodes")}
        if preset == "ocbench":
            ocbench.check_tasks(tasks)
            # All tasks without mistakes come first: an interrupted benchmark is whole in one of its halves.
            return [
                ocbench.task_unit(task, mistakes, collected, folder, **common)
                for mistakes in (False, True)
                for task in tasks
            ]
        _check_tasks(tasks)
        return [_scripted(preset, group, collected, folder, **common) for group in groups]
    seeds = listed(own["seeds"]) if "seeds" in own else [str(seed) for seed in SEEDS]
    return [
        Unit(
            name=f"seed {seed}",
            folder=folder / f"seed_{seed}",
            commands=train_and_sweep(
                folder / f"seed_{seed}",
                [f"experiment={preset}", f"seed={seed}", *training],
                [f"episodes={own.get('episodes', '500')}"],
                ddim_steps,
            ),
        )
        for seed in seeds
    ]


def _tasks(preset: str) -> Sequence[str]:
    """All tasks that a preset can be trained on."""
    if preset == "ocbench":
        return ocbench.state_tasks()
    return {"metaworld_tasks": MT10, "metaworld_image": IMAGE_TASKS}.get(preset, MT50)


def _named(names: Sequence[str]) -> list[str]:
    """The tasks that the user names, singly or by their difficulty."""
    return list(dict.fromkeys(task for name in names for task in DIFFICULTIES.get(name, (name,))))


def _check_tasks(tasks: Sequence[str]) -> None:
    """Exit with one sentence if Meta-World has no such task."""
    try:
        for task in tasks:
            choose("Meta-World task or difficulty", task, [*DIFFICULTIES, *MT50])
    except ValueError as error:
        sys.exit(str(error))


def _scripted(
    preset: str,
    tasks: Sequence[str],
    collected: Path,
    folder: Path,
    *,
    demonstrations: int,
    episodes: int,
    training: Sequence[str],
    ddim_steps: Sequence[int],
) -> Unit:
    """The unit of one policy, trained on `demonstrations` scripted demonstrations of each of some Meta-World tasks."""
    together, settings = SCRIPTED[preset].together, SCRIPTED[preset].env
    # Other tasks need a folder of their own, and fifty names are too long for the name of a folder.
    name = f"{len(tasks)}-tasks-{zlib.crc32(','.join(tasks).encode()):08x}" if together else tasks[0]
    data = collected / name / "demonstrations" / dataset_name({**settings, **({} if together else {"task": tasks[0]})})
    collect = [
        "scripts.collect",
        f"env={settings['name']}",
        *(f"env.{key}={value}" for key, value in settings.items() if key != "name"),
        f"env.tasks=[{','.join(tasks)}]" if together else f"env.task={tasks[0]}",
        f"episodes={demonstrations * len(tasks)}",
        f"output_dir={data.parent}",
    ]
    return Unit(
        name=name,
        folder=folder / name,
        tasks=tasks if together else (),
        commands=[
            *([] if data.exists() else [collect]),
            *train_and_sweep(
                folder / name,
                [f"experiment={preset}", f"dataset.path={data}", *training],
                [f"episodes={episodes * len(tasks)}"],
                ddim_steps,
            ),
        ],
    )


def _done(folder: Path | None, trained: Trained) -> None:
    """Print the success of a training, and keep its rows where the preset has a folder for them."""
    rows = _rows(trained)
    rates = (f"{row['success_rate']:.0%} at {row['ddim_steps']}" for row in rows)
    print(f"{trained.unit.name}: {', '.join(rates)}", flush=True)
    keep_rows(folder, trained, rows)


def _rows(trained: Trained) -> list[Row]:
    """One row per cell of a sweep, or per cell and task if one policy played several tasks."""
    names = trained.unit.tasks or (trained.unit.name,)
    rows = []
    for cell in trained.swept["cells"]:
        episodes = trained.results_of(cell)
        for number, name in enumerate(names):
            results = [result for result in episodes if result.seed % len(names) == number]
            summary = summarize(results)
            shown = {key: summary[key] for key in SUMMARY}
            row = {"training": name, "ddim_steps": cell["ddim_steps"], **shown, "train_s": trained.train_s}
            if name in MT50:
                in_time = sum(result.success and result.steps <= SHORT_LIMIT for result in results)
                row["within_200"] = in_time / len(results)
            if cell["ddim_steps"] == Sampler().ddim_steps and not trained.unit.tasks:  # as in rollouts during training
                row |= best_rollouts(read_history(trained.unit.folder / "checkpoint"))
            rows.append(row | (ocbench.figures(trained, cell["ddim_steps"]) if trained.unit.data else {}))
    return rows


def best_rollouts(history: Sequence[Mapping[str, float]]) -> Row:
    """The mean success of the five best rollouts during a training; empty if it had none.

    Args:
        history: the metrics of the training.
    """
    rates = [entry["rollout/success_rate"] for entry in history if "rollout/success_rate" in entry]
    return {"rollouts": len(rates), "best_five": fmean(sorted(rates)[-BEST_ROLLOUTS:])} if rates else {}


def by_difficulty(rows: Sequence[Row]) -> list[Row]:
    """The mean of each difficulty of Meta-World's tasks, with the Wilson interval of all its episodes.

    Args:
        rows: one per task, all with the same `ddim_steps`; tasks of other families have no difficulty.
    """
    means = []
    for difficulty, tasks in DIFFICULTIES.items():
        if found := [row for row in rows if row["training"] in tasks]:
            mean = total(found, [], {}) | {"training": f"{difficulty}, {len(found)} of {len(tasks)} tasks"}
            mean["successes"] = sum(row["successes"] for row in found)
            mean["success_low"], mean["success_high"] = wilson_interval(mean["successes"], mean["episodes"])
            means.append(mean)
    return means


def total(rows: Sequence[Row], seeds: Sequence[Sequence[EpisodeResult]], promised: Mapping[str, float]) -> Row:
    """The mean over all trainings, and whether it reaches what the preset promises.

    Args:
        rows: one per training, or per task, all with the same `ddim_steps`.
        seeds: the episodes of each training seed of one recipe; fewer than two, or trainings of several tasks, have no
            interval over training seeds: they may fall short by two standard errors.
        promised: the figures that the preset states.
    """
    episodes = sum(row["episodes"] for row in rows)
    same: Row = {name: rows[0][name] for name in ("ddim_steps", "mistakes") if name in rows[0]}
    mean: Row = {"training": "mean", **same, "episodes": episodes}
    for name, of in (("success_rate", "success"), ("score_mean", "score")):
        values = [row[name] for row in rows]
        mean[name] = fmean(values)
        if len(seeds) > 1:
            low, high = recipe_interval([[getattr(result, of) for result in results] for results in seeds])
            mean |= {f"{of}_low": low, f"{of}_high": high}
        else:
            error = (stdev(values) ** 2 / len(values) if len(values) > 1 else 0.25 / episodes) ** 0.5
            high = mean[name] + 2 * error
        if name in promised:
            mean["reached"] = mean.get("reached", True) and high >= promised[name]
    return mean | {name: fmean(row[name] for row in rows) for name in REPORTED if all(name in row for row in rows)}


if __name__ == "__main__":
    main()
