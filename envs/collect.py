"""Collect successful demonstrations from a scripted expert."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

from envs.checked import BROKE_OFF
from envs.spaces import Observation

LOGGER = logging.getLogger(__name__)
MAX_ATTEMPTS_PER_EPISODE = 10


class Expert(Protocol):
    """A scripted demonstrator for one episode."""

    def __call__(self, observation: Any, /) -> NDArray[np.float32]:
        """Map an observation, (D,) or arrays by key, to an action (A,) inside the action space."""
        ...


@dataclass(frozen=True)
class RecordedEpisode:
    """One demonstration of T control steps; the arrays are laid out as in Minari.

    Attributes:
        seed: ``env.reset(seed=seed)`` gives the initial state again.
        observations: (T + 1, D) float32, or such arrays and pictures (T + 1, H, W, C) uint8 by key; the last one was
            observed after the last action.
        actions: (T, A) float32, the expert's own, also where noise was added to the executed ones.
        rewards: (T,) float32.
        terminations: (T,) bool.
        truncations: (T,) bool; the last one is True if the demonstration was cut after its success.
        is_success: (T,) bool, success at each step; some tasks lose it again.
    """

    seed: int
    observations: Observation
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]
    is_success: NDArray[np.bool_]

    def __len__(self) -> int:
        """Return the number of control steps T."""
        return len(self.actions)


# The name under which `envs` exports it.
Episode = RecordedEpisode

ExpertFactory = Callable[[gymnasium.Env[Any, Any], int], Expert]
"""Builds the expert of one episode from the environment and the episode's seed."""


def collect_episodes(
    env: gymnasium.Env[Any, Any],
    expert_factory: ExpertFactory,
    *,
    episodes: int,
    seed: int,
    noise: float = 0.0,
    linger_steps: int = 10,
) -> Iterator[RecordedEpisode]:
    """Yield successful demonstrations; failed attempts are skipped and logged.

    Attempt i uses the seed ``seed + i``, so the result depends on the arguments alone.

    Args:
        env: Environment to act in.
        expert_factory: Called as ``expert_factory(env, episode_seed)`` before each attempt.
        episodes: Number of demonstrations to yield, at least 1.
        seed: Seed of the first attempt, at least 0.
        noise: Standard deviation of Gaussian noise on the executed action, as a fraction of half the action range.
            The noise widens the set of visited states; the recorded actions are the expert's own, without noise.
        linger_steps: Control steps recorded after the first success. The number is small, because a policy learns
            nothing from an idle tail.

    Yields:
        One `RecordedEpisode` per success.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: If ten attempts per episode do not yield enough successes.
    """
    for label, value, least in (
        ("episodes", episodes, 1),
        ("seed", seed, 0),
        ("noise", noise, 0),
        ("linger_steps", linger_steps, 0),
    ):
        if not value >= least:
            raise ValueError(f"{label}={value} is out of range; it must be at least {least}.")
    return _collect(env, expert_factory, episodes, seed, noise, linger_steps)


def _collect(
    env: gymnasium.Env[Any, Any],
    expert_factory: ExpertFactory,
    episodes: int,
    seed: int,
    noise: float,
    linger_steps: int,
) -> Iterator[RecordedEpisode]:
    collected = 0
    attempts = episodes * MAX_ATTEMPTS_PER_EPISODE
    for attempt in range(attempts):
        episode_seed = seed + attempt
        expert = expert_factory(env, episode_seed)
        episode = _play(env, expert, episode_seed, noise, linger_steps)
        if episode is None or not episode.is_success.any():
            LOGGER.info("seed %d: the expert failed, skipped", episode_seed)
            continue
        yield episode
        collected += 1
        if collected == episodes:
            LOGGER.info("%d demonstrations from %d attempts", collected, attempt + 1)
            return
    raise RuntimeError(
        f"Only {collected} of {episodes} demonstrations succeeded in {attempts} attempts (seeds {seed} to "
        f"{seed + attempts - 1}, noise={noise}); lower the noise or check the expert."
    )


def _play(
    env: gymnasium.Env[Any, Any], expert: Expert, seed: int, noise: float, linger_steps: int
) -> RecordedEpisode | None:
    """Play one attempt until ``linger_steps`` control steps after its first success, or to its end.

    Returns:
        The episode, or None if the simulator broke it off.
    """
    space = env.action_space
    assert isinstance(space, gymnasium.spaces.Box)
    noise_scale = noise * (space.high - space.low) / 2.0
    generator = np.random.default_rng([seed, 0x4015E])
    observation, info = env.reset(seed=seed)
    if BROKE_OFF in info:
        return None
    # Copies, because a simulator or an expert may use one array for all of its answers.
    observations, actions, rewards, terminations, truncations, successes = [deepcopy(observation)], [], [], [], [], []
    done, remaining = False, linger_steps
    while not done:
        action = expert(observation)
        executed = action
        if noise > 0:
            noisy = action + noise_scale * generator.standard_normal(action.shape)
            executed = np.clip(noisy, space.low, space.high).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(executed)
        if BROKE_OFF in info:
            return None
        observations.append(deepcopy(observation))
        actions.append(np.array(action))
        rewards.append(reward)
        terminations.append(terminated)
        successes.append(info["is_success"])
        remaining -= any(successes[:-1])
        cut = any(successes) and remaining == 0
        truncations.append(truncated or (cut and not terminated))
        done = terminated or truncated or cut
    return RecordedEpisode(
        seed=seed,
        observations=_stacked(observations),
        actions=np.asarray(actions, dtype=np.float32),
        rewards=np.asarray(rewards, dtype=np.float32),
        terminations=np.asarray(terminations, dtype=np.bool_),
        truncations=np.asarray(truncations, dtype=np.bool_),
        is_success=np.asarray(successes, dtype=np.bool_),
    )


def _stacked(observations: Sequence[Any]) -> Observation:
    if isinstance(observations[0], dict):
        return {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}
    return np.stack(observations)
