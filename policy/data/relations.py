"""Finds observed quantities that are alike, so that a policy can observe their differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from policy.data.demonstrations import Demonstrations

# A relation shows in a few thousand transitions or ends of episodes; more only take longer.
MOST_ROWS = 20_000
# Every number is compared with every other in every row: this many comparisons take seconds.
MOST_COMPARISONS = 4_000_000_000
MOST_NUMBERS = 2_000
# A pair of numbers is judged by the transitions in which both move. There must be this share of them, and this number.
LEAST_SHARE, LEAST_NUMBER = 0.005, 30
# A number moves where it changes by more than this share of its usual change, the root mean square.
MOVING = 0.1
# Two changes are equal if they differ by less than this share of the larger one.
EQUAL = 0.1
# In this share of the transitions in which both numbers move, the changes of like numbers are equal.
MOSTLY = 0.5
# The values at the ends of the episodes are equal if they differ by less than this share of their spread.
SAME_END, LEAST_EPISODES = 0.2, 10
# Two numbers next to each other are a direction if their squares always sum up to 1, within UNIT, and both vary by more
# than TURNED.
UNIT, TURNED = 1e-3, 0.1


class Relations(NamedTuple):
    """Pairs of like quantities, as places in the vector of all numbers, the keys in sorted order.

    Attributes:
        differences: pairs (i, j), i < j, of numbers.
        direction_differences: pairs (i, j), i < j, of the first numbers of two directions.
    """

    differences: tuple[tuple[int, int], ...]
    direction_differences: tuple[tuple[int, int], ...]


def state_vectors(demonstrations: Demonstrations, auxiliary: Sequence[str]) -> list[str]:
    """Return the keys of the vectors that a policy observes.

    Args:
        demonstrations: the demonstrations.
        auxiliary: keys of privileged observations.
    """
    shapes = demonstrations.observation_shapes
    return [key for key, shape in shapes.items() if len(shape) == 1 and key not in auxiliary]


def find_relations(demonstrations: Demonstrations, keys: Iterable[str]) -> Relations:
    """Find the pairs of observed quantities whose difference means something, without names or units.

    Two numbers are alike if they move together, as the positions of a gripper and of the object that it carries do, or
    if they end together, as the positions of an object and of its goal do. They then have the same unit and origin.
    A direction is a cosine followed by its sine; two directions are alike if they turn together.

    Args:
        demonstrations: the demonstrations.
        keys: the state vectors to look into.

    Returns:
        The pairs of like numbers and of like directions; none without a vector.

    Raises:
        ValueError: more numbers than can be compared.
    """
    vectors = [demonstrations.observations[key] for key in sorted(keys)]
    if not vectors:
        return Relations((), ())
    width = sum(values.shape[1] for values in vectors)
    if width > MOST_NUMBERS:
        raise ValueError(
            f"find_differences=true compares up to {MOST_NUMBERS:,} numbers, and an observation has {width:,}:"
            " choose some with dataset.observation_keys=[...], or leave it out"
        )
    most = min(MOST_ROWS, MOST_COMPARISONS // max(width, 1) ** 2)

    def taken(rows: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.concatenate([values[rows] for values in vectors], axis=1).astype(np.float64)

    ends = demonstrations.episode_ends
    followed = thinned(np.setdiff1d(np.arange(ends[-1]), ends - 1), most)
    now, then, last = taken(followed), taken(followed + 1), taken(thinned(ends - 1, most))
    alike = _move_together(then - now) | _end_together(last)
    seen = np.concatenate([now, last])  # a number that is there twice differs from itself by nothing
    numbers = [(i, j) for i, j in _pairs(alike) if np.ptp(seen[:, i] - seen[:, j]) > 0]
    cosines = directions_of(seen)
    turns = wrapped(angles(then, cosines) - angles(now, cosines))
    apart = angles(seen, cosines)
    directions = [
        (cosines[i], cosines[j])
        for i, j in _pairs(_move_together(turns))
        if np.ptp(wrapped(apart[:, i] - apart[:, j])) > 0
    ]
    return Relations(tuple(numbers), tuple(directions))


def number_names(widths: Mapping[str, int]) -> list[str]:
    """Name each number of state vectors by its key and place; `widths` holds how many each has, in their order.

    >>> number_names({"arm": 2, "goal": 1})
    ['arm[0]', 'arm[1]', 'goal[0]']
    """
    return [f"{key}[{place}]" for key, width in widths.items() for place in range(width)]


def _pairs(alike: NDArray[np.bool_]) -> list[tuple[int, int]]:
    return [(i, j) for i, j in np.argwhere(np.triu(alike, 1)).tolist()]


def directions_of(numbers: NDArray[np.float64]) -> list[int]:
    """Return the columns of cosines that are followed by their sines; numbers are (N, D)."""
    lengths = np.square(numbers[:, :-1]) + np.square(numbers[:, 1:])
    turned = (np.ptp(numbers, axis=0) > TURNED) if len(numbers) else np.zeros(numbers.shape[1], dtype=np.bool_)
    found: list[int] = []
    for place in np.flatnonzero((np.abs(lengths - 1) < UNIT).all(axis=0) & turned[:-1] & turned[1:]).tolist():
        if not found or place > found[-1] + 1:  # its cosine is not the sine of the one before
            found.append(place)
    return found


def angles(numbers: NDArray[Any], cosines: Sequence[int]) -> NDArray[np.float64]:
    """Return the angles (..., number of directions) in radians, of numbers (..., D)."""
    return np.arctan2(numbers[..., [place + 1 for place in cosines]], numbers[..., list(cosines)])


def wrapped(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return angles within -π..π."""
    return np.asarray((angles + np.pi) % (2 * np.pi) - np.pi)


def thinned(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return up to `most` of the rows, evenly spaced."""
    return rows[:: max(1, -(-len(rows) // most))]


def _move_together(changes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return (D, D) whether two numbers mostly change by the same amount where both change; changes are (N, D)."""
    usual = np.sqrt(np.square(changes).mean(axis=0)) if len(changes) else np.zeros(changes.shape[1])
    moving = np.abs(changes) > MOVING * usual
    alike = np.zeros((len(usual), len(usual)), dtype=np.bool_)
    for i in range(len(usual)):
        rows = moving[:, i]
        mine, others = changes[rows, i, None], changes[rows]
        both = moving[rows]
        equal = both & (np.abs(mine - others) < EQUAL * np.maximum(np.abs(mine), np.abs(others)))
        enough = both.sum(axis=0) >= max(LEAST_NUMBER, LEAST_SHARE * len(changes))
        alike[i] = enough & (equal.sum(axis=0) >= MOSTLY * both.sum(axis=0))
    return alike


def _end_together(last: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return (D, D) whether two numbers are equal at the ends of the episodes, though these differ; last is (E, D)."""
    spread = last.std(axis=0)
    if len(last) < LEAST_EPISODES:
        return np.zeros((len(spread), len(spread)), dtype=np.bool_)
    apart = np.sqrt([np.square(last - last[:, i, None]).mean(axis=0) for i in range(len(spread))])
    alike: NDArray[np.bool_] = apart < SAME_END * np.minimum(spread, spread[:, None])
    return alike
