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
from policy.data.windows import UNMARKED

# In this first part of each episode, nothing but the robot has moved yet; where several things are moved, the first of
# them is soon.
EARLY = 0.05
# The robot is near a thing if it is closer than this share of its usual distance, the median. A motion ends near a
# thing if what moved, or the robot, does so within a larger share, because what is dropped is still falling.
NEAR, ENDS_NEAR = 0.25, 0.5
# A thing that rests for no more transitions than this between two motions goes on with one motion.
PAUSE = 5
# A motion that leads a thing less far than this share of its standard deviation is a nudge and does not count.
NUDGE = 0.1
# A thing is shown elsewhere if it rested there, moved as often before, in so many demonstrations or more.
LEAST_EPISODES = 10
# A number belongs to a thing if, of the transitions in which it moves, the thing moves in so large a share. If only
# several things together do, and it moves in as large a share of theirs as COVERS, it tells of both.
BELONGS, COVERS = 0.9, 0.5
# If two things move at the same time in a larger share of their motions, the numbers of the one tell of the other.
TOGETHER = 0.1
# The group of a thing that stays where it is, as those of a counterpart do.
STAYS = UNMARKED


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
    demonstrations: Demonstrations, episodes: NDArray[np.int64], corrections: Corrections, around: tuple[int, int]
) -> Exchange:
    """Find the windows in which a thing could as well be elsewhere, and where.

    The demonstrated actions are right wherever such a thing is (counterfactual data augmentation: Pitis, Creager and
    Garg, NeurIPS 2020). A thing matters while it moves or the robot is near it, before its motion if that is the next
    one of all, and before the end of another one's motion that ends near it, as that of a cube that is put onto it. At
    other times it could be wherever it rested in another demonstration, having moved as often before.

    Args:
        demonstrations: the demonstrations.
        episodes: numbers of the episodes to look into; the poses are from them alone.
        corrections: what is known of the robot and of the things.
        around: how many transitions a window reaches back and ahead.

    Returns:
        The exchange; one without things where there are fewer than two that move one at a time, or where a number tells
        where they were: of the robot and a thing, or of two things.
    """
    things = [] if corrections.carried.apart else corrections.things
    numbers = np.concatenate([demonstrations.observations[key] for key in corrections.widths], axis=1)
    moves = moves_of(numbers, demonstrations.episode_ends, corrections.robot, EARLY)
    none = Exchange([], np.empty((len(numbers), 0), np.int64), [])
    if len(things) < 2 or moves is None:
        return none
    spans = [slice(*span) for span in zip(demonstrations.episode_starts, demonstrations.episode_ends, strict=True)]
    moving = np.concatenate([_motions(moves, things, span) for span in spans])
    places = _belonging(moves, moving[:-1], things, corrections.robot)
    if not places:
        return none
    apart = _from_robot(numbers, moving, things)
    usual = np.median(_length(apart), axis=0)
    nudges = [NUDGE * float(np.linalg.norm(numbers[:, thing.numbers].std(axis=0))) for thing in things]
    counts, groups = np.zeros(moving.shape, np.int64), np.full(moving.shape, STAYS)
    looked_at = [spans[episode] for episode in episodes]
    for span in looked_at:
        for number, thing in enumerate(things):
            counts[span, number] = _motions_before(
                moving[span, number], numbers[span][:, thing.numbers], nudges[number]
            )
        groups[span] = np.where(_matters(moving[span], apart[span], usual, around), STAYS, counts[span])
    return _grouped(numbers, looked_at, moving, counts, groups, places)


def _motions(moves: Moves, things: Sequence[Thing], span: slice) -> NDArray[np.bool_]:
    """(T, things) whether each thing of an episode moves on from a row, pauses included.

    What moves up to the last row has not come to rest there.
    """
    stirs = np.stack([moves.moving[span.start : span.stop - 1, thing.places].any(axis=1) for thing in things], axis=1)
    motions = np.concatenate([stirs, stirs[-1:] if len(stirs) else np.zeros((1, len(things)), np.bool_)])
    for column in motions.T:
        for last, following in itertools.pairwise(np.flatnonzero(column)):
            column[last:following] |= following - last <= PAUSE + 1
    return motions


