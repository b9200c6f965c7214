"""Episodes of rollouts, written down as they end, so that a dataset can be made of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from policy.common.observations import Observation
from policy.data.minari_writer import RecordedObservations
from policy.data.recording import write_episode
from policy.rollout.episodes import Env, MakeEnv


@dataclass
class RolledOut:
    """One episode of T control steps, laid out as in Minari.

    Attributes:
        seed: of the episode.
        observations: (T + 1, *shape), or such arrays by key; the last one was observed after the last action.
        actions: (T, action_dim) float32, as they were executed.
        rewards: (T,) float64.
        terminations: (T,) bool.
        truncations: (T,) bool; the last one is True if the episode was ended by its success.
    """

    seed: int
    observations: RecordedObservations
    actions: NDArray[np.float32]
    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]


class EpisodeRecorder(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment that writes down each of its episodes in the step in which it ends, at success as a rollout does.

    An episode whose result is known is thus on disk. One that the simulator broke off is not written.

    Args:
        env: an environment of `envs.make`.
        folder: receives a file for each episode, see `write_episode`.
    """

    def __init__(self, env: Env, folder: Path) -> None:
        super().__init__(env)
        self.paused = False
        self._folder = folder
        self._seed: int | None = None  # of the episode that is recorded now
        self._observations: list[Observation] = []
        self._steps: list[tuple[NDArray[np.float32], float, bool, bool]] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """See `gymnasium.Env.reset`; every episode has a seed."""
        observation, info = self.env.reset(seed=seed, **({} if options is None else {"options": options}))
        self._seed = None if self.paused or info.get("broke_off") else seed
        self._observations, self._steps = [copy.deepcopy(observation)], []
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """See `gymnasium.Env.step`."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if info.get("broke_off"):
            self._seed = None
        if self._seed is not None:
            success = bool(info["is_success"])
            self._observations.append(copy.deepcopy(observation))  # a simulator may use its buffer again
            cut = success and not terminated
            self._steps.append((np.array(action, np.float32), float(reward), bool(terminated), bool(truncated or cut)))
            if success or terminated or truncated:
                write_episode(self._folder, self._recorded(self._seed))
                self._seed = None
        return observation, reward, terminated, truncated, info

    def _recorded(self, seed: int) -> RolledOut:
        actions, rewards, terminations, truncations = zip(*self._steps, strict=True)
        return RolledOut(
            seed=seed,
            observations=_stacked(self._observations),
            actions=np.stack(actions),
            rewards=np.array(rewards, np.float64),
            terminations=np.array(terminations, np.bool_),
            truncations=np.array(truncations, np.bool_),
        )


def _stacked(observations: Sequence[Any]) -> RecordedObservations:
    first = observations[0]
    if isinstance(first, Mapping):
        return {key: np.stack([one[key] for one in observations]) for key in first}
    return np.stack(observations)


@dataclass(frozen=True)
class Recording:
    """Makes environments that record; picklable, for rollout processes.

    Attributes:
        make_env: makes an environment.
        folder: see `EpisodeRecorder`.
    """

    make_env: MakeEnv
    folder: Path

    def __call__(self, **settings: Any) -> Env:
        """Make an environment."""
        return EpisodeRecorder(self.make_env(**settings), self.folder)


@contextmanager
def unrecorded(env: Env) -> Iterator[None]:
    """Record none of the episodes that an environment begins inside."""
    part: Any = env
    while isinstance(part, gymnasium.Wrapper) and not isinstance(part, EpisodeRecorder):
        part = part.env
    if not isinstance(part, EpisodeRecorder):
        yield
        return
    part.paused = True
    try:
        yield
    finally:
        part.paused = False
