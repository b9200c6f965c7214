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
# A number that stays put during each episode is a place; it may change by this share of its range.
PUT = 1e-3
# A number stops where it does not move in this many transitions on end. It meets a place if, at half as many stops as
# there are episodes, its distance to the place is the same within this share of the smaller range, and the distances to
# other episodes' places lie this many times as wide apart.
STOPPED, SAME_DISTANCE, CLOSER = 3, 0.05, 4
# With fewer episodes, unrelated numbers meet by chance.
LEAST_VISITS = 20
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

    Two numbers are alike if they move together (`moving_together`), if they end together, as the positions of an object
    and of its goal do, or if they meet, as the positions of a gripper and of a drawer do, whose handle it takes. They
    then have the same unit, and origins a constant apart at most.

    Args:
        demonstrations: the demonstrations.
        keys: the state vectors to look into.

    Returns:
        The pairs of like numbers and of like directions; none without a vector.

    Raises:
        ValueError: more numbers than can be compared.
    """
    keys = sorted(keys)
    together = moving_together(demonstrations, keys)
    vectors = [demonstrations.observations[key] for key in keys]
    if not vectors:
        return together
    ends, most = demonstrations.episode_ends, _most_rows(vectors)
    last = numbers_at(vectors, thinned(ends - 1, most))
    rows, episode = _whole_episodes(demonstrations, most)
    numbers = numbers_at(vectors, rows)
    settled = _differing(_end_together(last) | _meet(numbers, episode), np.concatenate([numbers, last]))
    return together._replace(differences=tuple(sorted({*together.differences, *settled})))


def moving_together(demonstrations: Demonstrations, keys: Iterable[str]) -> Relations:
    """Find the pairs of observed quantities that move together, as those of a gripper and of the object it carries do.

    A direction is a cosine followed by its sine; two directions are alike if they turn together.

    Args:
        demonstrations: the demonstrations.
        keys: the state vectors to look into.

    Returns:
        The pairs; none without a vector.

    Raises:
        ValueError: more numbers than can be compared.
    """
    vectors = [demonstrations.observations[key] for key in sorted(keys)]
    if not vectors:
        return Relations((), ())
    ends, most = demonstrations.episode_ends, _most_rows(vectors)
    followed = thinned(np.setdiff1d(np.arange(ends[-1]), ends - 1), most)
    now, then = numbers_at(vectors, followed), numbers_at(vectors, followed + 1)
    cosines = directions_of(np.concatenate([now, then]))
    turns = wrapped(angles(then, cosines) - angles(now, cosines))
    apart = angles(now, cosines)
    directions = [
        (cosines[i], cosines[j])
        for i, j in _pairs(_move_together(turns))
        if np.ptp(wrapped(apart[:, i] - apart[:, j])) > 0
    ]
    return Relations(tuple(_differing(_move_together(then - now), now)), tuple(directions))


def _most_rows(vectors: Sequence[NDArray[Any]]) -> int:
    """How many rows are looked into."""
    width = sum(values.shape[1] for values in vectors)
    if width > MOST_NUMBERS:
        raise ValueError(
            f"find_differences=true compares up to {MOST_NUMBERS:,} numbers, and an observation has {width:,}:"
            " choose some with dataset.observation_keys=[...], or leave it out"
        )
    return min(MOST_ROWS, MOST_COMPARISONS // max(width, 1) ** 2)


def numbers_at(vectors: Iterable[NDArray[Any]], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the numbers (N, D) of all vectors (T, *) in the rows (N,)."""
    return np.concatenate([values[rows] for values in vectors], axis=1).astype(np.float64)


def _differing(alike: NDArray[np.bool_], numbers: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Return the pairs i < j of (D, D) that differ in (N, D), so that no number is there twice."""
    return [(i, j) for i, j in _pairs(alike) if np.ptp(numbers[:, i] - numbers[:, j]) > 0]


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


def moves(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where changes (N, ...), or actions, are more than `MOVING` of their root mean square, in each column."""
    return np.abs(values) > MOVING * np.sqrt(np.square(values).mean(axis=0))


def _move_together(changes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return (D, D) whether two numbers mostly change by the same amount where both change; changes are (N, D)."""
    count = changes.shape[1]
    alike = np.zeros((count, count), dtype=np.bool_)
    if not len(changes):
        return alike
    moving = moves(changes)
    for i in range(count):
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


def _whole_episodes(demonstrations: Demonstrations, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows (N,) of evenly spaced episodes, about `most` in all, and each row's episode (N,), 0, 1, ..."""
    starts, ends = demonstrations.episode_starts, demonstrations.episode_ends
    episodes = thinned(np.arange(len(ends)), max(1, most * len(ends) // int(ends[-1])))
    rows = np.concatenate([np.arange(starts[episode], ends[episode]) for episode in episodes])
    return rows, np.repeat(np.arange(len(episodes)), demonstrations.episode_lengths[episodes])


def _meet(numbers: NDArray[np.float64], episode: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return (D, D) whether one of two numbers is a place that the other meets.

    Args:
        numbers: (N, D), all rows of some episodes.
        episode: (N,) the episode of each row, 0, 1, ...
    """
    alike = np.zeros((numbers.shape[1],) * 2, dtype=np.bool_)
    starts = np.flatnonzero(np.diff(episode, prepend=-1))
    episodes = len(starts)
    if episodes < LEAST_VISITS:
        return alike
    span, put = np.ptp(numbers, axis=0), staying_put(numbers, starts)
    places, moving = np.flatnonzero(put & (span > 0)), np.flatnonzero(~put)
    there = numbers[starts][:, places]
    for number in moving if len(places) else []:
        rows = _stops(numbers[:, number], episode)
        if len(rows) < episodes // 2:
            continue
        values = numbers[rows, number, None]
        own, *others = (
            _narrowest(values - there[(episode[rows] + shift) % episodes], episodes // 2)
            for shift in (0, 1, episodes // 3)
        )
        close = own <= SAME_DISTANCE * np.minimum(span[number], span[places])
        alike[number, places] = close & (np.minimum(*others) > CLOSER * own)
    return alike | alike.T


def staying_put(numbers: NDArray[Any], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return (D,) whether numbers (N, D) stay put during each episode; these begin in the rows `starts`."""
    spans = np.maximum.reduceat(numbers, starts) - np.minimum.reduceat(numbers, starts)
    put: NDArray[np.bool_] = (spans <= PUT * np.ptp(numbers, axis=0)).all(axis=0)
    return put


def _stops(values: NDArray[np.float64], episode: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a row of each stop of a number (N,)."""
    changes, within = np.diff(values), episode[1:] == episode[:-1]
    still = within & (np.abs(changes) <= MOVING * np.sqrt(np.square(changes[within]).mean()))
    stopped = np.convolve(still, np.ones(STOPPED), mode="valid") == STOPPED
    return np.flatnonzero(stopped & ~np.concatenate([[False], stopped[:-1]])) + STOPPED // 2


def _narrowest(distances: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return the width (P,) of the narrowest interval that holds so many of the distances (S, P)."""
    ordered = np.sort(distances, axis=0)
    width: NDArray[np.float64] = (ordered[count - 1 :] - ordered[: len(ordered) - count + 1]).min(axis=0)
    return width
