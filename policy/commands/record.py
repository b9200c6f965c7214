"""The record of a training run: its checkpoint folder, and what is written into `training.json` and `history.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy.checkpoint import is_checkpoint, keep_checkpoint, resume_training, save_checkpoint
from policy.checkpoint.files import CHECKPOINT
from policy.checkpoint.resuming import CHECKSUM
from policy.common.files import json_text, write_text
from policy.data.demonstrations import Augment, Demonstrations
from policy.diffusion.sampler import Sampler
from policy.training.settings import TrainSettings, learning_rate
from policy.training.state import TrainState, newest_metrics

# The file beside the checkpoint that holds the run's metrics, a line for each entry.
HISTORY = "history.jsonl"
# A checkpoint notes the names of up to so many tasks.
MAX_TASKS = 100


def newest_in(folder: Path) -> Path:
    """Where a run keeps its newest checkpoint."""
    return folder / CHECKPOINT


@dataclass(frozen=True, kw_only=True)
class Record:
    """The checkpoint folder of a run, and the data recorded in every checkpoint.

    Attributes:
        folder: the folder of the newest checkpoint.
        env: how to make the environment, or None.
        execution_horizon: recorded for rollouts.
        sampler: recorded for rollouts.
        training: how the policy is trained, JSON data.
        keep_last: see `TrainSettings`.
    """

    folder: Path
    env: dict[str, Any] | None
    execution_horizon: int
    sampler: Sampler
    training: dict[str, Any]
    keep_last: int

    def restore(self, state: TrainState) -> dict[str, Any] | None:
        """Restore the state from the checkpoint and return the settings that differed; None if there is none."""
        if not is_checkpoint(self.folder):
            return None
        rollouts = {"execution_horizon": self.execution_horizon, "sampler": self.sampler.given}
        return resume_training(self.folder, state, self.training, rollouts)

    def resume(self, state: TrainState, settings: TrainSettings) -> None:
        """Restore the state from the checkpoint, if there is one, and say so."""
        before = self.restore(state)
        if before is None:
            return
        print(f"going on at step {state.step} of {settings.all_steps}: {self.folder}")
        if "steps" in before and state.step < settings.all_steps:
            print(
                f"it was begun for {before['steps']} steps: from here the learning rate follows the schedule of"
                f" {settings.steps}, {learning_rate(state.step, settings):.2g} at this step"
            )
        if self.folder.exists():  # the run may have been killed after saving it and before keeping it
            self._keep(state)
        if before.keys() & {"execution_horizon", "sampler"}:
            self.save(state)  # a complete run saves nothing else
            chosen = f"execution_horizon={self.execution_horizon} {self.sampler.overrides}".rstrip()
            print(f"the checkpoint records other settings for rollouts from now on: {chosen}")

    def save(self, state: TrainState) -> None:
        """Write the newest checkpoint and the history, and update the last few and the best."""
        training = {**self.training, "measured": newest_metrics(state.history)}
        save_checkpoint(
            self.folder,
            state,
            env=self.env,
            execution_horizon=self.execution_horizon,
            sampler=self.sampler,
            training=training,
        )
        self._keep(state)

    def _keep(self, state: TrainState) -> None:
        write_text(self.folder.with_name(HISTORY), "".join(f"{json_text(entry)}\n" for entry in state.history))
        keep_checkpoint(self.folder, state, keep_last=self.keep_last)


def record_in(
    folder: Path,
    train: TrainSettings,
    *,
    env: dict[str, Any] | None,
    execution_horizon: int,
    sampler: Sampler,
    facts: Mapping[str, Any],
) -> Record:
    """Return the record of a run.

    Args:
        folder: of the run.
        train: settings of the training.
        env: how to make the environment, or None.
        execution_horizon: recorded for rollouts.
        sampler: recorded for rollouts.
        facts: what is recorded besides the settings, JSON data.
    """
    return Record(
        folder=newest_in(folder),
        env=env,
        execution_horizon=execution_horizon,
        sampler=sampler,
        training={
            # Left out: up to the first loss that is not finite, it has no effect, so a resumed run may change it.
            **{key: value for key, value in vars(train).items() if key != "on_bad_loss"},
            **facts,
        },
        keep_last=train.keep_last,
    )


def facts_of(
    dataset: Demonstrations, *, seed: int, rate: float | None, tasks: Any, augment: Augment | None
) -> dict[str, Any]:
    """Return what every checkpoint notes of its demonstrations.

    Args:
        dataset: the demonstrations.
        seed: of the run.
        rate: control steps a second, if known.
        tasks: names of tasks, or whatever a simulator calls so.
        augment: the symmetry that doubles the demonstrations, or None.
    """
    return {
        "seed": seed,
        "dataset": [*dataset.joined_from] or dataset.source,
        "episodes": dataset.num_episodes,
        "transitions": len(dataset.actions),
        **data_facts(dataset),
        "dataset.decode": "stream" if dataset.frames else "cache",  # the order of the windows depends on it
        "rate_hz": rate,
        "tasks": _names(tasks),
        "augment": augment and getattr(augment, "func", augment).__name__,
    }


def data_facts(dataset: Demonstrations) -> dict[str, Any]:
    """Return what tells demonstrations from others that are as many and as long.

    Args:
        dataset: the demonstrations.

    Returns:
        The settings that chose what was read of the files, by the names that a user gives them, and a checksum.
    """
    return {
        **{f"dataset.{name}": value for name, value in dataset.read_with.items()},
        CHECKSUM: dataset.checksum(),
    }


def _names(tasks: Any) -> list[str] | None:
    """Tasks as a checkpoint notes them; None for what a simulator calls so without meaning a list of names."""
    listed = isinstance(tasks, list | tuple) and 0 < len(tasks) <= MAX_TASKS
    return [*tasks] if listed and all(isinstance(task, str) for task in tasks) else None
