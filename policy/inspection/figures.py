"""The figures of a dataset: its episodes, its keys, and the times in its training windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy.common.control_rate import stated_rate
from policy.common.progress import progress
from policy.data.demonstrations import Demonstrations
from policy.data.windows import BLOCK_ROWS, Windows
from policy.model.normalizer import Limits, Normalizer

# Bytes of one array that are processed at a time: 65,536 pictures would be gigabytes.
BLOCK_BYTES = 64 * 2**20
# Frames of videos that are decoded for the figures.
VIDEO_FRAMES = 200
HISTOGRAM_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Range:
    """Smallest, mean and largest value, in the data's units."""

    min: float
    mean: float
    max: float


@dataclass(frozen=True, kw_only=True)
class KeyFigures:
    """One array of the demonstrations.

    Attributes:
        key: the key of the observation, or `actions`.
        shape: shape of one observation or action.
        dtype: dtype of the stored values.
        whole: range over all dimensions.
        dimensions: range of each dimension of a vector, or of each channel of an image.
        constant: dimensions with one value only.
        nearly_constant: dimensions that change a little, and that the normaliser treats as constant.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    whole: Range
    dimensions: list[Range]
    constant: list[int]
    nearly_constant: list[int]


@dataclass(frozen=True, kw_only=True)
class WindowTimes:
    """The times within its episode that one training window holds.

    Attributes:
        place: a description of the window's place in its episode.
        now: time of the newest observation.
        observations: obs_horizon times, oldest first.
        actions: action_horizon times.
        masked: for each action, whether it is left out of the loss.
    """

    place: str
    now: int
    observations: list[int]
    actions: list[int]
    masked: list[bool]


@dataclass(frozen=True, kw_only=True)
class EpisodeFigures:
    """Figures of the episodes as a whole.

    Attributes:
        count: number of good episodes, and of the demonstrations that relabelling made of them.
        originals: number of good episodes.
        transitions: number of transitions in all of them.
        min: transitions of the shortest episode.
        median: median of the episodes' transitions.
        max: transitions of the longest episode.
        histogram: first length, last length and number of episodes of each bin.
        held_out: names of the episodes that the file sets aside for validation.
        bad: name of each episode that is left out, and the reason.
        identical: names of episodes with the same content, in groups.
        held_out_copies: number of held-out episodes with a copy among the training episodes.
        idle_share: fraction of the actions that repeat the previous one; None if no action has a previous one.
    """

    count: int
    originals: int
    transitions: int
    min: int
    median: float
    max: int
    histogram: list[tuple[int, int, int]]
    held_out: list[str]
    bad: dict[str, str]
    identical: list[list[str]]
    held_out_copies: int
    idle_share: float | None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All figures of a dataset; `asdict` turns them into JSON data.

    Attributes:
        source: the file or folder.
        format: the format; None if unknown.
        env: the settings of the environment that the file names, or its name alone, or the list of those that several
            files name; None if it names none.
        rate_hz: control steps per second; None if the file does not state it.
        episodes: figures of the episodes as a whole.
        keys: figures of the observations, then of the actions.
        obs_horizon: observations in a window.
        action_horizon: actions in a window.
        execution_horizon: actions executed before the next plan.
        window_episode: name of the episode that the windows belong to, which has median length.
        window_episode_length: number of its transitions.
        windows: its first, middle and last window.
    """

    source: str
    format: str | None
    env: Any
    rate_hz: float | None
    episodes: EpisodeFigures
    keys: list[KeyFigures]
    obs_horizon: int
    action_horizon: int
    execution_horizon: int
    window_episode: str
    window_episode_length: int
    windows: list[WindowTimes]


