"""The tasks of the comparison of objectives: their environments, their trainings and their demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.errors import MissingExtraError
from policy.common.arguments import unknown_name
from policy.data.minari_writer import dataset_name
from scripts.environments import make_env

# Push-T, the five Meta-World tasks that the preset solves least often, Fetch, and one cube of OCBench.
TASKS = (
    "pusht",
    *("box-close-v3", "soccer-v3", "basketball-v3", "disassemble-v3", "stick-pull-v3"),
    "fetch",
    "block-cpu-lite-single-task1",
)
STEPS = 4_000
# What benchmarks of Push-T change in the preset: no copies of its demonstrations, which take a longer training; chunks
# from whole noise, because not every objective has a scale of it; and eight actions a plan.
SIMPLE_PUSHT = (
    "dataset.relabel._target_=envs.pusht_hindsight",
    "sampler.noise_scale=1",
    "execution_horizon=8",
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task.

    Attributes:
        name: distinguishes it from the others.
        env: settings of its environment.
        training: overrides of `scripts.train`.
        demonstrations: number of demonstrations that the scripted expert gives; None where there is no expert.
    """

    name: str
    env: Mapping[str, Any]
    training: tuple[str, ...]
    demonstrations: int | None = None

    def dataset(self, folder: Path) -> Path:
        """Where the expert's demonstrations are, in a folder of those of all tasks."""
        return folder / dataset_name(self.env)

    def collection(self, folder: Path) -> list[str]:
        """The command that collects the expert's demonstrations in that folder."""
        name, settings = self.env["name"], {key: value for key, value in self.env.items() if key != "name"}
        return [
            "scripts.collect",
            f"env={name}",
            *(f"env.{key}={value}" for key, value in settings.items()),
            f"episodes={self.demonstrations}",
            f"output_dir={folder}",
        ]

    def missing(self, given: Path | None) -> str:
        """Say what the task cannot do without here; empty if nothing is missing.

        Args:
            given: the user's demonstrations of the task.

        Raises:
            ValueError: there is no such task, or nothing at that path.
        """
        if given is not None and not given.exists():
            raise ValueError(f"{self.name}={given} does not exist: it must be the path of the task's demonstrations")
        if given is None and self.demonstrations is None:
            return f"it has no scripted expert: give its demonstrations as {self.name}=PATH"
        try:
            make_env(**self.env).close()
        except MissingExtraError as error:
            return str(error)
        return ""


def task_named(name: str) -> Task:
    """The task of this name: one of `TASKS`, `planar`, or any of Meta-World or OCBench that is observed from state.

    Raises:
        ValueError: the name is of no such kind; `Task.missing` finds out whether Meta-World and OCBench have the task.
    """
    if name == "pusht":  # rectified and in batches of 256, the preset takes 40 minutes
        budget = (f"train.steps={STEPS}", "train.rectify_steps=0", "train.batch_size=128")
        return Task(name=name, env={"name": "pusht"}, training=("experiment=pusht_state", *SIMPLE_PUSHT, *budget))
    if name == "fetch":
        env = {"name": "gym", "id": "FetchPickAndPlace-v4"}
        chosen = ("env=fetch", f"env.id={env['id']}")
        return Task(name=name, env=env, training=(*chosen, f"train.steps={STEPS}"), demonstrations=50)
    if name == "planar":
        return Task(name=name, env={"name": "planar"}, training=("experiment=planar",), demonstrations=100)
    if name.endswith("-v3"):
        training = ("experiment=metaworld", f"train.steps={STEPS}")
        return Task(name=name, env={"name": "metaworld", "task": name}, training=training, demonstrations=50)
    if "-cpu-lite-" in name and not name.startswith("visual-"):
        training = ("experiment=ocbench", f"train.steps={STEPS}")
        return Task(name=name, env={"name": "ocbench", "task": name}, training=training, demonstrations=200)
    raise unknown_name("task", name, [*TASKS, "planar"])


# The tasks without a scripted expert, whose demonstrations the user gives.
GIVEN = tuple(name for name in TASKS if task_named(name).demonstrations is None)
