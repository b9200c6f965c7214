"""Scripted experts of two tasks of Fetch (gymnasium-robotics): reaching, and picking up an object to place it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

# Metres that the gripper moves in a control step for an action of 1.
STEP_LENGTH = 0.05
# Horizontal distance below which the gripper comes down, and vertical distance below which it closes, in metres.
ABOVE, AROUND = 0.015, 0.01
# Width between the fingers, in metres, below which they hold the object, which is 5 cm wide.
HELD = 0.053
OPEN, CLOSE = 1.0, -1.0


class FetchExpert:
    """Takes the object from above and carries it to the goal; without an object, moves to the goal.

    The height from which it comes down and its speed are drawn for each episode.
    """

    def __init__(self, observe: Callable[[], dict[str, NDArray[np.float64]]], *, picks: bool, seed: int) -> None:
        """Draw the height and the speed.

        Args:
            observe: Returns the simulator's own observation, whatever the policy observes.
            picks: Whether there is an object to pick up.
            seed: Seed of this expert, in a stream apart from the environment's.
        """
        generator = np.random.default_rng([seed, 0xFE7C])
        self._observe = observe
        self._picks = picks
        self._height = generator.uniform(0.05, 0.1)
        self._speed = generator.uniform(0.3, 0.6)

    def __call__(self, observation: Any, /) -> NDArray[np.float32]:
        """Return the action (4,) in [-1, 1]: a displacement of the gripper, and its fingers."""
        seen = self._observe()
        numbers, goal = seen["observation"], seen["desired_goal"]
        displacement, fingers = self._pick(numbers, goal) if self._picks else (goal - numbers[:3], OPEN)
        steps = self._speed * displacement / STEP_LENGTH
        return np.append(np.clip(steps, -1, 1), fingers).astype(np.float32)

    def _pick(self, numbers: NDArray[np.float64], goal: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        """The displacement that is left, and what the fingers do."""
        gripper, thing, width = numbers[:3], numbers[3:6], numbers[9] + numbers[10]
        apart = thing - gripper
        if np.linalg.norm(apart) < 2 * AROUND and width < HELD:
            return goal - thing, CLOSE
        if np.hypot(*apart[:2]) > ABOVE:
            return apart + np.array([0.0, 0.0, self._height]), OPEN
        if abs(apart[2]) > AROUND:
            return apart, OPEN
        return apart, CLOSE


def make_fetch_expert(env: gymnasium.Env[Any, Any], seed: int) -> FetchExpert:
    """Build the expert of one episode; see `envs.make_expert`.

    Raises:
        ValueError: If the environment is another one than these two tasks of Fetch.
    """
    base: Any = env.unwrapped
    title = base.spec.id if base.spec else type(base).__name__
    if not re.fullmatch(r"Fetch(Reach|PickAndPlace)(Dense)?-v\d+", title):
        raise ValueError(
            f"{title} has no scripted expert; its demonstrations must come from a dataset. Of Gymnasium's ids,"
            " FetchReach and FetchPickAndPlace have one."
        )
    return FetchExpert(base._get_obs, picks=title.startswith("FetchPickAndPlace"), seed=seed)