def inspect_dataset(
    demonstrations: Demonstrations, *, obs_horizon: int, action_horizon: int, execution_horizon: int
) -> Inspection:
    """Compute all figures of a dataset, one block of rows after the other.

    Args:
        demonstrations: the dataset; it may be mapped from disk and larger than memory.
        obs_horizon: observations in a training window, 1 or more.
        action_horizon: actions in a training window, 1 or more.
        execution_horizon: actions executed before the next plan, 1..action_horizon.

    Returns:
        The figures.

    Raises:
        ValueError: a value is not finite; the message names its key.
    """
    arrays = arrays_of(demonstrations)
    keys = progress(arrays.items(), total=len(arrays), desc="inspect", unit="key")
    lengths = demonstrations.episode_lengths
    # For an even number of episodes this is the lower of the two medians, so that an episode has this length.
    typical = int(np.argsort(lengths, kind="stable")[(len(lengths) - 1) // 2])
    metadata = demonstrations.metadata
    return Inspection(
        source=demonstrations.source,
        format=metadata.get("format"),
        env=metadata.get("env") or metadata.get("envs") or metadata.get("env_name"),
        rate_hz=stated_rate(metadata.get("rate_hz")),
        keys=[key_figures(key, _of_videos(values) if key in demonstrations.frames else values) for key, values in keys],
        episodes=episode_figures(demonstrations),
        obs_horizon=obs_horizon,
        action_horizon=action_horizon,
        execution_horizon=execution_horizon,
        window_episode=demonstrations.episode_names[typical],
        window_episode_length=int(lengths[typical]),
        windows=window_times(demonstrations, typical, obs_horizon=obs_horizon, action_horizon=action_horizon),
    )


def key_figures(key: str, values: NDArray[Any]) -> KeyFigures:
    """Compute the range of each dimension of an array, and find the dimensions without information.

    Args:
        key: the array's name.
        values: (N, D) vectors, or (N, height, width, channels) images, whose dimensions are their channels.

    Returns:
        The figures.

    Raises:
        ValueError: a value is not finite.
    """
    limits, total = Limits(), np.zeros(math.prod(values.shape[1:]))
    for start, end in _blocks(values, 0, len(values)):
        rows = values[start:end].reshape(end - start, -1)
        limits.update(rows)
        total += rows.sum(axis=0, dtype=np.float64)
    width = values.shape[-1]
    low, high = (limit.reshape(-1, width) for limit in limits)
    low, high, mean = low.min(axis=0), high.max(axis=0), (total / len(values)).reshape(-1, width).mean(axis=0)
    normalizer = Normalizer((width,))
    try:
        normalizer.fit(low, high)
    except ValueError as error:
        raise ValueError(f"{key!r}: {error}") from error
    flat = (normalizer.half_range == 0).numpy()
    return KeyFigures(
        key=key,
        shape=tuple(values.shape[1:]),
        dtype=str(values.dtype),
        whole=Range(min=float(low.min()), mean=float(mean.mean()), max=float(high.max())),
        dimensions=[Range(min=float(a), mean=float(b), max=float(c)) for a, b, c in zip(low, mean, high, strict=True)],
        constant=np.flatnonzero(flat & (low == high)).tolist(),
        nearly_constant=np.flatnonzero(flat & (low != high)).tolist(),
    )


def episode_figures(demonstrations: Demonstrations) -> EpisodeFigures:
    """Compute the figures of the episodes as a whole.

    Args:
        demonstrations: the episodes.

    Returns:
        The figures.
    """
    lengths, names, held_out = demonstrations.episode_lengths, demonstrations.episode_names, demonstrations.held_out
    groups, aside = identical_episodes(demonstrations), set(held_out)
    return EpisodeFigures(
        count=demonstrations.num_episodes,
        originals=demonstrations.num_originals,
        transitions=len(demonstrations.actions),
        min=int(lengths.min()),
        median=float(np.median(lengths)),
        max=int(lengths.max()),
        histogram=length_histogram(lengths),
        held_out=[names[number] for number in held_out],
        bad=dict(demonstrations.skipped),
        identical=[[names[number] for number in group] for group in groups],
        held_out_copies=sum(len(aside & set(group)) for group in groups if set(group) - aside),
        idle_share=idle_share(demonstrations),
    )


def length_histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Count episodes by length, in bins of whole transitions.

    Args:
        lengths: transitions of each episode, (E,) int64.

    Returns:
        First length, last length and number of episodes of each bin.

    Example:
        >>> length_histogram(np.array([3, 3, 5]))
        [(3, 3, 2), (4, 4, 0), (5, 5, 1)]
    """
    low, high = int(lengths.min()), int(lengths.max())
    width = -(-(high - low + 1) // HISTOGRAM_BINS)
    counts = np.bincount((lengths - low) // width)
    return [(low + n * width, min(low + (n + 1) * width - 1, high), int(count)) for n, count in enumerate(counts)]


def identical_episodes(demonstrations: Demonstrations) -> list[list[int]]:
    """Find groups of episodes whose observations and actions are equal byte for byte; videos are not compared.

    Args:
        demonstrations: the episodes.

    Returns:
        The numbers of the episodes in each group; a group has two or more.
    """
    found: dict[bytes, list[int]] = {}
    bounds = zip(demonstrations.episode_starts.tolist(), demonstrations.episode_ends.tolist(), strict=True)
    for number, (start, end) in enumerate(bounds):
        digest = blake2b(str(end - start).encode(), digest_size=16)
        for key, values in arrays_of(demonstrations).items():
            if key in demonstrations.frames:
                continue
            for low, high in _blocks(values, start, end):
                digest.update(np.ascontiguousarray(values[low:high]).data)
        found.setdefault(digest.digest(), []).append(number)
    return [group for group in found.values() if len(group) > 1]


def idle_share(demonstrations: Demonstrations) -> float | None:
    """Compute the fraction of the actions that equal the previous action of their episode.

    Args:
        demonstrations: the episodes.

    Returns:
        The fraction, 0 to 1, of the actions that have a previous one; None if every episode is one transition long.
    """
    actions, starts = demonstrations.actions, demonstrations.episode_starts
    repeats = 0
    for start, end in _blocks(actions, 1, len(actions)):
        same = (actions[start:end] == actions[start - 1 : end - 1]).all(axis=1)
        first, last = np.searchsorted(starts, [start, end])
        same[starts[first:last] - start] = False  # before an episode's first action stands one of another episode
        repeats += int(same.sum())
    possible = len(actions) - len(starts)
    return repeats / possible if possible else None


def window_times(
    demonstrations: Demonstrations, episode: int, *, obs_horizon: int, action_horizon: int
) -> list[WindowTimes]:
    """List the times that an episode's first, middle and last training window hold.

    The windows are gathered as in training, from an episode whose observations and actions are replaced by their times.
    The neighbouring episodes are replaced too: if windows crossed an episode's ends, their times would show it.

    Args:
        demonstrations: the episodes, of which only the ends are used.
        episode: the episode's number.
        obs_horizon: observations in a window.
        action_horizon: actions in a window.

    Returns:
        The three windows.
    """
    first = max(episode - 1, 0)
    ends = demonstrations.episode_ends[first : episode + 2] - demonstrations.episode_starts[first]
    length = int(demonstrations.episode_lengths[episode])
    times: NDArray[Any] = np.arange(ends[-1])[:, None] - (ends[episode - first] - length)
    clock = Demonstrations(observations={"time": times}, actions=times, episode_ends=ends)
    windows = Windows(clock, np.array([episode - first]), obs_horizon=obs_horizon, action_horizon=action_horizon)
    chosen = {"the first window": 0, "a window in the middle": length // 2, "the last window": length - 1}
    batch = windows.gather(np.array(list(chosen.values())))
    return [
        WindowTimes(
            place=place,
            now=now,
            observations=batch["observations"]["time"][row, :, 0].tolist(),
            actions=batch["actions"][row, :, 0].tolist(),
            masked=(~batch["mask"][row]).tolist(),
        )
        for row, (place, now) in enumerate(chosen.items())
    ]


def spread(available: int, wanted: int) -> list[int]:
    """Spread numbers evenly over 0..available - 1, both ends included.

    >>> spread(9, 3)
    [0, 4, 8]
    """
    return sorted(set(np.linspace(0, available - 1, min(wanted, available)).round().astype(int).tolist()))


def _of_videos(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Frames of videos, evenly spread: decoding all of them may take hours."""
    return values.take(np.array(spread(len(values), VIDEO_FRAMES)), axis=0)


def arrays_of(demonstrations: Demonstrations) -> dict[str, NDArray[Any]]:
    """The observations by key, then the actions."""
    return {**demonstrations.observations, "actions": demonstrations.actions}


def _blocks(values: NDArray[Any], start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of consecutive blocks of the rows from start to end."""
    rows = min(BLOCK_ROWS, max(1, BLOCK_BYTES // max(1, values[:1].nbytes)))
    for low in range(start, end, rows):
        yield low, min(low + rows, end)
