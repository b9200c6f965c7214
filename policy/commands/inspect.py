"""`ddim-inspect`: figures, window times and a picture of demonstrations; or what a checkpoint is and was trained on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from policy.checkpoint import describe_checkpoint, load_checkpoint, only_of_the_user
from policy.common.files import json_text, write_text
from policy.common.next_line import next_line
from policy.common.output import output_folder
from policy.control.timeline import EXECUTION_HORIZON, check_execution_horizon
from policy.data.demonstrations import Demonstrations
from policy.inspection.figures import inspect_dataset, spread
from policy.inspection.picture import plot_episodes
from policy.inspection.text import format_inspection
from policy.model.config import PolicySettings


def inspect(
    *,
    dataset: Demonstrations | None = None,
    checkpoint: Path | None = None,
    obs_horizon: int = PolicySettings.obs_horizon,
    action_horizon: int = PolicySettings.action_horizon,
    execution_horizon: int = EXECUTION_HORIZON,
    episodes: int = 4,
    dimensions: int = 32,
    output_dir: Path | None = None,
) -> None:
    """Show what is inside a dataset (episodes, keys, a training window, a picture) or, with checkpoint=, a policy.

    Args:
        dataset: the demonstrations.
        checkpoint: instead of a dataset, the folder that training wrote; the settings below are for datasets.
        obs_horizon: observations that the policy looks back on.
        action_horizon: actions in one chunk.
        execution_horizon: actions executed before the next plan.
        episodes: number of episodes in the picture, evenly spread over the dataset.
        dimensions: vectors up to this width are printed with a row for each dimension.
        output_dir: receives `inspect.json` and `inspect.png`; by default a new folder under outputs/inspect.

    Raises:
        ValueError: settings out of range, values that are not finite, or not just one thing to inspect.
    """
    if (dataset is None) == (checkpoint is None):
        raise ValueError("inspect shows a dataset (dataset.path=...) or a policy (checkpoint=...): give one of the two")
    if checkpoint is not None:
        _inspect_checkpoint(checkpoint)
        return
    assert dataset is not None
    for name, value in (("obs_horizon", obs_horizon), ("action_horizon", action_horizon), ("episodes", episodes)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more; got {value}")
    check_execution_horizon(execution_horizon, action_horizon)
    inspection = inspect_dataset(
        dataset, obs_horizon=obs_horizon, action_horizon=action_horizon, execution_horizon=execution_horizon
    )
    folder = output_folder(output_dir, "inspect")
    write_text(folder / "inspect.json", json_text(asdict(inspection), indent=1))
    print(format_inspection(inspection, dimensions))
    plot_episodes(dataset, inspection, spread(dataset.num_episodes, episodes), folder / "inspect.png")
    print(f"\nfiles: {folder / 'inspect.json'}, {folder / 'inspect.png'}")


def _inspect_checkpoint(folder: Path) -> None:
    loaded = load_checkpoint(folder)
    for name, text in describe_checkpoint(loaded).items():
        print(f"{name:<12} {text}")
    command = "ddim-rollout" if loaded.env else "ddim-export"
    print(next_line(command, checkpoint=folder, env=only_of_the_user(loaded.env or {})))
