"""What is carried along by the numbers that follow the action: those that they determine."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from policy.data.holding import NOTHING
from policy.data.relations import angles, directions_of, wrapped

# Another number is carried along if the numbers that follow actions determine it, to this share of its variance in
# episodes that were not used to find out.
CARRIED = 0.98
# Random features of the map to the carried numbers (Rahimi and Recht, NIPS 2007), their scales for inputs of unit
# variance, of which the best is taken, and the ridge.
FEATURES, SCALES, RIDGE = 1_000, (0.3, 0.6, 1.2), 1e-4
# What moves less than this share of what it usually moves, while all else rests, tells nothing of what moves with it.
STILL = 1e-3


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


def find_carried(
    now: NDArray[np.float64],
    change: NDArray[np.float64],
    early: NDArray[np.bool_],
    episode: NDArray[np.int64],
    places: Sequence[int],
) -> Carried:
    """Find what the numbers at `places` determine: directions that turn with them, and any other function of them.

    Args:
        now: (N, D) numbers at transitions.
        change: (N, D) their changes in the transitions.
        early: (N,) whether a transition lies in the first part of its episode.
        episode: (N,) the episode of each transition.
        places: of the numbers that follow the action.

    Returns:
        What is carried along.
    """
    cosines = directions_of(now)
    moves = change[:, places]
    turned = wrapped(angles(now + change, cosines) - angles(now, cosines))
    turns: NDArray[np.float64] = np.linalg.lstsq(moves, turned, rcond=None)[0].astype(np.float64)
    linear = _share_explained(turned, moves @ turns) >= CARRIED
    cosines, turns = [place for place, fits in zip(cosines, linear, strict=True) if fits], turns[:, linear]
    half = _half_of(episode)
    known = {*places, *cosines, *(place + 1 for place in cosines)}
    learned = max((_learned(now, half, places, scale) for scale in SCALES), key=lambda one: one.shares.sum())
    numbers = [place for place in np.flatnonzero(learned.shares >= CARRIED).tolist() if place not in known]
    apart, slopes = _apart(change, [*places, *numbers], early, {*known, *numbers})
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


def find_parted(
    numbers: NDArray[Any], held: NDArray[np.int64], things: int, places: Sequence[int], carried: Carried
) -> NDArray[np.bool_]:
    """Find whether each number of `carried.apart` goes on to change with the robot while it holds a thing.

    Args:
        numbers: (N, D) numbers at all transitions, in order.
        held: (N,) what the robot holds, see `held_at`.
        things: how many things there are.
        places: of the numbers that follow the action.
        carried: what these carry along.

    Returns:
        (things, len(carried.apart)).
    """
    parted = np.zeros((things, len(carried.apart)), dtype=np.bool_)
    for thing in range(things):
        holds = held == NOTHING + 1 + thing
        rows = np.flatnonzero(holds[:-1] & holds[1:])
        change = numbers[rows + 1] - numbers[rows]
        apart = change[:, carried.apart]
        told = change[:, [*places, *carried.numbers]] @ carried.slopes
        parted[thing] = np.square(apart - told).sum(axis=0) < np.square(apart).sum(axis=0)
    return parted


def _apart(
    change: NDArray[np.float64], movers: Sequence[int], early: NDArray[np.bool_], known: AbstractSet[int]
) -> tuple[list[int], NDArray[np.float64]]:
    """The numbers whose changes (N, D) are early linear in those of `movers`, those known left out; slopes (M, found).

    A mover that rests early has a slope of 0.
    """
    moves, change, usual = change[early][:, movers], change[early], _size(change[:, movers])
    scale = _size(moves)
    moving = scale > STILL * usual
    slopes = np.zeros((len(movers), change.shape[1]))
    slopes[moving] = np.linalg.lstsq(moves[:, moving] / scale[moving], change, rcond=1e-3)[0] / scale[moving, None]
    left, total = np.square(change - moves @ slopes).sum(axis=0), np.square(change).sum(axis=0)
    linear = (total > 0) & (left <= (1 - CARRIED) * total)
    found = [place for place in np.flatnonzero(linear).tolist() if place not in known]
    return found, slopes[:, found]


def _size(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The root of the mean square of each column of (N, D)."""
    return np.asarray(np.sqrt(np.square(values).mean(axis=0)))


def _half_of(episode: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows to learn from, the others being there to check: every other episode; of a single one, every other row.

    What never changes within an episode, such as a goal, could be told from another row of it, by where the robot is.
    """
    ranks = np.unique(episode, return_inverse=True)[1]
    return np.asarray((ranks if ranks.any() else np.arange(len(episode))) % 2 == 0)


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
    features = _features_of((followed - center) / spread, frequencies, phases)
    learned, checked = features[half], features[~half]
    weights = np.linalg.solve(learned.T @ learned + RIDGE * np.eye(features.shape[1]), learned.T @ now[half])
    return _Learned(center, spread, frequencies, phases, weights, _share_explained(now[~half], checked @ weights))


def _share_explained(values: NDArray[np.float64], told: NDArray[np.float64]) -> NDArray[np.float64]:
    """The share of each column's variance (N, D) that is explained; 0 for a constant one."""
    variance = values.var(axis=0)
    left = np.square(values - told).mean(axis=0)
    return np.asarray(1 - np.divide(left, variance, out=np.ones_like(left), where=variance > 0))


def _features_of(scaled: NDArray[np.float64], frequencies: NDArray[np.float64], phases: NDArray[np.float64]) -> Any:
    """The features (N, FEATURES + F + 1) of scaled numbers (N, F): random waves, the numbers, and one."""
    return np.concatenate([np.cos(scaled @ frequencies + phases), scaled, np.ones((len(scaled), 1))], axis=1)
