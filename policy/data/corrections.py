"""Noise on where a robot is, with the actions that lead it back: demonstrations of how to correct an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from policy.common.observations import is_image
from policy.data.demonstrations import Demonstrations
from policy.data.holding import EARLY, Thing, held_at, things_of
from policy.data.relations import (
    MOST_NUMBERS,
    MOVING,
    Relations,
    angles,
    directions_of,
    moving_together,
    number_names,
    numbers_at,
    thinned,
    wrapped,
)

# A number of the observation follows a number of the action if its changes are that number times a constant, to this
# share of their variance.
FOLLOWS = 0.9
# Transitions in which something interferes, such as the end of a joint's range or a contact, are left out of that.
INTERFERED = 0.05
# A number is the velocity of one that follows an action if it is that one's latest change times a constant, to this
# share, and tells it better by this factor than the change to come, which a goal or a distance to it tells as well.
VELOCITY, LATEST = 0.9, 2.0
# An action that no number follows, because a hand lags or is blocked, drives the number whose changes, where it moves,
# are most nearly that action times a constant, to this share at least, and others as near by this factor. A hand is
# blocked in more than this share of the transitions in which the action acts, as an arm that lags is not, and moves in
# so many of the first transitions, as what is carried does not.
DRIVEN, AS_NEAR, BLOCKED, FIRST_MOVES = 0.3, 0.9, 0.5, 10
# Noise without correction, as a share of the standard deviation.
BLUR_OF_VELOCITY, BLUR_OF_DRIVEN = 1.0, 0.3
# Another number is carried along if the numbers that follow actions determine it, to this share of its variance in
# episodes that were not used to find out.
CARRIED = 0.98
# Numbers that are looked at for each action: those that change most like it.
LIKELY = 5
# What follows the action does so in the first part of each episode, too, to this share.
FOLLOWS_EARLY = 0.5
# Transitions that are looked at; more only take longer.
MOST_ROWS = 10_000
# Random features of the map to the carried numbers (Rahimi and Recht, NIPS 2007), their scales for inputs of unit
# variance, of which the best is taken, and the ridge.
FEATURES, SCALES, RIDGE = 1_000, (0.3, 0.6, 1.2), 1e-4

_NOTHING_FOLLOWS = (
    "train.corrective_noise needs numbers of the observation that change by a constant times a number of the action;"
    " there are none in these demonstrations (actions that name a place need no correction, and for a robot that lags"
    " behind its actions none is known): use encoder.noise=... instead, which adds noise alone"
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


@dataclass(frozen=True, kw_only=True)
class Carried:
    """The numbers that the followed ones determine, such as a gripper's position by the angles of the joints.

    Attributes:
        numbers: their places.
        center: (F,) mean of the followed numbers.
        spread: (F,) standard deviation of the followed numbers.
        frequencies: (F, FEATURES).
        phases: (FEATURES,).
        weights: (FEATURES + F + 1, len(numbers)).
        cosines: places of the cosines of directions that turn with the followed numbers, each followed by its sine.
        turns: (F, len(cosines)) radians for each unit of a followed number.
        apart: places of numbers that change in proportion to those while all else rests, such as where the gripper is
            from an object.
        slopes: (F + len(numbers), len(apart)) their change for each unit of a followed number, and of `numbers`.
    """

    numbers: Sequence[int]
    center: NDArray[np.float64]
    spread: NDArray[np.float64]
    frequencies: NDArray[np.float64]
    phases: NDArray[np.float64]
    weights: NDArray[np.float64]
    cosines: Sequence[int]
    turns: NDArray[np.float64]
    apart: Sequence[int]
    slopes: NDArray[np.float64]

    @property
    def places(self) -> list[int]:
        """The places of all of them."""
        return [*self.numbers, *self.apart, *self.cosines, *(place + 1 for place in self.cosines)]


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


def features_of(scaled: NDArray[np.float64], frequencies: NDArray[np.float64], phases: NDArray[np.float64]) -> Any:
    """The features (N, FEATURES + F + 1) of scaled numbers (N, F): random waves, the numbers, and one."""
    return np.concatenate([np.cos(scaled @ frequencies + phases), scaled, np.ones((len(scaled), 1))], axis=1)


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
            f"train.corrective_noise moves the robot in vectors alone, and the pictures {pictures} would show it where"
            " it was: leave it out, or choose vectors with dataset.observation_keys=[...]"
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
    followed = _followed(change, actions, early)
    if not followed:
        raise ValueError(_NOTHING_FOLLOWS)
    places = [number for number, *_ in followed]
    reach = (taken(np.minimum(seen + action_horizon, last)) - now)[:, places].std(axis=0)
    carried = _carried(now, change, early, _half_of(episode), places)
    known = {*places, *carried.places}
    relations = moving_together(demonstrations, vectors) if now.shape[1] <= MOST_NUMBERS else Relations((), ())
    things = things_of(relations, [*places, *carried.numbers], carried.cosines, known)
    others = np.setdiff1d(np.arange(now.shape[1]), [*known, *(place for thing in things for place in thing.places)])
    free = np.delete(actions, [action for _, action, _ in followed], axis=1)
    numbers = np.concatenate([*vectors.values()], axis=1)
    held = held_at(numbers, demonstrations.episode_ends, known, things)
    return Corrections(
        widths={key: values.shape[1] for key, values in vectors.items()},
        followed=[Followed(*one, float(far)) for one, far in zip(followed, reach, strict=True)],
        carried=carried,
        blurred=_blurred(now, change, change[:, places], free, early, others),
        things=things,
        held=held,
        parted=_parted(numbers, held, len(things), places, carried),
        low=np.min(demonstrations.actions, axis=0),
        high=np.max(demonstrations.actions, axis=0),
    )


def _followed(
    change: NDArray[np.float64], actions: NDArray[np.float64], early: NDArray[np.bool_]
) -> list[tuple[int, int, float]]:
    """The number, action and gain of each pair of columns (N, D), (N, A) that belongs together, one to one.

    An object that is carried changes as the action says, too, but not where nothing but the robot has moved yet. Of
    actions that are alike, such as those of two fingers, a number follows the one that explains more of it.
    """
    found: dict[int, tuple[float, int, float]] = {}
    inner = change.T @ actions
    shares = np.square(inner) / np.maximum(np.square(change).sum(axis=0)[:, None], np.finfo(np.float64).tiny)
    for action in np.flatnonzero(actions.any(axis=0)).tolist():
        for number in np.argsort(-shares[:, action])[:LIKELY].tolist():
            cause, effect = actions[:, action], change[:, number]
            gain, share = _proportional(cause, effect)
            if share >= FOLLOWS and _proportional(cause[early], effect[early])[1] >= FOLLOWS_EARLY:
                found[number] = max(found.get(number, (0.0, 0, 0.0)), (share, action, gain), key=lambda one: one[0])
                break
    return sorted(((number, action, gain) for number, (_, action, gain) in found.items()), key=lambda one: one[1])


def _blurred(
    now: NDArray[np.float64],
    change: NDArray[np.float64],
    moves: NDArray[np.float64],
    free: NDArray[np.float64],
    early: NDArray[np.bool_],
    places: NDArray[np.int64],
) -> list[Blurred]:
    """Of the numbers at the places, the velocities of the moves (N, M) and what the free actions (N, A) drive."""
    velocities = _velocities(moves, now, now + change, places)
    driven = _driven(change, free, early, np.setdiff1d(places, velocities))
    shares = dict.fromkeys(driven, BLUR_OF_DRIVEN) | dict.fromkeys(velocities, BLUR_OF_VELOCITY)
    columns = [(number, share, now[:, number]) for number, share in sorted(shares.items())]
    return [
        Blurred(number, share * float(seen.std()), float(seen.min()), float(seen.max()), number in velocities)
        for number, share, seen in columns
    ]


def _velocities(
    moves: NDArray[np.float64], now: NDArray[np.float64], after: NDArray[np.float64], places: NDArray[np.int64]
) -> list[int]:
    """Which numbers at the places are the velocity of one of the moves (N, M), by the numbers (N, D) around them."""

    def tells(move: NDArray[np.float64], place: int) -> bool:
        latest = 1 - _proportional(move, after[:, place])[1]
        return latest <= 1 - VELOCITY and LATEST * latest < 1 - _proportional(move, now[:, place])[1]

    return [place for place in places.tolist() if any(tells(move, place) for move in moves.T)]


def _driven(
    change: NDArray[np.float64], actions: NDArray[np.float64], early: NDArray[np.bool_], places: NDArray[np.int64]
) -> list[int]:
    """What the actions (N, A) drive, by the changes (N, D), of the numbers at the places."""
    moving = np.abs(change) > MOVING * np.sqrt(np.square(change).mean(axis=0))
    places = places[moving[early][:, places].sum(axis=0) >= FIRST_MOVES]
    found: set[int] = set()
    for action in actions.T:
        acts = np.abs(action) > MOVING * np.sqrt(np.square(action).mean())
        blocked = [place for place in places.tolist() if (~moving[acts, place]).sum() > BLOCKED * acts.sum()]
        shares = {
            place: _proportional(action[moving[:, place]], change[moving[:, place], place])[1] for place in blocked
        }
        found |= {place for place, share in shares.items() if share >= max(DRIVEN, AS_NEAR * max(shares.values()))}
    return sorted(found)


def _proportional(cause: NDArray[np.float64], effect: NDArray[np.float64]) -> tuple[float, float]:
    """The factor between two columns (N,), and the share of the effect that it explains, where nothing interferes."""
    kept = np.ones(len(cause), dtype=np.bool_)
    gain = float(cause @ effect) / max(float(cause @ cause), float(np.finfo(np.float64).tiny))
    kept[np.argsort(np.abs(effect - gain * cause))[len(cause) - round(INTERFERED * len(cause)) :]] = False
    cause, effect = cause[kept], effect[kept]
    total, power = float(effect @ effect), float(cause @ cause)
    if not (total > 0 and power > 0):
        return 0.0, 0.0
    return float(cause @ effect) / power, float(cause @ effect) ** 2 / (power * total)


def _half_of(episode: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows to learn from, the others being there to check: every other episode; of a single one, every other row.

    What never changes within an episode, such as a goal, could be told from another row of it, by where the robot is.
    """
    ranks = np.unique(episode, return_inverse=True)[1]
    return np.asarray((ranks if ranks.any() else np.arange(len(episode))) % 2 == 0)


