"""Hindsight for Push-T: demonstrations moved so that what they achieved, at the end or on the way, is the task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.errors import choose
from envs.pusht_geometry import TABLE_SIZE, TARGET_POSE, check_state, state_of

Demonstration = tuple[dict[str, NDArray[Any]], NDArray[Any]]

# Names the code of this file in the cache of converted demonstrations; raise it with every change of what it computes.
CACHE_REVISION = "1"
# Pixels that a turn of the block by one radian counts for: about what its corners move.
ARM = 40.0
# Pixels: the block's origin stays this far from the edges of the table.
MARGIN = 50.0
# Of a part's positions of finger and action, at most this share may be off the table.
MOST_OFF = 0.02
# Control steps: shorter parts teach nothing.
SHORTEST = 12


def pusht_hindsight(observations: Mapping[str, NDArray[Any]], actions: NDArray[Any]) -> Demonstration:
    """Rotate and shift a whole Push-T demonstration so that its block comes to rest exactly on the target.

    Demonstrators stop when the block looks right: in the public demonstrations, half the blocks end more than 7 pixels
    and 2.2 degrees from the target. The physics of pushing is the same everywhere on the table, so each demonstration
    shows exactly how to bring the block to the pose where it ended (hindsight relabelling; Andrychowicz et al. 2017,
    arXiv:1707.01495). The few positions that would leave the table are clipped to it.

    Args:
        observations: Observations of one episode: ``"state"`` (T, 5), and optionally ``"keypoint"`` (T, 9, 2). Pictures
            cannot be moved, because the target is drawn in them.
        actions: (T, 2) target positions in pixels.

    Returns:
        Moved observations and actions of the same keys, shapes and dtypes.

    Raises:
        ValueError: If there is no such state, or if there is an unknown key.
    """
    return _moved(observations, actions, _checked(observations)[-1])


def pusht_hindsight_on_the_way(
    observations: Mapping[str, NDArray[Any]], actions: NDArray[Any], *, count: int = 4, distance: float = 20.0
) -> list[Demonstration]:
    """Relabel as `pusht_hindsight` does, and add parts that show how to get to poses on the way.

    A demonstration passes many poses of the block, and what led to one of them is a demonstration for a target there
    (the strategy "future" of Andrychowicz et al. 2017). The poses divide the way of the block, its turns included, into
    equal parts. Each part ends before its pose: how people pass a pose does not show how to stop at it. Parts that
    would leave the table are left out.

    Args:
        observations: As `pusht_hindsight` takes them.
        actions: (T, 2) target positions in pixels.
        count: Number of poses on the way.
        distance: Pixels of way before a pose at which its part ends.

    Returns:
        The relabelled demonstration, and up to `count` parts.

    Raises:
        ValueError: As `pusht_hindsight`, or if a number is out of range.
    """
    if count < 1 or not distance > 0:
        raise ValueError(f"count must be 1 or more and distance above 0; got count={count} and distance={distance}.")
    state = _checked(observations)
    poses = np.column_stack([state[:, 2:4], ARM * np.unwrap(state[:, 4])])
    way = np.cumsum(np.linalg.norm(np.diff(poses, axis=0, prepend=poses[:1]), axis=1))
    parts = []
    for goal in np.searchsorted(way, way[-1] * np.arange(1, count + 1) / (count + 1)):
        end = int(np.argmax(np.linalg.norm(poses - poses[goal], axis=1) < distance))
        if end >= SHORTEST and _stays_on_table(state[:end], actions[:end], state[goal]):
            until = {key: values[:end] for key, values in observations.items()}
            parts.append(_moved(until, actions[:end], state[goal]))
    return [_moved(observations, actions, state[-1]), *parts]


def _checked(observations: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Return the states.

    Raises:
        ValueError: If there are none, or if there is an unknown key.
    """
    state = check_state(state_of(observations))
    for key in observations:
        choose("Push-T observation to move", key, ("state", "keypoint"))
    return state


def _moved(observations: Mapping[str, NDArray[Any]], actions: NDArray[Any], goal: NDArray[np.float64]) -> Demonstration:
    """Rotate and shift a checked demonstration so that the pose of the block in a state (5,) becomes the target."""
    state = np.asarray(observations["state"], np.float64)
    turn = TARGET_POSE[2] - goal[4]
    on_table = np.clip(_to_target(state[:, :2], goal), 0, TABLE_SIZE)
    relabelled = {"state": np.hstack([on_table, _to_target(state[:, 2:4], goal), state[:, 4:] + turn])}
    if "keypoint" in observations:
        relabelled["keypoint"] = _to_target(observations["keypoint"], goal)
    same_types = {key: values.astype(observations[key].dtype) for key, values in relabelled.items()}
    clipped = np.clip(_to_target(np.asarray(actions, np.float64), goal), 0, TABLE_SIZE)
    return same_types, clipped.astype(actions.dtype)


def _to_target(points: NDArray[Any], goal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move points (..., 2) of the table as the block is moved from a state's pose to the target."""
    turn = TARGET_POSE[2] - goal[4]
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return np.asarray((points - goal[2:4]) @ rotation.T + TARGET_POSE[:2])


def _stays_on_table(state: NDArray[np.float64], actions: NDArray[Any], goal: NDArray[np.float64]) -> bool:
    """Whether a demonstration stays on the table when it is moved as `_moved` does."""
    block = _to_target(state[:, 2:4], goal)
    fingers = _to_target(np.concatenate([state[:, :2], np.asarray(actions, np.float64)]), goal)
    off = ((fingers < 0) | (fingers > TABLE_SIZE)).any(axis=1).mean()
    return bool(off <= MOST_OFF and block.min() >= MARGIN and block.max() <= TABLE_SIZE - MARGIN)
