"""Demonstrations as arrays in which one episode follows the other; the arrays may be mapped from disk."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy.common.files import distinct_names
from policy.data.frames import Frames
from policy.data.joined_array import JoinedArray

Arrays = Mapping[str, NDArray[Any]]
# A symmetry of the task: a function that maps observations by key (..., *shape) and actions (..., action_dim) to their
# images under the symmetry.
Augment = Callable[[Arrays, NDArray[np.float32]], tuple[Arrays, NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Demonstrations:
    """Episodes of observations and the actions taken on them.

    Transition t of an episode is the pair (observation, action taken on it); the observation after the last action is
    not kept.

    Attributes:
        observations: (N, *shape) under each key: float32 vectors, or uint8 images (height, width, channels), which may
            be `Frames` of videos. A vector that has no key in the file gets the key `state`, such an image the key
            `image`. Those of several datasets are a `JoinedArray`, as their actions are.
        actions: (N, action_dim) float32.
        episode_ends: (E,) int64, exclusive end of each episode in the N transitions.
        episode_names: the file's name of each episode; by default the episode's number.
        held_out: numbers of the episodes that the file sets aside for validation.
        originals: (E,) int64, for each episode the number of the one that it was made from: its own number, unless
            relabelling made several demonstrations of an episode, of which the first is the original.
        source: the file or folder, for messages.
        joined_from: the files or folders of several datasets that were joined; empty for a single one.
        metadata: the file's description of itself (`env`, `rate_hz`), JSON data; `envs` where several datasets are of
            different environments.
        skipped: episodes left out as bad, name to reason.
        read_with: the settings that chose what is read of the files, or changed it; JSON data.
        decode_workers: processes that decode frames of videos ahead of a training; 0 decodes in the training's own.

    Raises:
        ValueError: the arrays have different lengths, or the ends do not cut them into episodes.
    """

    observations: Arrays
    actions: NDArray[np.float32]
    episode_ends: NDArray[np.int64]
    episode_names: Sequence[str] = ()
    held_out: Sequence[int] = ()
    originals: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    source: str = "memory"
    joined_from: Sequence[str] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    read_with: Mapping[str, Any] = field(default_factory=dict)
    decode_workers: int = 0

    def __post_init__(self) -> None:
        ends, total = self.episode_ends, len(self.actions)
        if self.actions.ndim != 2:
            raise ValueError(f"{self.source}: actions must be (transitions, width); got shape {self.actions.shape}")
        if ends.ndim != 1 or len(ends) == 0 or ends[0] <= 0 or (np.diff(ends) <= 0).any() or ends[-1] != total:
            raise ValueError(
                f"{self.source}: the ends of {len(ends)} episodes do not cut its {total} transitions into episodes of"
                " one transition or more; the file is damaged or was written partly"
            )
        for key, values in self.observations.items():
            if len(values) != total:
                raise ValueError(f"{self.source}: observation {key!r} has {len(values)} rows, actions have {total}")
        # NumPy would copy a non-contiguous array as a whole each time a batch is taken from it.
        whole = {key: _contiguous(values) for key, values in self.observations.items()}
        object.__setattr__(self, "observations", whole)
        object.__setattr__(self, "actions", _contiguous(self.actions))
        if not len(self.originals):
            object.__setattr__(self, "originals", np.arange(len(ends)))
        if not self.episode_names:
            object.__setattr__(self, "episode_names", [str(number) for number in range(len(ends))])

    @property
    def num_episodes(self) -> int:
        """The number of episodes E."""
        return len(self.episode_ends)

    @property
    def num_originals(self) -> int:
        """The number of episodes in the files: without the demonstrations that relabelling made besides their own."""
        return len(np.unique(self.originals))

    @property
    def name(self) -> str:
        """The name of the dataset, or the names of several: of the file or folder, without what is common to them."""
        return ", ".join(distinct_names(self.joined_from or [self.source]))

    @property
    def frames(self) -> dict[str, Frames]:
        """The observations whose pictures are in videos, by key."""
        arrays: Mapping[str, Any] = self.observations
        return {key: values for key, values in arrays.items() if isinstance(values, Frames)}

    @property
    def episode_starts(self) -> NDArray[np.int64]:
        """The first transition of each episode, (E,) int64."""
        return np.concatenate([np.zeros(1, np.int64), self.episode_ends[:-1]])

    @property
    def episode_lengths(self) -> NDArray[np.int64]:
        """The number of transitions of each episode, (E,) int64."""
        return np.diff(self.episode_ends, prepend=0)

    @property
    def observation_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one observation under each key."""
        return {key: tuple(values.shape[1:]) for key, values in self.observations.items()}

    def checksum(self) -> str:
        """Return the CRC-32 of the ends of the episodes, the actions and the vectors.

        Pictures are left out: they may be many, and may stay in their videos.
        """
        ends, aside = (np.asarray(numbers, np.int64)[:, None] for numbers in (self.episode_ends, self.held_out))
        arrays: list[Any] = [ends, aside, self.actions, *(self.observations[key] for key in sorted(self.observations))]
        vectors = [values for values in arrays if values.ndim == 2]
        parts = [part for values in vectors for part in (values.parts if isinstance(values, JoinedArray) else [values])]
        return f"{reduce(lambda crc, part: zlib.crc32(part.data, crc), parts, 0):08x}"


def _contiguous(values: Any) -> Any:
    return values if isinstance(values, Frames | JoinedArray) else np.ascontiguousarray(values)