def _carried(
    now: NDArray[np.float64],
    change: NDArray[np.float64],
    early: NDArray[np.bool_],
    half: NDArray[np.bool_],
    places: Sequence[int],
) -> Carried:
    """What the numbers at `places` determine: directions that turn with them, and any other function of them."""
    cosines = directions_of(now)
    moves = change[:, places]
    turned = wrapped(angles(now + change, cosines) - angles(now, cosines))
    turns: NDArray[np.float64] = np.linalg.lstsq(moves, turned, rcond=None)[0].astype(np.float64)
    linear = _share_explained(turned, moves @ turns) >= CARRIED
    cosines, turns = [place for place, fits in zip(cosines, linear, strict=True) if fits], turns[:, linear]
    known = {*places, *cosines, *(place + 1 for place in cosines)}
    learned = max((_learned(now, half, places, scale) for scale in SCALES), key=lambda one: one.shares.sum())
    numbers = [place for place in np.flatnonzero(learned.shares >= CARRIED).tolist() if place not in known]
    apart, slopes = _apart(change[early][:, [*places, *numbers]], change[early], {*known, *numbers})
    return Carried(
        numbers=numbers,
        center=learned.center,
        spread=learned.spread,
        frequencies=learned.frequencies,
        phases=learned.phases,
        weights=learned.weights[:, numbers],
        cosines=cosines,
        turns=turns,
        apart=apart,
        slopes=slopes,
    )


