"""Push-T: push a T-shaped block onto its target pose with a round finger (gym-pusht)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from envs.errors import MissingExtraError, check_action, import_extra
from envs.rendering import rendering_errors, require_rgb_array

MAX_STEPS = 300
SUCCESS_COVERAGE = 0.95
FEATURE_DIM = 22
TABLE_SIZE = np.float32(512)

# Corners of the T in the block's own frame, in pixels of the 512 x 512 table: the bar, then the stem,
# in the order of gym-pusht's keypoints.
_CORNERS = np.array(
    [[-60, 0], [60, 0], [60, 30], [-60, 30], [-15, 30], [15, 30], [15, 120], [-15, 120]], dtype=np.float64
)
_CORNERS.setflags(write=False)


def pusht_features(state: ArrayLike) -> NDArray[np.float32]:
    """Describe a Push-T state without the jump that an angle has at a full turn.

    Args:
        state: (..., 5) agent x, agent y, block x, block y (pixels, 0 to 512) and block angle (radians).

    Returns:
        (..., 22) float32: agent xy, block xy, cosine and sine of the block angle, and x, y of the T's eight
        corners in the world (pixels), in the order of gym-pusht's keypoints.

    Raises:
        ValueError: If the last axis is not 5 long.
    """
    state = np.asarray(state, dtype=np.float64)
    if state.ndim == 0 or state.shape[-1] != 5:
        raise ValueError(f"A Push-T state is (..., 5): agent xy, block xy, block angle; got shape {state.shape}.")
    cosine, sine = np.cos(state[..., 4:]), np.sin(state[..., 4:])
    features = np.empty((*state.shape[:-1], FEATURE_DIM), dtype=np.float32)
    features[..., :4] = state[..., :4]
    features[..., 4:5] = cosine
    features[..., 5:6] = sine
    features[..., 6::2] = state[..., 2:3] + cosine * _CORNERS[:, 0] - sine * _CORNERS[:, 1]
    features[..., 7::2] = state[..., 3:4] + sine * _CORNERS[:, 0] + cosine * _CORNERS[:, 1]
    return features


def pusht_mirror(
    observations: NDArray[np.float32], actions: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mirror Push-T episodes across the target's axis of symmetry, the table's diagonal x + y = 512.

    The T, its target, the table and the finger are all symmetric under it, so the mirror image of a demonstration is
    another valid demonstration. A point (x, y) goes to (512 - y, 512 - x), a block angle to a quarter turn less it.

    Args:
        observations: (..., 22) float32, as `pusht_features` gives them.
        actions: (..., 2) float32, target positions in pixels.

    Returns:
        The mirror images of both, of the same shapes.
    """
    mirrored = np.empty_like(observations)
    mirrored[..., [0, 2]] = TABLE_SIZE - observations[..., [1, 3]]
    mirrored[..., [1, 3]] = TABLE_SIZE - observations[..., [0, 2]]
    mirrored[..., [4, 5]] = observations[..., [5, 4]]
    # Left and right corners change places, in each of the four pairs.
    corners = observations[..., 6:].reshape(*observations.shape[:-1], 4, 2, 2)
    mirrored[..., 6:] = (TABLE_SIZE - corners[..., ::-1, ::-1]).reshape(*observations.shape[:-1], 16)
    return mirrored, TABLE_SIZE - actions[..., ::-1]


class PushTEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Push-T with the features of `pusht_features` as observation.

    Observation: (22,) float32. Action: (2,) float32 in [0, 512], the finger's target position in pixels.
    ``info["score"]`` is ``min(coverage / 0.95, 1)`` at that step (also the reward), ``info["is_success"]``
    says that the coverage is above 0.95, which terminates the episode. Truncated after 300 steps (10 Hz).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, *, render_mode: str | None = None, image_size: int = 256) -> None:
        """Build the environment.

        Args:
            render_mode: ``None`` or ``"rgb_array"``.
            image_size: Height and width of a frame, in pixels.

        Raises:
            MissingExtraError: If gym-pusht, a system library it needs, or a pymunk below 7 is not installed.
        """
        import_extra("gym_pusht", title="Push-T (gym-pusht)", extra="pusht")
        _check_pymunk()
        from gym_pusht.envs.pusht import PushTEnv as Simulator

        self.render_mode = render_mode
        self._simulator = Simulator(
            obs_type="state",
            render_mode="rgb_array",
            visualization_width=image_size,
            visualization_height=image_size,
        )
        self._simulator._get_coverage = _ordered_coverage(self._simulator)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (FEATURE_DIM,), np.float32)
        self.action_space = gymnasium.spaces.Box(0.0, 512.0, (2,), np.float32)
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode; the same seed gives the same initial state as in gym-pusht, bit for bit.

        Args:
            seed: Seed of this episode, or None to draw the next one from ``np_random``.
            options: Ignored; see `set_state` for a chosen state.

        Returns:
            The first observation, and info with ``is_success``, ``score`` and ``coverage``.
        """
        super().reset(seed=seed)
        self._simulator.np_random = self.np_random
        state, _ = self._simulator.reset()
        return self._begin(state)

    def set_state(self, state: ArrayLike) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode in an exact state (gym-pusht's own ``reset_to_state`` ends elsewhere).

        Args:
            state: (5,) agent xy, block xy (pixels), block angle (radians).

        Returns:
            What `reset` returns.

        Raises:
            ValueError: If the state is not five finite numbers.
        """
        state = np.asarray(state, dtype=np.float64)
        if state.shape != (5,) or not np.isfinite(state).all():
            raise ValueError(f"A Push-T state is five finite numbers, shape (5,); got {state!r}.")
        self._simulator.reset(seed=0)  # a fresh physics space; the pose it draws is overwritten
        self._simulator.agent.position = state[:2].tolist()
        # The angle turns the block about its centre of gravity and so moves its origin: it has to come first.
        self._simulator.block.angle = float(state[4])
        self._simulator.block.position = state[2:4].tolist()
        self._simulator.space.step(self._simulator.dt)
        return self._begin(self._simulator.get_obs())

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Move the finger towards ``action`` for one control step (0.1 s).

        Args:
            action: (2,) target position in pixels.

        Returns:
            Observation, reward (the score), terminated (success), truncated (at 300 steps) and info.

        Raises:
            ValueError: If the action is not two finite numbers.
        """
        check_action(action, 2)
        state, reward, terminated, _, info = self._simulator.step(np.asarray(action, dtype=np.float64))
        self._steps += 1
        info["is_success"] = bool(terminated)
        info["score"] = float(reward)
        return pusht_features(state), float(reward), bool(terminated), self._steps >= MAX_STEPS, info

    def render(self) -> NDArray[np.uint8]:
        """Draw the table, (image_size, image_size, 3) uint8.

        Raises:
            RenderingUnavailableError: If ``render_mode`` is None.
        """
        require_rgb_array(self.render_mode)
        with rendering_errors():
            return self._simulator.render()

    def close(self) -> None:
        """Close the simulator."""
        self._simulator.close()

    def _begin(self, state: NDArray[np.float64]) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Clear what outlives an episode and describe its first state."""
        self._steps = 0
        self._simulator._last_action = None  # drawn as a marker
        coverage = self._simulator._get_coverage()
        score = min(coverage / SUCCESS_COVERAGE, 1.0)
        return pusht_features(state), {"is_success": False, "score": score, "coverage": coverage}


def _ordered_coverage(simulator: Any) -> Callable[[], float]:
    """Build gym-pusht's coverage anew, over the block's two shapes in a fixed order.

    Upstream iterates a set of shapes, whose order is that of memory addresses, so its reward wavers in the
    last bit from run to run. The goal never moves; measuring it once makes up for the features' cost.
    """
    from gym_pusht.envs.pusht import pymunk_to_shapely

    simulator.reset(seed=0)
    goal = pymunk_to_shapely(simulator.get_goal_pose_body(simulator.goal_pose), simulator._block_shapes)

    def coverage() -> float:
        block = pymunk_to_shapely(simulator.block, simulator._block_shapes)
        return float(goal.intersection(block).area / goal.area)

    return coverage


def _check_pymunk() -> None:
    """Refuse pymunk 7, which dropped the collision handlers that gym-pusht uses.

    Raises:
        MissingExtraError: Naming the pin.
    """
    import pymunk

    if int(pymunk.version.split(".")[0]) >= 7:
        raise MissingExtraError(
            f"Push-T (gym-pusht) does not work with pymunk {pymunk.version}; run: pip install 'pymunk<7'"
        )
