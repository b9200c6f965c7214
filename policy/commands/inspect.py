"""`ddim-inspect`: what is inside demonstrations, what a checkpoint is, or, given both, the errors of its chunks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from policy.checkpoint import (
    Checkpoint,
    describe_checkpoint,
    digest_of,
    load_checkpoint,
    next_use,
    read_history,
)
from policy.checkpoint.resuming import CHECKSUM, describe_before
from policy.commands.record import data_facts
from policy.common.files import as_json, json_text, write_text
from policy.common.output import output_folder
from policy.common.terminal import printable
from policy.control.timeline import EXECUTION_HORIZON, check_execution_horizon
from policy.data.demonstrations import Demonstrations
from policy.inspection.error_picture import describe_by_distance, plot_errors
from policy.inspection.figures import inspect_dataset, spread
from policy.inspection.picture import plot_episodes
from policy.inspection.text import format_inspection
from policy.model.config import PolicySettings
from policy.statistics.fit import TRAINING, conclude
from policy.training.action_weights import spread_matters
from policy.training.by_heart import describe_by_heart, known_by_heart
from policy.training.errors import ErrorMeter, Measurement
from policy.training.preparation import split_windows
from policy.training.recovery import Recoveries, RecoveryMeter, describe_recoveries
from policy.training.start import fitting

# What a checkpoint notes of its training that says which episodes were held out.
SPLIT = {"episodes": int, "transitions": int, "val_fraction": int | float, "mask_padding": bool, "seed": int}


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

    With both, the errors of the policy's chunks are measured again, on the training and the held-out episodes of the
    data that it was trained on.

    Args:
        dataset: the demonstrations.
        checkpoint: the folder that training wrote; the settings below but for output_dir are for a dataset alone.
        obs_horizon: observations that the policy looks back on.
        action_horizon: actions in one chunk.
        execution_horizon: actions executed before the next plan.
        episodes: number of episodes in the picture, evenly spread over the dataset.
        dimensions: vectors up to this width are printed with a row for each dimension.
        output_dir: receives `inspect.json` and `inspect.png`, or `errors.json` and `errors.png`; by default a new
            folder under outputs/inspect.

    Raises:
        ValueError: settings out of range, values that are not finite, nothing to inspect, or a dataset that the policy
            was not trained on.
    """
    if checkpoint is not None:
        _inspect_checkpoint(checkpoint, dataset, output_dir)
        return
    if dataset is None:
        raise ValueError("inspect shows a dataset (dataset.path=...), a policy (checkpoint=...), or both: give one")
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


def check_checkpoint(*, checkpoint: Path | None = None) -> None:
    """Check that there is a whole checkpoint, before demonstrations are read.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if checkpoint is not None:
        digest_of(checkpoint)


def _inspect_checkpoint(folder: Path, dataset: Demonstrations | None, output_dir: Path | None) -> None:
    loaded, history = load_checkpoint(folder), read_history(folder)
    measured = None if dataset is None else _measured(loaded, dataset)
    for name, text in describe_checkpoint(loaded).items():
        print(f"{name:<12} {text}")
    if measured:
        history = [*history, {"step": loaded.training.get("step", 0), **measured.metrics()}]
    if conclusion := conclude(history):
        print(f"{'errors':<12} {conclusion.sentence}")
    recovered = describe_recoveries(
        loaded.training,
        history,
        loaded.policy.config.auxiliary_shapes,
        weights_differ=measured.weights_differ if measured else True,
    )
    if recovered:
        print(f"{'':<12} {recovered}")
    if measured and measured.by_heart:
        print(f"{'':<12} {describe_by_heart(measured.by_heart, loaded.policy.config)}")
    if measured:
        _show_errors(measured, loaded, output_folder(output_dir, "inspect"))
    print(next_use(folder, loaded.env, loaded.sampler))


class _Measured(NamedTuple):
    """What is measured of a policy: see `Measurement`, `Recoveries`, `known_by_heart` and `spread_matters`."""

    errors: Measurement
    recoveries: Recoveries
    by_heart: list[int]
    weights_differ: bool

    def metrics(self) -> dict[str, float]:
        """Return the errors and what a chunk corrects as entries of a run's history."""
        return {**self.errors.metrics(), **self.recoveries.metrics()}


def _measured(loaded: Checkpoint, dataset: Demonstrations) -> _Measured:
    """Measure a policy on the episodes that its training held out and on those that it learned from.

    Raises:
        ValueError: the training does not say how it split the episodes, or these are not its episodes.
    """
    config, training = loaded.policy.config, loaded.training
    if missing := [name for name, kind in SPLIT.items() if not isinstance(training.get(name), kind)]:
        raise ValueError(
            f"{loaded.path} does not note {', '.join(missing)} of its training, so that its held-out episodes are not"
            " known: leave dataset= out"
        )
    dataset = fitting(dataset, config, loaded.path, with_actions=True)
    _check_same_data(loaded, dataset)
    split = split_windows(
        config,
        dataset,
        val_fraction=training["val_fraction"],
        mask_padding=training["mask_padding"],
        seed=training["seed"],
    )
    return _Measured(
        ErrorMeter(*split, loaded.sampler).measure(loaded.policy),
        RecoveryMeter(config, split[0], loaded.sampler).measure(loaded.policy),
        known_by_heart(loaded.policy, *split, loaded.sampler),
        spread_matters(split[0], loaded.policy.action_normalizer),
    )


def _check_same_data(loaded: Checkpoint, dataset: Demonstrations) -> None:
    """Reject demonstrations that are not those of a policy's training."""
    training, now = loaded.training, as_json(data_facts(dataset))
    noted, counts = (training["episodes"], training["transitions"]), (dataset.num_episodes, len(dataset.actions))
    then = {name: training.get(name, value) for name, value in now.items()}  # earlier versions do not note these
    differing = [name for name in now if then[name] != now[name] and (name != CHECKSUM or noted == counts)]
    if differing:
        were = ", ".join(describe_before(name, then[name], now[name]) for name in differing)
        raise ValueError(f"{loaded.path} was trained on other data ({were}): give the same")
    if noted != counts:
        raise ValueError(
            f"{loaded.path} was trained on {noted[0]} episodes with {noted[1]} transitions, and {dataset.source} has"
            f" {counts[0]} with {counts[1]}: give the dataset and the dataset settings of its training"
        )


def _show_errors(measured: _Measured, loaded: Checkpoint, folder: Path) -> None:
    """Write the errors, and draw those of held-out windows against their distances to training observations."""
    files, metrics = [folder / "errors.json"], measured.metrics()
    write_text(files[0], json_text(metrics, indent=1))
    held_out, near = measured.errors.held_out, measured.errors.neighbours
    if held_out and near:
        distances, errors = near.distances, np.sqrt(np.nanmean(held_out.averaged_chunk, axis=1))
        print(f"{'':<12} {describe_by_distance(distances, errors)}")
        files.append(folder / "errors.png")
        plot_errors(distances, errors, metrics[TRAINING], f"{printable(str(loaded.path))}, held-out episodes", files[1])
    print(f"files: {', '.join(map(str, files))}")
