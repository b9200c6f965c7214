"""Where a thing could as well be with which the robot has nothing to do at the moment: where others had it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from policy.data.corrections import Corrections
from policy.data.demonstrations import Demonstrations
from policy.data.holding import Moves, Thing, moves_of

# In this first part of each episode, nothing but the robot has moved yet; where several things are moved, the first of
# them is soon.
EARLY = 0.05
# The robot is near a thing if it is closer than this share of its usual distance, the median.
NEAR = 0.25
# A thing that rests for no more transitions than this between two motions goes on with one motion.
PAUSE = 5
# A thing is shown elsewhere if it rested there, moved as often before, in so many demonstrations or more.
LEAST_EPISODES = 10
# A number belongs to a thing if, of the transitions in which it moves, the thing moves in so large a share.
BELONGS = 0.9
# The group of a thing that stays where it is.
STAYS = -1


class Exchange(NamedTuple):
    """Where each of several things may be shown.

    Attributes:
        places: of each thing, its places in the vector of all numbers, the keys in sorted order.
        groups: (N, things) the number of the group of poses from which a thing may be shown at each transition;
            `STAYS` where it stays as it is.
        poses: of each group, the thing's numbers in (M, places) of M demonstrations.
    """

    places: Sequence[Sequence[int]]
    groups: NDArray[np.int64]
    poses: Sequence[NDArray[Any]]


def find_exchange(
    demonstrations: Demonstrations, episodes: NDArray[np.int64], corrections: Corrections, horizons: tuple[int, int]
) -> Exchange:
    """Find the windows in which a thing could as well be elsewhere, and where.

    The demonstrated actions are right wherever such a thing is (counterfactual data augmentation: Pitis, Creager and
    Garg, NeurIPS 2020). A thing matters while it moves or the robot is near it, before its next motion if that is the
    next one of all, and before the end of another one's motion that ends near it, as that of a cube that is put onto
    it. At other times it could be wherever it rested in another demonstration, having moved as often before.

    Args:
        demonstrations: the demonstrations.
        episodes: numbers of the episodes to look into; the poses are from them alone.
        corrections: what is known of the robot and of the things.
        horizons: observations and actions in a window.

    Returns:
        The exchange; one without things where there are fewer than two, or where an observation says how far the robot
        is from them, which would tell where they were.
    """
    things = [] if corrections.carried.apart else corrections.things
    numbers = np.concatenate([demonstrations.observations[key] for key in corrections.widths], axis=1)
    moves = moves_of(numbers, demonstrations.episode_ends, corrections.robot, EARLY)
    if len(things) < 2 or moves is None:
        return Exchange([], np.empty((len(numbers), 0), np.int64), [])
    starts, ends = demonstrations.episode_starts[episodes], demonstrations.episode_ends[episodes]
    moving = np.stack([moves.moving[:, thing.places].any(axis=1) for thing in things], axis=1)
    moving = np.append(moving & moves.within[:, None], np.zeros((1, len(things)), np.bool_), axis=0)
    distance = np.stack([_distance(numbers, thing, moving[:, k]) for k, thing in enumerate(things)], axis=1)
    near = distance < NEAR * np.median(distance, axis=0)
    places = _belonging(moves, moving, things, corrections.robot)
    counts, groups = np.zeros(moving.shape, np.int64), np.full(moving.shape, STAYS)
    for start, end in zip(starts, ends, strict=True):
        episode = slice(start, end)
        moving[episode] = _without_pauses(moving[episode])
        counts[episode] = _motions_before(moving[episode])
        groups[episode] = np.where(_matters(moving[episode], near[episode], horizons), STAYS, counts[episode])
    return _grouped(numbers, starts, ends, moving, counts, groups, places)


def _distance(numbers: NDArray[Any], thing: Thing, moving: NDArray[np.bool_]) -> NDArray[Any]:
    """(N,) how far the robot is from a thing, beside where it is when the thing moves."""
    apart = numbers[:, thing.numbers] - numbers[:, thing.partners]
    held = np.median(apart[moving], axis=0) if moving.any() else 0.0
    return np.asarray(np.linalg.norm(apart - held, axis=1))


def _belonging(
    moves: Moves, moving: NDArray[np.bool_], things: Sequence[Thing], robot: AbstractSet[int]
) -> list[list[int]]:
    """All numbers of each thing: those by which it was found, and others that move only when it does."""
    known = {*robot, *(place for thing in things for place in thing.places)}
    found = [list(thing.places) for thing in things]
    for place in sorted({*range(moves.moving.shape[1])} - known):
        when = moves.moving[:, place]
        shares = moving[:-1][when].mean(axis=0) if when.any() else np.zeros(len(things))
        if shares.max() >= BELONGS and (shares >= BELONGS).sum() == 1:
            found[int(shares.argmax())].append(place)
    return [sorted(places) for places in found]


def _without_pauses(moving: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Motions (T, things) of an episode, joined where there is only a pause between two of them."""
    joined = moving.copy()
    for column in joined.T:
        when = np.flatnonzero(column)
        for last, following in itertools.pairwise(when):
            column[last:following] |= following - last <= PAUSE + 1
    return joined


def _motions_before(moving: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(T, things) how many motions of each thing are over."""
    ended = ~moving[1:] & moving[:-1]
    return np.concatenate([np.zeros((1, moving.shape[1]), np.int64), np.cumsum(ended, axis=0)])


def _matters(moving: NDArray[np.bool_], near: NDArray[np.bool_], horizons: tuple[int, int]) -> NDArray[np.bool_]:
    """(T, things) whether a thing matters to a window of an episode."""
    steps, (past, future) = np.arange(len(moving)), horizons
    # Where a motion begins or ends, and the end of the episode.
    events = np.append(np.flatnonzero((moving[1:] != moving[:-1]).any(axis=1)) + 1, len(moving) - 1)
    event = events[np.minimum(np.searchsorted(events, steps, side="right"), len(events) - 1)]
    matters = (moving | near) | (moving | near)[event]
    first, last = np.maximum(steps - past + 1, 0), np.minimum(steps + future, steps[-1])
    return np.asarray(matters | matters[first] | matters[last])


def _grouped(
    numbers: NDArray[Any],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    moving: NDArray[np.bool_],
    counts: NDArray[np.int64],
    groups: NDArray[np.int64],
    places: Sequence[Sequence[int]],
) -> Exchange:
    """Number the groups of poses: one for each thing and number of motions before, where there are enough poses."""
    rows = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
    episode = np.repeat(np.arange(len(starts)), ends - starts)
    numbered, poses = np.full_like(groups, STAYS), list[NDArray[Any]]()
    for thing, own in enumerate(places):
        for count in np.unique(groups[:, thing][groups[:, thing] != STAYS]):
            resting = ~moving[rows, thing] & (counts[rows, thing] == count)
            _, first = np.unique(episode[resting], return_index=True)
            if len(first) >= LEAST_EPISODES:
                numbered[groups[:, thing] == count, thing] = len(poses)
                poses.append(numbers[np.ix_(rows[resting][first], own)])
    return Exchange(places, numbered, poses)
