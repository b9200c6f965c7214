"""A probe of the simulator before a run: whether a seed fixes the episode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from policy.rollout.episodes import Env
from policy.rollout.recording import unrecorded

STEPS = 10

# What was observed after the reset and after each control step, with the reward: one flat array each.
Trajectory = list[NDArray[np.float64]]


def trajectory(env: Env, seed: int) -> Trajectory:
    """Play the first control steps of an episode, with actions that depend on its seed alone.

    Args:
        env: an environment of `envs.make`.
        seed: the episode's seed.

    Returns:
        STEPS + 1 arrays, or fewer if the episode ends before.
    """
    with unrecorded(env):
        return list(_played(env, seed))


def _played(env: Env, seed: int) -> Iterator[NDArray[np.float64]]:
    assert isinstance(env.action_space, Box)
    low, high = bounded(env.action_space)
    generator = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    yield flat(observation)
    for _ in range(STEPS):
        if "broke_off" in info:
            return
        observation, reward, terminated, truncated, info = env.step(generator.uniform(low, high).astype(np.float32))
        yield np.append(flat(observation), float(reward))
        if terminated or truncated:
            return


def bounded(space: Box) -> tuple[NDArray[Any], NDArray[Any]]:
    """The bounds of an action space, which may have none, or some that are too far apart for a float."""
    return np.clip(space.low, -1e3, 1e3), np.clip(space.high, -1e3, 1e3)


def flat(observation: Any) -> NDArray[np.float64]:
    """All numbers of an observation in one array."""
    parts: Sequence[Any] = list(observation.values()) if isinstance(observation, dict) else [observation]
    return np.concatenate([np.ravel(part).astype(np.float64) for part in parts])


def difference(first: Trajectory, second: Trajectory) -> str | None:
    """Say where two trajectories part; None if they do not, to within what rounding explains."""
    for step in range(max(len(first), len(second))):
        where = f"after {step} control step{'s' if step > 1 else ''}" if step else "at its start"
        if step >= min(len(first), len(second)):
            return where
        if not np.allclose(first[step], second[step], rtol=1e-5, atol=1e-6):
            return where
    return None


def unrepeatable(env: Env, seed: int) -> tuple[Trajectory, str]:
    """Reset with a seed, with another, and with the first one again.

    Args:
        env: an environment of `envs.make`.
        seed: the first seed of the run.

    Returns:
        The seed's trajectory, for a comparison with another process's, and a warning: empty if the seed fixes it.
    """
    first = trajectory(env, seed)
    trajectory(env, seed + 1)
    where = difference(first, trajectory(env, seed))
    return first, "" if where is None else warning(seed, f"was reset again with it, {where}")


def warning(seed: int, found: str) -> str:
    """The warning for a seed that does not fix the episode."""
    return (
        f"seed {seed} does not fix the episode: it differed when the simulator {found}. Results cannot be repeated, and"
        " cells are compared as unpaired. A simulator takes its randomness from self.np_random, after"
        " super().reset(seed=seed)"
    )
