"""What a robot holds at each transition of demonstrations, found without names or units."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from policy.data.relations import Relations, angles, wrapped
from policy.data.windows import UNMARKED

# In this first part of each episode, hardly anything but the robot has moved yet. A shorter one recognises more
# motions of other things, and policies succeeded less often (docs/experiments/copies.md).
EARLY = 0.2
# Anything else is at rest where it changes by less than this share of its usual change, the root mean square, or by
# less than twice what it trembles. That is a quantile of its changes: of those in the first part of the episodes, and,
# where the robot holds something, of those while it does.
AT_REST, TREMBLES, TREMBLES_HELD = 0.1, 0.9, 0.7
# A number that moves in more of the first part than this share is the robot's own, such as a velocity.
MOSTLY = 0.5
# A thing goes with the robot if the two move and turn alike, to this share of what the robot does, or to this angle.
GOES_WITH, TURNS_WITH = 0.2, 0.02
# What the robot holds, if it is none of the things: nothing, or what moves is not known to go with it.
NOTHING, UNKNOWN = 0, UNMARKED


class Thing(NamedTuple):
    """Something that the robot can hold, and then carries along.

    Attributes:
        numbers: places of its position.
        partners: place of the robot's number that each of them goes with.
        cosines: place of the cosine of its direction, followed by the sine; empty without one.
        turned_by: place of the cosine of the robot's direction that it turns with; empty without one.
    """

    numbers: Sequence[int]
    partners: Sequence[int]
    cosines: Sequence[int]
    turned_by: Sequence[int]

    @property
    def places(self) -> list[int]:
        """All of its numbers."""
        return [*self.numbers, *self.cosines, *(place + 1 for place in self.cosines)]


def things_of(relations: Relations, own: Sequence[int], cosines: Sequence[int], robot: AbstractSet[int]) -> list[Thing]:
    """Find what the robot can hold: it mostly moves as the robot does where both move.

    The robot's x may go with the x of several things. The first number that each of the robot's goes with belongs to
    the first thing, the second to the second: observations list the coordinates of all things in one order.

    Args:
        relations: what is alike, see `moving_together`.
        own: the robot's numbers.
        cosines: the first numbers of the robot's directions.
        robot: places of all that is known to be the robot's.

    Returns:
        The things.
    """
    numbers = {place: _alike(place, relations.differences, robot) for place in own}
    turned = {place: _alike(place, relations.direction_differences, robot) for place in cosines}
    things = []
    for rank in range(max(map(len, numbers.values()), default=0)):
        pairs = [(alike[rank], place) for place, alike in numbers.items() if len(alike) > rank]
        turns = [(alike[rank], place) for place, alike in turned.items() if len(alike) > rank][:1]
        things.append(
            Thing(
                numbers=[number for number, _ in pairs],
                partners=[partner for _, partner in pairs],
                cosines=[cosine for cosine, _ in turns],
                turned_by=[cosine for _, cosine in turns],
            )
        )
    return things


def _alike(place: int, pairs: Sequence[tuple[int, int]], robot: AbstractSet[int]) -> list[int]:
    """What is paired with a number of the robot, and not the robot's own."""
    others = [first if second == place else second for first, second in pairs if place in (first, second)]
    return sorted(other for other in others if other not in robot)


class Moves(NamedTuple):
    """What changes from each row of the observations to the next one, N - 1 rows.

    Attributes:
        size: (N - 1, D) how much each number changes.
        moving: (N - 1, D) bool, whether it moves by more than it trembles; never for the robot's own numbers.
        least: (D,) a number that changes by more moves.
        within: (N - 1,) bool, False from the last row of an episode to the first one of the next.
    """

    size: NDArray[Any]
    moving: NDArray[np.bool_]
    least: NDArray[Any]
    within: NDArray[np.bool_]


