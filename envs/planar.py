"""Planar: pass a round obstacle on the left or on the right, both equally good.

It is a test bed for multimodality on which a policy trains in seconds. The demonstrations split evenly between the
two sides, and the mean of the two paths runs straight into the obstacle: a policy that averages fails, and a policy
that samples succeeds.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from envs.rendering import require_rgb_array
from envs.spaces import check_action

MAX_STEPS = 80
CONTROL_HZ = 10
STEP_LENGTH = 0.04  # distance covered in one control step at full speed
AGENT_RADIUS = 0.05
OBSTACLE_RADIUS = 0.3  # centred at the origin
GOAL_RADIUS = 0.08
START_Y, GOAL_Y = -0.8, 0.8
# Half widths of the boxes from which start and goal are drawn. The start's is narrow: further off the axis of symmetry
# one side would be nearer, and an averaging policy could take that side.
SPREAD = np.array([[0.02, 0.1], [0.1, 0.1]])
PASSING_X = 0.55  # where the expert passes the obstacle

Disc = tuple[Any, float, tuple[int, int, int]]  # centre xy, radius, RGB colour


class PlanarEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A disc drives from the bottom of the square [-1, 1]^2 to its top, past an obstacle in the middle.

    Observation: (4,) float32 in [-1, 1]: agent xy, goal xy. Action: (2,) float32 in [-1, 1]: velocity,
    where 1 covers 0.04 in a control step (10 Hz); components outside are clipped. Reaching the goal
    terminates the episode with success, touching the obstacle terminates it without. ``info["score"]`` is 1 on
    success, else the fraction of the initial distance to the goal covered so far. The reward is 1 on success and 0
    otherwise. An episode is truncated after 80 steps; the expert needs about 45.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}  # noqa: RUF012
    max_episode_steps = MAX_STEPS

    def __init__(self, *, render_mode: str | None = None, image_size: int = 256) -> None:
        """Build the environment.

        Args:
            render_mode: ``None`` or ``"rgb_array"``.
            image_size: Height and width of a frame, in pixels.
        """
        self.render_mode = render_mode
        self.image_size = image_size
        self.observation_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._agent = np.array([0.0, START_Y])
        self._goal = np.array([0.0, GOAL_Y])
        self._trail = [self._agent]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Draw a start and a goal, both centred on the axis of symmetry.

        Args:
            seed: Seed of this episode, or None to go on with the current ``np_random``.
            options: Ignored.

        Returns:
            The first observation and ``{"is_success": False, "score": 0.0}``.
        """
        super().reset(seed=seed)
        start_offset, goal_offset = SPREAD * self.np_random.uniform(-1.0, 1.0, size=(2, 2))
        self._agent = np.array([0.0, START_Y]) + start_offset
        self._goal = np.array([0.0, GOAL_Y]) + goal_offset
        self._trail = [self._agent]
        return self._observation(), {"is_success": False, "score": 0.0}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Move for one control step (0.1 s).

        Args:
            action: (2,) velocity in [-1, 1].

        Returns:
            Observation, reward (1 on success), terminated (goal or obstacle), truncated (at 80 steps) and
            info.

        Raises:
            ValueError: If the action is not two finite numbers.
        """
        check_action(action, 2)
        velocity = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        self._agent = np.clip(self._agent + STEP_LENGTH * velocity, -1.0, 1.0)
        self._trail.append(self._agent)
        collided = bool(np.hypot(*self._agent) <= OBSTACLE_RADIUS + AGENT_RADIUS)
        distance = float(np.hypot(*(self._agent - self._goal)))
        is_success = not collided and distance <= GOAL_RADIUS
        initial_distance = float(np.hypot(*(self._trail[0] - self._goal)))
        score = 1.0 if is_success else min(max(1.0 - distance / initial_distance, 0.0), 1.0)
        truncated = len(self._trail) - 1 >= MAX_STEPS
        info = {"is_success": is_success, "score": score, "collided": collided}
        return self._observation(), float(is_success), is_success or collided, truncated, info

    def render(self) -> NDArray[np.uint8]:
        """Draw obstacle, goal, trail and agent, (image_size, image_size, 3) uint8, y pointing up.

        Raises:
            RenderingUnavailableError: If ``render_mode`` is None.
        """
        require_rgb_array(self.render_mode)
        frame = np.full((self.image_size, self.image_size, 3), 255, dtype=np.uint8)
        discs: list[Disc] = [
            ((0.0, 0.0), OBSTACLE_RADIUS, (70, 70, 70)),
            (self._goal, GOAL_RADIUS, (140, 210, 140)),
            *((point, 0.01, (150, 170, 220)) for point in self._trail),
            (self._agent, AGENT_RADIUS, (40, 80, 200)),
        ]
        centres = (np.arange(self.image_size) + 0.5) * 2.0 / self.image_size - 1.0
        x, y = centres[None, :], -centres[:, None]
        for (disc_x, disc_y), radius, colour in discs:
            frame[(x - disc_x) ** 2 + (y - disc_y) ** 2 <= radius**2] = colour
        return frame

    def _observation(self) -> NDArray[np.float32]:
        """Return agent xy and goal xy, (4,) float32."""
        return np.concatenate([self._agent, self._goal]).astype(np.float32)


class PlanarExpert:
    """Drives past the obstacle on a side drawn once per episode, then straight to the goal."""

    def __init__(self, seed: int) -> None:
        """Draw the side.

        Args:
            seed: Seed of this expert. Its random stream is independent of an environment's with the same seed, so the
                side does not depend on the start.
        """
        self.side = float(np.random.default_rng([seed, 0x51DE]).choice([-1.0, 1.0]))

    def __call__(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map an observation (4,) to a velocity (2,) float32 in [-1, 1]."""
        agent, goal = observation[:2], observation[2:]
        target = goal if agent[1] >= 0.0 else np.array([self.side * PASSING_X, 0.05])
        displacement = (target - agent) / STEP_LENGTH
        return (displacement / max(1.0, float(np.hypot(*displacement)))).astype(np.float32)


def make_planar_expert(env: gymnasium.Env[Any, Any], seed: int) -> PlanarExpert:
    """Build the expert of one episode; see `envs.make_expert`."""
    return PlanarExpert(seed)
