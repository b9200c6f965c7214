"""Minari datasets, stored as HDF5, arrow or parquet; a folder, or an id such as D4RL/door/human-v2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from policy.common.control_rate import stated_rate
from policy.data.budget import Budget
from policy.data.episode import Episode, EpisodeReader, Request
from policy.data.formats.format import Format
from policy.data.formats.minari.finding import find_minari
from policy.data.formats.minari.leaves import ACTIONS, Leaf, observed_leaves, shape_of, values_of
from policy.data.formats.minari.metadata import METADATA, read_env_name, read_environment, read_metadata, read_space
from policy.data.formats.minari.storage import Storage, open_storage
from policy.data.minari_writer import RATE_KEY

# The distance by which an action may leave its space, as a fraction of the space's width, because float32 cannot hold
# every bound of float64.
TOLERANCE = 1e-4


def open_minari(path: Path, files: Mapping[str, Path], request: Request) -> EpisodeReader:
    """Open a Minari dataset.

    Vectors, pictures and choices (one-hot) are observed, each under its key in the observation space; nested keys are
    joined, as in `outer/inner`. An observation without a key gets `state`, or `image`.

    Args:
        path: the dataset's folder.
        files: the files in the folder.
        request: the user's request; by default every array of a fixed size is observed.

    Returns:
        The dataset's reader.

    Raises:
        ValueError: it is not a Minari dataset, is damaged, or lacks a requested part.
    """
    metadata = read_metadata(files)
    if request.action_key is not None:
        raise ValueError(f"Minari names its actions itself: leave out dataset.action_key={request.action_key!r}")
    if request.subset is not None:
        raise ValueError(f"Minari names no subsets of its episodes: leave out dataset.subset={request.subset!r}")
    action = Leaf((ACTIONS,), read_space(metadata, "action_space"))
    if not isinstance(action.space, spaces.Box):
        raise ValueError(f"its actions are {action.space}; a diffusion policy denoises continuous actions (a Box)")
    observations = observed_leaves(read_space(metadata, "observation_space"), request)
    said: dict[str, Any] = {"env": read_environment(metadata)}
    if (name := read_env_name(metadata)) is not None:
        said["env_name"] = name
    if rate := stated_rate(metadata.get(RATE_KEY)):
        said["rate_hz"] = rate
    if isinstance(metadata.get("dataset_id"), str):
        said["dataset_id"] = metadata["dataset_id"]
    _check_total(metadata, action, observations, request.budget)
    storage = open_storage(str(metadata.get("data_format", "hdf5")), files, request.budget)
    total = metadata.get("total_episodes")
    if not storage.names or (isinstance(total, int) and total != len(storage.names)):
        storage.close()
        raise ValueError(
            f"it should have {total} episodes, but {len(storage.names)} are there: it was written or copied partly,"
            " fetch it again"
        )
    clip = request.on_action_outside == "clip"
    return MinariReader(storage, observations=observations, action=action, clip=clip, said=said)


FORMAT = Format(open=open_minari, find=find_minari, looks=lambda names: METADATA in names)


class MinariReader:
    """Reads one episode at a time, and only the requested arrays of it."""

    held_out: Sequence[str] = ()

    def __init__(
        self,
        storage: Storage,
        *,
        observations: Mapping[str, Leaf],
        action: Leaf,
        clip: bool,
        said: Mapping[str, Any],
    ) -> None:
        self.names = storage.names
        self.metadata: Mapping[str, Any] = {"format": "minari", **said}
        self._storage = storage
        self._observations = observations
        self._action = action
        self._clip = clip
        self._low, self._high = _limits(action.space)

    def read(self, name: str) -> Episode:
        """See `EpisodeReader`."""
        rows, *observed = self._storage.rows(name, [self._action, *self._observations.values()])
        for leaf, seen in zip(self._observations.values(), observed, strict=True):
            if len(seen) != len(rows) + 1:
                raise ValueError(
                    f"lengths disagree: '{leaf}' has {len(seen)} rows, {len(rows)} actions need {len(rows) + 1}"
                )
        actions = values_of(rows, self._action)
        if self._clip:
            actions = np.clip(actions, *self._bounds())
        else:
            self._check_limits(actions)
        # The last observation is left out: it follows the last action.
        pairs = zip(self._observations.items(), observed, strict=True)
        return Episode(actions=actions, observations={key: values_of(seen[:-1], leaf) for (key, leaf), seen in pairs})

    def close(self) -> None:
        """See `EpisodeReader`."""
        self._storage.close()

    def _check_limits(self, actions: NDArray[Any]) -> None:
        outside = np.argwhere((actions < self._low) | (actions > self._high))
        if len(outside):
            transition, index = outside[0]
            low, high = (bound[index] for bound in self._bounds())
            raise ValueError(
                f"'actions' is {actions[transition, index]:g} at transition {transition}, index {index}; its space"
                f" allows {low:g} to {high:g}: clip such actions, as simulators do, with dataset.on_action_outside=clip"
            )

    def _bounds(self) -> tuple[NDArray[Any], NDArray[Any]]:
        space: Any = self._action.space
        return np.ravel(space.low), np.ravel(space.high)


def _check_total(metadata: Mapping[str, Any], action: Leaf, observations: Mapping[str, Leaf], budget: Budget) -> None:
    """Compare the size that the metadata states with the budget; the episodes' own sizes are compared when read."""
    steps, episodes = metadata.get("total_steps"), metadata.get("total_episodes")
    if not (isinstance(steps, int) and isinstance(episodes, int) and 0 < episodes <= steps):
        return
    shapes = {key: shape_of(leaf.space) for key, leaf in {**observations, ACTIONS: action}.items()}
    count = min(episodes, budget.max_episodes or episodes)
    budget.check_episodes([steps // episodes] * count, shapes)


def _limits(space: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low, high = (np.ravel(bound).astype(np.float64) for bound in (space.low, space.high))
    two_sided = np.isfinite(low) & np.isfinite(high)
    with np.errstate(over="ignore", invalid="ignore"):
        low_slack, high_slack = (
            TOLERANCE * np.where(two_sided, high - low, np.maximum(1, np.abs(bound))) for bound in (low, high)
        )
        return low - low_slack, high + high_slack
