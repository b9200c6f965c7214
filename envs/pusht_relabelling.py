"""Hindsight for Push-T: demonstrations moved so that what they achieved, at the end or on the way, is the task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
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
    poses = _poses(state)
    way = _way(poses)
    parts = []
    for goal in np.searchsorted(way, way[-1] * np.arange(1, count + 1) / (count + 1)):
        end = int(np.argmax(np.linalg.norm(poses - poses[goal], axis=1) < distance))
        if end >= SHORTEST and _stays_on_table(state[:end], actions[:end], state[goal]):
            until = {key: values[:end] for key, values in observations.items()}
            parts.append(_moved(until, actions[:end], state[goal]))
    return [_moved(observations, actions, state[-1]), *parts]


def pusht_hindsight_varied(
    observations: Mapping[str, NDArray[Any]],
    actions: NDArray[Any],
    *,
    count: int = 4,
    distance: float = 20.0,
    copies: int = 3,
    shift: float = 20.0,
    turn: float = 0.2,
    exact: float = 30.0,
    fade: float = 150.0,
    seed: int = 0,
) -> list[Demonstration]:
    """Relabel as `pusht_hindsight_on_the_way` does, and add copies in which the block starts shifted and turned.

    In each control step of a copy, finger, target and block are shifted together, and turned around the block's origin:
    a touch keeps its place on the block. The displacement fades with the way that the block has left, and only where
    the block moves. The last pixels of the way stay as they were demonstrated, because success depends on them. Copies
    that would leave the table are left out.

    A shift that does not fade is what the simulator would do. A turn is so only nearly, because the block turns and its
    path does not, and so is what fades. (MimicGen, Mandlekar et al. 2023, arXiv:2310.17596, moves parts of
    demonstrations with their objects, too, and replays them in the simulator.)

    Args:
        observations: As `pusht_hindsight` takes them.
        actions: (T, 2) target positions in pixels.
        count: Number of poses on the way.
        distance: Pixels of way before a pose at which its part ends.
        copies: Number of copies of the demonstration and of each part.
        shift: Standard deviation of a copy's shift far from the target, in pixels, in x and in y.
        turn: Standard deviation of a copy's turn far from the target, in radians.
        exact: Pixels of way before the target without displacement. A demonstration with less way is repeated as it is.
        fade: Pixels of way before these on which the displacement fades.
        seed: With the actions, the seed of the displacements.

    Returns:
        What `pusht_hindsight_on_the_way` returns, and up to `copies` of each.

    Raises:
        ValueError: As `pusht_hindsight_on_the_way`, or if a number is out of range.
    """
    finite = np.isfinite([shift, turn, exact, fade]).all()
    if copies < 1 or seed < 0 or not (finite and min(shift, turn, exact) >= 0 and fade > 0):
        raise ValueError(
            "copies must be 1 or more, seed, shift, turn and exact 0 or more, and fade above 0, all finite; got"
            f" copies={copies}, seed={seed}, shift={shift}, turn={turn}, exact={exact} and fade={fade}."
        )
    whole, *parts = pusht_hindsight_on_the_way(observations, actions, count=count, distance=distance)
    total = np.abs(np.nan_to_num(np.asarray(actions, np.float64), posinf=0.0, neginf=0.0)).sum()
    generator = np.random.default_rng([int(total), seed])
    found = [whole, *parts]
    for demonstration, left in [(whole, 0.0), *((part, distance) for part in parts)]:
        way = _way(_poses(_checked(demonstration[0])))
        share = np.clip((way[-1] - way + left - exact) / fade, 0, 1)
        for _ in range(copies):
            by = generator.normal(0, 1, 3) * [shift, shift, turn]
            found += _displaced(demonstration, share[:, None] * by)
    return found


def _displaced(demonstration: Demonstration, by: NDArray[np.float64]) -> list[Demonstration]:
    """Shift and turn finger and block of each row around the block's origin, by x, y and angle (T, 3).

    Returns:
        The demonstration; none if it would leave the table.
    """
    observations, actions = demonstration
    state = _checked(observations)
    cosine, sine = np.cos(by[:, 2]), np.sin(by[:, 2])
    turns = np.stack([cosine, -sine, sine, cosine], axis=1).reshape(-1, 2, 2)

    def move(points: NDArray[Any]) -> NDArray[np.float64]:
        around = points.reshape(len(state), -1, 2) - state[:, None, 2:4]
        return (np.einsum("tij,tkj->tki", turns, around) + state[:, None, 2:4] + by[:, None, :2]).reshape(points.shape)

    fingers = np.concatenate([move(state[:, :2]), move(np.asarray(actions, np.float64))])
    return [_with_points(observations, actions, move, by[:, 2:])] if _on_table(move(state[:, 2:4]), fingers) else []


def _poses(state: NDArray[np.float64]) -> NDArray[np.float64]:
    """Poses (T, 3) of the block in pixels, its angle as way of its corners."""
    return np.column_stack([state[:, 2:4], ARM * np.unwrap(state[:, 4])])


def _way(poses: NDArray[np.float64]) -> NDArray[np.float64]:
    """The way of the block until each of its poses (T, 3), in pixels, its turns included: (T,)."""
    return np.asarray(np.cumsum(np.linalg.norm(np.diff(poses, axis=0, prepend=poses[:1]), axis=1)))


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
    return _with_points(observations, actions, partial(_to_target, goal=goal), TARGET_POSE[2] - goal[4])


def _with_points(
    observations: Mapping[str, NDArray[Any]],
    actions: NDArray[Any],
    move: Callable[[NDArray[Any]], NDArray[np.float64]],
    turn: float | NDArray[np.float64],
) -> Demonstration:
    """Move all points of a checked demonstration, finger and actions clipped to the table, and turn its block.

    Args:
        observations: Observations by key.
        actions: (T, 2) target positions in pixels.
        move: Moves points (T, ..., 2).
        turn: Radians, for all rows or for each (T, 1).

    Returns:
        Observations and actions of the same keys, shapes and dtypes.
    """
    state = np.asarray(observations["state"], np.float64)
    on_table = np.clip(move(state[:, :2]), 0, TABLE_SIZE)
    relabelled = {"state": np.hstack([on_table, move(state[:, 2:4]), state[:, 4:] + turn])}
    if "keypoint" in observations:
        relabelled["keypoint"] = move(np.asarray(observations["keypoint"], np.float64))
    same_types = {key: values.astype(observations[key].dtype) for key, values in relabelled.items()}
    clipped = np.clip(move(np.asarray(actions, np.float64)), 0, TABLE_SIZE)
    return same_types, clipped.astype(actions.dtype)


def _to_target(points: NDArray[Any], goal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move points (..., 2) of the table as the block is moved from a state's pose to the target."""
    turn = TARGET_POSE[2] - goal[4]
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return np.asarray((points - goal[2:4]) @ rotation.T + TARGET_POSE[:2])


def _stays_on_table(state: NDArray[np.float64], actions: NDArray[Any], goal: NDArray[np.float64]) -> bool:
    """Whether a demonstration stays on the table when it is moved as `_moved` does."""
    fingers = np.concatenate([state[:, :2], np.asarray(actions, np.float64)])
    return _on_table(_to_target(state[:, 2:4], goal), _to_target(fingers, goal))


def _on_table(block: NDArray[np.float64], fingers: NDArray[np.float64]) -> bool:
    """Whether all places of the block and nearly all of finger and actions, (..., 2) in pixels, are on the table."""
    off = 1 - ((fingers >= 0) & (fingers <= TABLE_SIZE)).all(axis=1).mean()
    return bool(off <= MOST_OFF and block.min() >= MARGIN and block.max() <= TABLE_SIZE - MARGIN)
