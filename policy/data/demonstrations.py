"""Demonstrations in memory: episodes laid end to end, with nothing between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Augment = Callable[[Any, NDArray[np.float32]], tuple[Any, NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Demonstrations:
    """Episodes of observations and the actions taken on them.

    Transition t of an episode is the pair (observation seen, action then taken); what was seen after the last
    action is not part of it.

    Attributes:
        observations: (N, *shape) under each key; the key of a plain vector is `state`.
        actions: (N, action_dim) float32.
        episode_ends: (E,) int64, exclusive end of each episode in the N transitions.
        source: where they came from, for messages.
        metadata: what the file says of itself (the environment, say), JSON data.
    """

    observations: Mapping[str, NDArray[Any]]
    actions: NDArray[np.float32]
    episode_ends: NDArray[np.int64]
    source: str = "memory"
    metadata: Mapping[str, Any] = field(default_factory=dict)

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
        for key, values in {**self.observations, "actions": self.actions}.items():
            if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
                row = int(np.argwhere(~np.isfinite(values))[0][0])
                episode = int(np.searchsorted(ends, row, side="right"))
                raise ValueError(
                    f"{self.source}: {key!r} holds a NaN or infinity in episode {episode}, transition"
                    f" {row - int(self.episode_starts[episode])}; repair or remove that episode"
                )

    @property
    def num_episodes(self) -> int:
        """E."""
        return len(self.episode_ends)

    @property
    def episode_starts(self) -> NDArray[np.int64]:
        """(E,) int64, first transition of each episode."""
        return np.concatenate([np.zeros(1, np.int64), self.episode_ends[:-1]])

    @property
    def observation_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one observation under each key."""
        return {key: tuple(values.shape[1:]) for key, values in self.observations.items()}

    def augmented(self, augment: Augment) -> Demonstrations:
        """These episodes followed by their images under a symmetry of the task.

        Episode e has its image at e + num_episodes.

        Args:
            augment: maps observations (an array, or arrays by key where there are several) and actions to images.

        Returns:
            Twice the episodes.
        """
        plain = set(self.observations) == {"state"}
        observations, actions = augment(self.observations["state"] if plain else self.observations, self.actions)
        images = {"state": observations} if plain else observations
        return dataclasses.replace(
            self,
            observations={key: np.concatenate([values, images[key]]) for key, values in self.observations.items()},
            actions=np.concatenate([self.actions, actions]),
            episode_ends=np.concatenate([self.episode_ends, self.episode_ends + self.episode_ends[-1]]),
        )

    def first(self, episodes: int | None) -> Demonstrations:
        """The first so many episodes; None keeps all.

        Raises:
            ValueError: fewer than 1, or more than there are.
        """
        if episodes is None:
            return self
        if not 1 <= episodes <= self.num_episodes:
            raise ValueError(f"{self.source} has {self.num_episodes} episodes; max_episodes asks for {episodes}")
        end = int(self.episode_ends[episodes - 1])
        return dataclasses.replace(
            self,
            observations={key: values[:end] for key, values in self.observations.items()},
            actions=self.actions[:end],
            episode_ends=self.episode_ends[:episodes],
        )
