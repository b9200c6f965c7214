"""OCBench's tasks in the benchmark of presets: their trainings, and why a task fails."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import h5py

from envs.errors import choose
from envs.ocbench import VERSION, ocbench_tasks, scene
from policy.checkpoint import read_history
from policy.data.minari_writer import dataset_name
from policy.statistics.results import EpisodeResult
from policy.training.recovery import HARDLY, recoveries_in
from policy.training.state import newest_metrics
from scripts.bench.trainings import Trained, Unit, train_and_sweep

# OCBench's own rates of mistakes, by scene. For switch it is the lowest: there, OCBench draws one for each episode.
MISTAKES = {"block": 0.1, "chamber": 0.2, "hanoi": 0.002, "switch": 0.2}
# The losses of a row, and their names in the history of a run.
LOSSES = {"train_loss": "train/loss", "val_loss": "val/loss"}
# A task that succeeds this often needs no explanation.
SOLVED = 0.9
# From these values on, a figure counts as a reason for failure.
OVER_FITTED, SHORT_OF_TIME, EXPERT_FAILS, DEAD_ENDS = 1.5, 0.7, 0.1, 0.3


def state_tasks() -> list[str]:
    """The 27 tasks that are observed from state."""
    return [task for task in ocbench_tasks() if not task.startswith("visual-")]


def check_tasks(tasks: Sequence[str]) -> None:
    """Exit with one sentence if a task does not exist or is not observed from state."""
    try:
        for task in tasks:
            choose("OCBench task", task, state_tasks())
    except ValueError as error:
        sys.exit(str(error))


def collection(task: str, p_mistake: float, episodes: int, data: Path) -> list[str]:
    """The command that collects the demonstrations of a task."""
    return [
        "scripts.collect",
        "env=ocbench",
        f"env.task={task}",
        f"env.p_mistake={p_mistake}",
        f"episodes={episodes}",
        f"output_dir={data.parent}",
    ]


def task_unit(
    task: str,
    mistakes: bool,
    collected: Path,
    folder: Path,
    *,
    demonstrations: int,
    episodes: int,
    training: Sequence[str],
    ddim_steps: Sequence[int],
) -> Unit:
    """The training of one task on demonstrations with or without mistakes.

    Args:
        task: a task that is observed from state.
        mistakes: whether the expert makes mistakes, at OCBench's own rate.
        collected: folder of the demonstrations of all tasks.
        folder: folder of the trainings of all tasks.
        demonstrations: number of demonstrations.
        episodes: number of held-out episodes.
        training: overrides of the training.
        ddim_steps: cells of the sweep.
    """
    name = f"{task}-mistakes" if mistakes else task
    p_mistake = MISTAKES[scene(task)] if mistakes else 0.0
    data = collected / name / "demonstrations" / dataset_name({"name": "ocbench", "task": task})
    return Unit(
        name=name,
        folder=folder / name,
        data=data,
        commands=[
            *([] if data.exists() else [collection(task, p_mistake, demonstrations, data)]),
            *train_and_sweep(
                folder / name,
                ["experiment=ocbench", f"dataset.path={data}", *training],
                [f"episodes={episodes}"],
                ddim_steps,
            ),
        ],
    )


def figures(trained: Trained, ddim_steps: int) -> dict[str, Any]:
    """What is known of a training besides its success, from which `why` follows.

    Args:
        trained: a unit of `task_unit`.
        ddim_steps: the cell whose episodes count.

    Returns:
        JSON data, with the reason for failure under `why`.
    """
    data, env = trained.unit.data, trained.swept["env"]
    assert data is not None
    history = read_history(trained.unit.folder / "checkpoint")
    newest, recovered = newest_metrics(history), recoveries_in(history)
    limit = gymnasium.spec(env["task"] + VERSION).max_episode_steps
    results = trained.results(ddim_steps)
    found = {
        "mistakes": env["p_mistake"] > 0,
        "p_mistake": env["p_mistake"],
        **demonstrated(data),
        "limit": limit,
        # With few demonstrations none is held out.
        **{name: newest.get(key, {}).get("value") for name, key in LOSSES.items()},
        "corrected": dict(recovered.numbers),
        "stalls": recovered.stalls,
        "dead_ends": sum(not result.success and result.steps < (limit or 0) for result in results),
    }
    return {**found, "why": why(found, results)}


def demonstrated(data: Path) -> dict[str, Any]:
    """Number and mean length of the demonstrations in a dataset of `ddim-collect` from seed 0, and failed attempts."""
    with h5py.File(data / "data/main_data.hdf5") as opened:
        about = [episode.attrs for episode in opened.values()]
        seeds, lengths = ([int(each[name]) for each in about] for name in ("seed", "total_steps"))
    return {
        "demonstrations": len(seeds),
        "mean_steps": sum(lengths) / len(lengths),
        "failed_attempts": max(seeds) + 1 - len(seeds),
    }


def why(found: Mapping[str, Any], results: Sequence[EpisodeResult]) -> str:
    """The reasons why a task fails that its figures show; empty for one that is solved.

    >>> failed = [EpisodeResult(seed=0, success=False, score=0.0, return_=0.0, steps=200)]
    >>> found = {"demonstrations": 200, "failed_attempts": 1, "mean_steps": 69.0, "limit": 200, "dead_ends": 0}
    >>> why({**found, "train_loss": 0.02, "val_loss": 0.05, "corrected": {}}, failed)
    'over-fitted: the loss on held-out demonstrations is 2.5 times that on training ones'
    >>> why({**found, "val_loss": None, "corrected": {"state[0]": 0.62, "state[5]": 0.03}}, failed)
    'hardly corrects an error of state[5]'
    """
    failures = sum(not result.success for result in results)
    if failures <= (1 - SOLVED) * len(results):
        return ""
    ratio = found["val_loss"] / found["train_loss"] if found["val_loss"] else 0.0
    attempts = found["demonstrations"] + found["failed_attempts"]
    share = found["mean_steps"] / found["limit"]
    hardly = [name for name, corrected in found["corrected"].items() if corrected < HARDLY]
    reasons = {
        f"over-fitted: the loss on held-out demonstrations is {ratio:.1f} times that on training ones": (
            ratio >= OVER_FITTED
        ),
        f"hardly corrects an error of {', '.join(hardly)}": bool(hardly),
        f"short of time: a demonstration takes {share:.0%} of the time limit": share >= SHORT_OF_TIME,
        f"hard for the expert too: {found['failed_attempts']} of its {attempts} attempts failed": (
            found["failed_attempts"] >= EXPERT_FAILS * attempts
        ),
        f"dead ends: {found['dead_ends']} of {failures} failures end in a state that cannot be solved": (
            found["dead_ends"] >= DEAD_ENDS * failures
        ),
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds) or "none of the known reasons"
