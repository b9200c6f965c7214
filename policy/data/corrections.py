"""Noise on where a robot is, with the actions that lead it back: demonstrations of how to correct an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from policy.common.observations import is_image
from policy.data.blurring import Blurred, find_blurred
from policy.data.carrying import Carried, find_carried, find_parted
from policy.data.demonstrations import Demonstrations
from policy.data.following import find_followed
from policy.data.holding import EARLY, Thing, held_at, moves_of, things_of
from policy.data.relations import MOST_NUMBERS, Relations, moving_together, number_names, numbers_at, thinned

# Transitions that are looked at; more only take longer.
MOST_ROWS = 10_000

_NOTHING_FOLLOWS = (
    "train.corrective_noise and train.exchange need numbers of the observation that change by a constant times a number"
    " of the action; there are none in these demonstrations (actions that name a place need no correction, and for a"
    " robot that lags behind its actions none is known): use encoder.noise=... instead, which adds noise alone"
)


class Followed(NamedTuple):
    """A number of the observation that follows a number of the action.

    Attributes:
        number: its place in the vector of all numbers, the keys in sorted order.
        action: the place of the number in the action.
        gain: change of the number in one control step for an action of 1.
        reach: standard deviation of its change within a chunk.
    """

    number: int
    action: int
    gain: float
    reach: float


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """How an error in where the robot is shows in an observation, and which actions correct it.

    Attributes:
        widths: how many numbers each state vector holds, in the order in which they are counted.
        followed: the numbers that follow the action.
        carried: the numbers that these determine.
        blurred: the velocities of the followed numbers, and what an action drives that no number follows, as a hand's
            opening.
        things: what the robot can hold.
        held: (N,) what it holds at each transition, so that the two could as well be elsewhere: see `held_at`.
        parted: (things, len(carried.apart)) whether a number of `Carried.apart` changes with the robot while it holds a
            thing; where the robot is from the thing itself does not.
        low: (action_dim,) smallest demonstrated actions.
        high: (action_dim,) largest demonstrated actions.
    """

    widths: Mapping[str, int]
    followed: Sequence[Followed]
    carried: Carried
    blurred: Sequence[Blurred]
    things: Sequence[Thing]
    held: NDArray[np.int64]
    parted: NDArray[np.bool_]
    low: NDArray[np.float32]
    high: NDArray[np.float32]

    @property
    def names(self) -> list[str]:
        """Each number's key and place, such as `state[3]`."""
        return number_names(self.widths)

    @property
    def robot(self) -> set[int]:
        """Places of the robot's own numbers that are known."""
        return {*(one.number for one in self.followed), *self.carried.places}


def find_corrections(
    demonstrations: Demonstrations, episodes: NDArray[np.int64], keys: Iterable[str], action_horizon: int
) -> Corrections:
    """Find out from demonstrations which numbers an action moves, and what moves along with them.

    Args:
        demonstrations: the demonstrations.
        episodes: numbers of the episodes to look into.
        keys: the observations of the policy.
        action_horizon: control steps in a chunk.

    Returns:
        The corrections.

    Raises:
        ValueError: no number of the observation follows a number of the action, or there are pictures, which would show
            the robot where it was.
    """
    vectors = {key: demonstrations.observations[key] for key in sorted(keys)}
    if pictures := [key for key, values in vectors.items() if is_image(values.shape[1:])]:
        raise ValueError(
            f"train.corrective_noise and train.exchange change vectors alone, and the pictures {pictures} would show"
            " what was there: leave these settings out, or choose vectors with dataset.observation_keys=[...]"
        )
    starts, ends = demonstrations.episode_starts[episodes], demonstrations.episode_ends[episodes]
    rows = np.concatenate([np.arange(start, end - 1) for start, end in zip(starts, ends, strict=True)])

    def taken(where: NDArray[np.int64]) -> NDArray[np.float64]:
        return numbers_at(vectors.values(), where)

    seen = thinned(rows, MOST_ROWS)
    now, change = taken(seen), taken(seen + 1) - taken(seen)
    episode = np.searchsorted(demonstrations.episode_ends, seen, side="right")
    first, last = demonstrations.episode_starts[episode], demonstrations.episode_ends[episode] - 1
    early = seen - first <= EARLY * (last - first)
    actions = demonstrations.actions[seen].astype(np.float64)
    followed = find_followed(change, actions, early) if len(seen) else []  # of episodes of one transition
    if not followed:
        raise ValueError(_NOTHING_FOLLOWS)
    places = [number for number, *_ in followed]
    reach = (taken(np.minimum(seen + action_horizon, last)) - now)[:, places].std(axis=0)
    carried = find_carried(now, change, early, episode, places)
    known = {*places, *carried.places}
    relations = moving_together(demonstrations, vectors) if now.shape[1] <= MOST_NUMBERS else Relations((), ())
    things = things_of(relations, [*places, *carried.numbers], carried.cosines, known)
    others = np.setdiff1d(np.arange(now.shape[1]), [*known, *(place for thing in things for place in thing.places)])
    free = np.delete(actions, [action for _, action, _ in followed], axis=1)
    numbers = np.concatenate([*vectors.values()], axis=1)
    held = held_at(numbers, moves_of(numbers, demonstrations.episode_ends, known), things)
    return Corrections(
        widths={key: values.shape[1] for key, values in vectors.items()},
        followed=[Followed(*one, float(far)) for one, far in zip(followed, reach, strict=True)],
        carried=carried,
        blurred=find_blurred(now, change, change[:, places], free, early, others),
        things=things,
        held=held,
        parted=find_parted(numbers, held, len(things), places, carried),
        low=np.min(demonstrations.actions, axis=0),
        high=np.max(demonstrations.actions, axis=0),
    )