def _apart(
    moves: NDArray[np.float64], change: NDArray[np.float64], known: AbstractSet[int]
) -> tuple[list[int], NDArray[np.float64]]:
    """The numbers whose changes (N, D) are linear in the moves (N, M), those known left out, and slopes (M, found)."""
    scale = np.maximum(np.sqrt(np.square(moves).mean(axis=0)), np.finfo(np.float64).tiny)
    slopes: NDArray[np.float64] = np.linalg.lstsq(moves / scale, change, rcond=1e-3)[0].astype(np.float64)
    slopes /= scale[:, None]
    left, total = np.square(change - moves @ slopes).sum(axis=0), np.square(change).sum(axis=0)
    linear = (total > 0) & (left <= (1 - CARRIED) * total)
    found = [place for place in np.flatnonzero(linear).tolist() if place not in known]
    return found, slopes[:, found]


def _parted(
    numbers: NDArray[Any], held: NDArray[np.int64], things: int, places: Sequence[int], carried: Carried
) -> NDArray[np.bool_]:
    """Whether each number of `carried.apart` goes on to change with the robot while it holds a thing."""
    parted = np.zeros((things, len(carried.apart)), dtype=np.bool_)
    for thing in range(things):
        rows = np.flatnonzero((held[:-1] == thing + 1) & (held[1:] == thing + 1))
        change = numbers[rows + 1] - numbers[rows]
        apart = change[:, carried.apart]
        told = change[:, [*places, *carried.numbers]] @ carried.slopes
        parted[thing] = np.square(apart - told).sum(axis=0) < np.square(apart).sum(axis=0)
    return parted


class _Learned(NamedTuple):
    """A map from the followed numbers to all, see `Carried`, and the share of each that it explains (D,)."""

    center: NDArray[np.float64]
    spread: NDArray[np.float64]
    frequencies: NDArray[np.float64]
    phases: NDArray[np.float64]
    weights: NDArray[np.float64]
    shares: NDArray[np.float64]


def _learned(now: NDArray[np.float64], half: NDArray[np.bool_], places: Sequence[int], scale: float) -> _Learned:
    """Learn the map from half of the rows by ridge regression, and check it on the rest."""
    rng = np.random.default_rng(0)
    frequencies, phases = scale * rng.normal(size=(len(places), FEATURES)), rng.uniform(0, 2 * np.pi, FEATURES)
    followed = now[:, places]
    center, spread = followed.mean(axis=0), np.maximum(followed.std(axis=0), np.finfo(np.float64).tiny)
    features = features_of((followed - center) / spread, frequencies, phases)
    learned, checked = features[half], features[~half]
    weights = np.linalg.solve(learned.T @ learned + RIDGE * np.eye(features.shape[1]), learned.T @ now[half])
    return _Learned(center, spread, frequencies, phases, weights, _share_explained(now[~half], checked @ weights))


def _share_explained(values: NDArray[np.float64], told: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of each column's variance (N, D) that is explained; 0 for a constant one."""
    variance = values.var(axis=0)
    left = np.square(values - told).mean(axis=0)
    return np.asarray(1 - np.divide(left, variance, out=np.ones_like(left), where=variance > 0))
