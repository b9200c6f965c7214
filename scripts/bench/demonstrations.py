"""Success against the number of demonstrations, of diffusion and of plain regression on the same files.

    python -m scripts.bench.demonstrations
    python -m scripts.bench.demonstrations tasks=[block-cpu-lite-single-task1] counts=[5,10] episodes=4 train.steps=50

Five OCBench tasks are trained on the first 100, 200, 500, 1,000 and 2,000 scripted demonstrations of one file each, by
the preset `ocbench` and by the same with `objective=regression`, and rolled out on the same held-out episodes. All
tasks and both models of one number come before the next number: an interrupted benchmark is a fair one of fewer
demonstrations. The rows of a finished training are written to `docs/rows/demonstrations`, unless a setting other than
`train.precision=bfloat16`, and with it `seed=1` or `seed=2`, is given; one whose file is there is not run again. Other
settings are passed to all trainings. The same command resumes an interrupted benchmark.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from policy.data.minari_writer import dataset_name
from policy.statistics.results import summarize
from scripts.bench.arguments import given_settings, listed
from scripts.bench.finished import finished_rows, keep_rows, kept_folder
from scripts.bench.ocbench import check_tasks, collection
from scripts.bench.report import machine, write_report
from scripts.bench.trainings import Trained, Unit, collect_missing, file_name, run_units, train_and_sweep

FOLDER = Path("outputs/demonstrations_curve")
TASKS = (
    "block-cpu-lite-single-task1",
    "chamber-cpu-lite-easy-task1",
    "hanoi-cpu-lite-single-task1",
    "switch-cpu-lite-3x3-task1",
    "block-cpu-lite-double-task1",
)
COUNTS = (100, 200, 500, 1_000, 2_000)
# Values of `ddim_steps` for each objective; regression has one call.
MODELS = {"diffusion": (8, 1), "regression": (1,)}
OWN = ("tasks", "counts", "episodes")
# Settings that choose among the trainings.
CHOICES = ("tasks", "counts")
# The other settings of runs whose rows are kept.
KEPT: list[Mapping[str, str]] = [
    {},
    {"train.precision": "bfloat16"},
    *({"train.precision": "bfloat16", "seed": seed} for seed in ("1", "2")),
]
SUMMARY = ("episodes", "successes", "success_rate", "success_low", "success_high")


def main() -> None:
    """Run the benchmark."""
    given = given_settings(sys.argv[1:], "demonstrations")
    tasks = list(dict.fromkeys(listed(given.get("tasks", ",".join(TASKS)))))
    texts = listed(given["counts"]) if "counts" in given else list(map(str, COUNTS))
    if not all(text.isdecimal() and int(text) for text in texts):
        sys.exit(f"counts={given['counts']} must be numbers of demonstrations, such as counts=[100,200]")
    counts = list(dict.fromkeys(map(int, texts)))
    check_tasks(tasks)
    print(machine("gymnasium"))
    began = time.perf_counter()
    folder = rows_folder(given)
    units = units_of(tasks, counts, given)
    kept = {unit.name: rows for unit in units if (rows := finished_rows(folder, unit.name))}
    missing = [unit for unit in units if unit.name not in kept]
    collect_missing(
        {unit.data: collection(unit.tasks[0], 0.0, max(counts), unit.data) for unit in missing if unit.data is not None}
    )
    found = run_units(missing, "demonstrations", partial(_done, folder))
    kept |= {trained.unit.name: rows_of(trained) for trained in found}
    changes = file_name({name: value for name, value in given.items() if name not in OWN})
    write_report("_".join(["demonstrations", *changes]), [row for unit in units for row in kept[unit.name]])
    print(f"{len(missing)} trainings in {time.perf_counter() - began:.0f} s")


def rows_folder(given: Mapping[str, str]) -> Path | None:
    """The folder in the repository with the rows of a run; None if they are not kept."""
    return kept_folder("demonstrations", given, CHOICES, KEPT)


def units_of(tasks: list[str], counts: list[int], given: Mapping[str, str]) -> list[Unit]:
    """The trainings of each task and model on each number of demonstrations.

    Args:
        tasks: OCBench's names.
        counts: numbers of demonstrations.
        given: overrides; those that are not the benchmark's own are passed to the trainings.
    """
    training = [f"{name}={value}" for name, value in given.items() if name not in OWN]
    changes = file_name({name: value for name, value in given.items() if name not in CHOICES})
    # Named by its size: a file that was collected for fewer demonstrations would be taken for one of as many.
    collected, episodes = FOLDER / "data" / str(max(counts)), given.get("episodes", "100")
    return [
        _unit(task, model, count, FOLDER.joinpath(*changes), collected, training, episodes)
        for count in sorted(counts)
        for task in tasks
        for model in MODELS
    ]


def _unit(task: str, model: str, count: int, root: Path, collected: Path, training: list[str], episodes: str) -> Unit:
    name = f"{task}-{model}-{count}"
    data = collected / dataset_name({"name": "ocbench", "task": task})
    return Unit(
        name=name,
        folder=root / name,
        tasks=(task,),
        data=data,
        commands=train_and_sweep(
            root / name,
            [
                *("experiment=ocbench", f"objective={model}"),
                *(f"dataset.path={data}", f"dataset.max_episodes={count}", *training),
            ],
            [f"episodes={episodes}"],
            MODELS[model],
        ),
    )


def _done(folder: Path | None, trained: Trained) -> None:
    rows = rows_of(trained)
    rates = (f"{row['success_rate']:.0%} at {row['ddim_steps']}" for row in rows)
    print(f"{trained.unit.name}: {', '.join(rates)}", flush=True)
    keep_rows(folder, trained, rows)


def rows_of(trained: Trained) -> list[dict[str, Any]]:
    """One row per cell of a training's sweep."""
    task, model, count = trained.unit.name.rsplit("-", 2)
    rows = []
    for cell in trained.swept["cells"]:
        summary = summarize(trained.results_of(cell))
        row = {"task": task, "model": model, "demonstrations": int(count), "ddim_steps": cell["ddim_steps"]}
        rows.append(row | {name: summary[name] for name in SUMMARY} | {"train_s": trained.train_s})
    return rows


if __name__ == "__main__":
    main()