def moves_of(
    numbers: NDArray[Any], ends: NDArray[np.int64], robot: AbstractSet[int], early: float = EARLY
) -> Moves | None:
    """Find out what moves from each row to the next one.

    Args:
        numbers: (N, D) the observations.
        ends: (E,) the number of the first transition after each episode.
        robot: places of the robot's own numbers.
        early: the first part of each episode, in which nothing but the robot has moved.

    Returns:
        The moves; None where the episodes are too short to tell what trembles.
    """
    size = np.diff(numbers, axis=0)
    np.abs(size, out=size)  # as large as the observations: no copies of it
    within = np.ones(len(size), dtype=np.bool_)
    within[ends[:-1] - 1] = False
    lengths = np.diff(ends, prepend=0)
    before = np.concatenate([np.arange(length) <= early * (length - 1) for length in lengths])[:-1] & within
    if not before.any():
        return None
    at_rest = AT_REST * np.sqrt(np.einsum("ij,ij,i->j", size, size, within) / within.sum())
    least = np.maximum(at_rest, 2 * np.quantile(size[before], TREMBLES, axis=0))
    moving = size > least
    moving[:, (size[before] > at_rest).mean(axis=0) > MOSTLY] = False
    moving[:, sorted(robot)] = False
    return Moves(size=size, moving=moving, least=least, within=within)


def held_at(numbers: NDArray[Any], moves: Moves | None, things: Sequence[Thing]) -> NDArray[np.int64]:
    """Find out what the robot holds before and after each transition.

    Args:
        numbers: (N, D) the observations.
        moves: what moves, see `moves_of`.
        things: what it can hold.

    Returns:
        (N,) `NOTHING` where nothing but the robot moves, k where the k-th thing (from 1) goes with it and everything
        else is at rest, and `UNKNOWN` elsewhere.
    """
    held = np.full(len(numbers), UNKNOWN)
    if moves is None:
        return held
    size, moving, least, within = moves
    goes = [_goes_along(numbers, least, moving, within, thing) for thing in things]
    free = np.ones(numbers.shape[1], dtype=np.bool_)
    free[[place for thing in things for place in thing.places]] = False
    for number in range(len(things) + 1):
        others = moving[:, free]
        if number and goes[number - 1].any():
            shaken = np.quantile(size[goes[number - 1]][:, free], TREMBLES_HELD, axis=0)
            others = others & (size[:, free] > 2 * shaken)
        stirs = others.any(axis=1)
        for other, (along, thing) in enumerate(zip(goes, things, strict=True), 1):
            stirs |= ~along if other == number else along | moving[:, thing.places].any(axis=1)
        stirs &= within
        held[~(np.append(stirs, False) | np.insert(stirs, 0, False))] = number
    return held


def _goes_along(
    numbers: NDArray[Any],
    least: NDArray[Any],
    moving: NDArray[np.bool_],
    within: NDArray[np.bool_],
    thing: Thing,
) -> NDArray[np.bool_]:
    """Whether the robot holds a thing in each of the N - 1 changes.

    Where neither moves, it holds what it held before.
    """
    partners = np.diff(numbers[:, thing.partners], axis=0)
    robot, far = np.linalg.norm(partners, axis=1), float(np.linalg.norm(least[thing.numbers]))
    apart = np.linalg.norm(np.diff(numbers[:, thing.numbers], axis=0) - partners, axis=1)
    together = apart <= GOES_WITH * robot + far
    if thing.cosines:
        turns = wrapped(np.diff(angles(numbers, [*thing.cosines, *thing.turned_by]), axis=0))
        together &= np.abs(turns[:, 0] - turns[:, 1]) <= GOES_WITH * np.abs(turns[:, 1]) + TURNS_WITH
    stirs = moving[:, thing.places].any(axis=1)
    tells = stirs | (robot > far) | ~within
    last = np.maximum.accumulate(np.where(tells, np.arange(len(moving)), -1))
    return np.asarray(together & within & (last >= 0) & (stirs & together & within)[last])