def _belonging(
    moves: Moves, moving: NDArray[np.bool_], things: Sequence[Thing], robot: AbstractSet[int]
) -> list[list[int]]:
    """All numbers of each thing: those by which it was found, and others that move only when it does.

    None where two things move together, or a number tells of several of them.
    """
    moving = moving & moves.within[:, None]
    for first, second in itertools.combinations(moving.T, 2):
        if (first & second).sum() > TOGETHER * min(first.sum(), second.sum()):
            return []
    found, any_moves = [list(thing.places) for thing in things], moving.any(axis=1)
    for place in sorted({*range(moves.moving.shape[1])} - {*robot, *itertools.chain(*found)}):
        when = moves.moving[:, place] & moves.within
        shares = moving[when].mean(axis=0) if when.any() else np.zeros(len(things))
        if shares.max() >= BELONGS:
            found[int(shares.argmax())].append(place)
        elif shares.sum() >= BELONGS and when[any_moves].mean() >= COVERS:
            return []
    return [sorted(places) for places in found]


def _from_robot(numbers: NDArray[Any], moving: NDArray[np.bool_], things: Sequence[Thing]) -> NDArray[Any]:
    """(N, things, axes) where each thing is from the robot, beside where it moves with it; NaN for an axis it lacks."""
    axes = sorted({partner for thing in things for partner in thing.partners})
    apart = np.full((len(numbers), len(things), len(axes)), np.nan)
    for number, thing in enumerate(things):
        own = numbers[:, thing.numbers] - numbers[:, thing.partners]
        held = np.median(own[moving[:, number]], axis=0) if moving[:, number].any() else 0.0
        apart[:, number, [axes.index(partner) for partner in thing.partners]] = own - held
    return apart


def _length(offsets: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.sqrt(np.nansum(np.square(offsets), axis=-1)))


def _motions_before(moving: NDArray[np.bool_], where: NDArray[Any], nudge: float) -> NDArray[np.int64]:
    """(T,) how many motions (T,) of a thing at places (T, *) are over, nudges left out."""
    counts = np.zeros(len(moving), np.int64)
    before = np.concatenate([[False], moving[:-1]])
    begins, ends = np.flatnonzero(moving & ~before), np.flatnonzero(before & ~moving)
    for begin, end in zip(begins, ends, strict=False):  # the last one may go on
        counts[end:] += np.linalg.norm(where[end] - where[begin]) > nudge
    return counts


def _matters(
    moving: NDArray[np.bool_], apart: NDArray[Any], usual: NDArray[Any], around: tuple[int, int]
) -> NDArray[np.bool_]:
    """(T, things) whether a thing matters to a window of an episode."""
    steps, (back, ahead) = np.arange(len(moving)), around
    near = _length(apart)
    between = _length(apart[:, :, None] - apart[:, None]) < ENDS_NEAR * usual
    moved = np.concatenate([moving[:1], moving[:-1]])
    ends_near = (near < ENDS_NEAR * usual) | (moved[:, :, None] & between).any(axis=1)
    # Where a motion begins or ends, and the end of the episode.
    events = np.append(np.flatnonzero((moving[1:] != moving[:-1]).any(axis=1)) + 1, steps[-1])
    event = events[np.minimum(np.searchsorted(events, steps, side="right"), len(events) - 1)]
    matters = moving | (near < NEAR * usual) | moving[event] | ends_near[event]
    before = np.concatenate([np.zeros((1, moving.shape[1]), np.int64), np.cumsum(matters, axis=0)])
    first, last = np.maximum(steps - back, 0), np.minimum(steps + ahead, steps[-1])
    return np.asarray(before[last + 1] > before[first])


def _grouped(
    numbers: NDArray[Any],
    spans: Sequence[slice],
    moving: NDArray[np.bool_],
    counts: NDArray[np.int64],
    groups: NDArray[np.int64],
    places: Sequence[Sequence[int]],
) -> Exchange:
    """Number the groups of poses: one for each thing and number of motions before, where there are enough poses."""
    rows = np.concatenate([np.arange(span.start, span.stop) for span in spans])
    episode = np.repeat(np.arange(len(spans)), [span.stop - span.start for span in spans])
    numbered, poses = np.full_like(groups, STAYS), list[NDArray[Any]]()
    for thing, own in enumerate(places):
        for count in np.unique(groups[:, thing][groups[:, thing] != STAYS]):
            resting = ~moving[rows, thing] & (counts[rows, thing] == count)
            # The last row of each episode: after nudges.
            _, last = np.unique(episode[resting][::-1], return_index=True)
            if len(last) >= LEAST_EPISODES:
                numbered[groups[:, thing] == count, thing] = len(poses)
                poses.append(numbers[np.ix_(rows[resting][::-1][last], own)])
    return Exchange(places, numbered, poses)
