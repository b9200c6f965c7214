"""Numbers of an observation that tell what a robot is doing rather than where it is: its velocities, its hand."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from policy.data.following import proportional
from policy.data.relations import moves

# A number is the velocity of one that follows an action if it is that one's latest change times a constant, to this
# share, and tells it better by this factor than the change to come, which a goal or a distance to it tells as well.
VELOCITY, LATEST = 0.9, 2.0
# An action that no number follows, because a hand lags or is blocked, drives the number whose changes, where it moves,
# are most nearly that action times a constant, to this share at least, and others as near by this factor. A hand is
# blocked in more than this share of the transitions in which the action acts, as an arm that lags is not. In 14
# collections of OCBench and Fetch the share of the hand's changes is 26 to 67 %.
DRIVEN, AS_NEAR, BLOCKED = 0.2, 0.9, 0.5
# What an action drives tells in which direction it acts: so often is the number larger after a step in one direction
# than after a step in the other, or smaller. For hands it is 67 to 99 %, for things whose changes are as near at most
# 56 %.
TELLS = 0.61
# It moves in so many of the first transitions, as what is carried does not. A hand that settles as the episode begins
# changes there by a tenth of what is usual for it, what lies on a table by a fiftieth.
FIRST_MOVES, FIRST_MOVING = 10, 0.05
# Noise without correction, as a share of the standard deviation.
BLUR_OF_VELOCITY, BLUR_OF_DRIVEN = 1.0, 0.3


class Blurred(NamedTuple):
    """A number of the robot that tells what it is doing rather than where it is, so that a policy would go on with it.

    Attributes:
        number: its place in the vector of all numbers.
        noise: standard deviation of the noise that blurs it.
        low: smallest value that was seen.
        high: largest value that was seen.
        velocity: whether it is the velocity of a number that follows the action.
    """

    number: int
    noise: float
    low: float
    high: float
    velocity: bool


def find_blurred(
    now: NDArray[np.float64],
    change: NDArray[np.float64],
    followed: NDArray[np.float64],
    free: NDArray[np.float64],
    early: NDArray[np.bool_],
    places: NDArray[np.int64],
) -> list[Blurred]:
    """Find the velocities of what moves, and what actions drive that no number follows.

    Args:
        now: (N, D) numbers at N transitions.
        change: (N, D) their changes.
        followed: (N, M) changes of the numbers that follow the action.
        free: (N, A) the actions that no number follows.
        early: (N,) whether a transition lies in the first part of its episode.
        places: of the numbers that are looked at.

    Returns:
        What is blurred, in the order of the places.
    """
    after = now + change
    velocities = _velocities(followed, now, after, places)
    driven = _driven(change, after, free, early, np.setdiff1d(places, velocities))
    shares = dict.fromkeys(driven, BLUR_OF_DRIVEN) | dict.fromkeys(velocities, BLUR_OF_VELOCITY)
    columns = [(number, share, now[:, number]) for number, share in sorted(shares.items())]
    return [
        Blurred(number, share * float(seen.std()), float(seen.min()), float(seen.max()), number in velocities)
        for number, share, seen in columns
    ]


def _velocities(
    followed: NDArray[np.float64], now: NDArray[np.float64], after: NDArray[np.float64], places: NDArray[np.int64]
) -> list[int]:
    """Which numbers at the places are the velocity of a change (N, M), by the numbers (N, D) before and after it."""

    def is_velocity(move: NDArray[np.float64], place: int) -> bool:
        latest = 1 - proportional(move, after[:, place])[1]
        return latest <= 1 - VELOCITY and LATEST * latest < 1 - proportional(move, now[:, place])[1]

    return [place for place in places.tolist() if any(is_velocity(move, place) for move in followed.T)]


def _driven(
    change: NDArray[np.float64],
    after: NDArray[np.float64],
    actions: NDArray[np.float64],
    early: NDArray[np.bool_],
    places: NDArray[np.int64],
) -> list[int]:
    """What the actions (N, A) drive, by the changes (N, D) to the numbers after them (N, D), of those at the places."""
    moving, first = moves(change), np.abs(change[early]) > FIRST_MOVING * np.sqrt(np.square(change).mean(axis=0))
    places = places[first[:, places].sum(axis=0) >= FIRST_MOVES]
    found: set[int] = set()
    for action in actions.T:
        acts = moves(action)
        blocked = [place for place in places.tolist() if (~moving[acts, place]).sum() > BLOCKED * acts.sum()]
        shares = {
            place: proportional(action[moving[:, place]], change[moving[:, place], place])[1]
            for place in blocked
            if _tells(after[acts, place], action[acts] > 0)
        }
        found |= {place for place, share in shares.items() if share >= max(DRIVEN, AS_NEAR * max(shares.values()))}
    return sorted(found)


def _tells(values: NDArray[np.float64], forward: NDArray[np.bool_]) -> bool:
    """Whether values (N,) tell which are of forward actions: the area under the curve is far from a half.

    Of actions in one direction alone, as of a hand that closes once, there is nothing to tell: True.
    """
    from scipy.stats import mannwhitneyu

    there, back = values[forward], values[~forward]
    if not (len(there) and len(back)):
        return True
    area = float(mannwhitneyu(there, back).statistic) / (len(there) * len(back))
    return max(area, 1 - area) >= TELLS
