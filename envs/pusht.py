"""Push-T: push a T-shaped block onto its target pose with a round finger (gym-pusht)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray

from envs.errors import MissingExtraError, choose, import_extra
from envs.pusht_geometry import (
    CORNER_DIM,
    FEATURE_DIM,
    KEYPOINT_DIM,
    pusht_agent_pos,
    pusht_features,
    pusht_keypoints,
    pusht_state_features,
)
from envs.rendering import rendering_errors, require_rgb_array
from envs.spaces import Observation, check_action

# Names the code of this file in the cache of converted demonstrations; raise it with every change of what it computes.
CACHE_REVISION = "3f303a64342c6647d7b6d63745988e2f18e57f02a2bb88d68b811a793c2b54db"
MAX_STEPS = 300
SUCCESS_COVERAGE = 0.95
PICTURE_SIZE = 96  # height and width of an observed picture, as in the public demonstrations


class PushTEnv(gymnasium.Env[Observation, NDArray[np.float32]]):
    """Push-T, observed as features, as keypoints, as corners or as a picture.

    Observation: ``"features"`` is (40,) float32, see `pusht_features`. ``"keypoints"`` is a dict of ``keypoint`` (18,)
    float32, see `pusht_keypoints`, and ``agent_pos`` (2,) float32 in pixels. ``"corners"`` is a dict of
    ``environment_state`` (16,) float32, gym-pusht's own, see `pusht_corners`, and ``agent_pos``. ``"image"`` is a dict
    of ``image`` (96, 96, 3) uint8, gym-pusht's ``pixels``, and ``agent_pos``. Action: (2,) float32 in [0, 512], the
    finger's target position in pixels. ``info["score"]`` is ``min(coverage / 0.95, 1)`` at that step (also the reward);
    ``info["is_success"]`` is True if the coverage is above 0.95, which terminates the episode. An episode is truncated
    after 300 steps (10 Hz).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    max_episode_steps = MAX_STEPS

    def __init__(self, *, render_mode: str | None = None, image_size: int = 256, observation: str = "features") -> None:
        """Build the environment.

        Args:
            render_mode: ``None`` or ``"rgb_array"``.
            image_size: Height and width of a frame that `render` draws, in pixels; observed pictures keep their size.
            observation: ``"features"``, ``"keypoints"``, ``"keypoints_agent_pos"``, ``"corners"`` or ``"image"``.

        Raises:
            MissingExtraError: If gym-pusht, a system library it needs, or a pymunk below 7 is not installed.
            ValueError: If there is no such observation.
        """
        describe: dict[str, Callable[[NDArray[np.float64]], Observation]] = {
            "features": pusht_features,
            "keypoints": lambda state: {"keypoint": pusht_keypoints(state), "agent_pos": _agent_pos(state)},
            "keypoints_agent_pos": lambda state: np.concatenate([pusht_keypoints(state), _agent_pos(state)]),
            "corners": lambda state: {"environment_state": self._corners(), "agent_pos": _agent_pos(state)},
            "image": lambda state: {"image": self._picture(), "agent_pos": _agent_pos(state)},
        }
        self._describe = describe[choose("Push-T observation", observation, describe)]
        import_extra("gym_pusht", title="Push-T (gym-pusht)", extra="pusht")
        _check_pymunk()
        from gym_pusht.envs.pusht import PushTEnv as Simulator

        self.render_mode = render_mode
        self._simulator = Simulator(
            obs_type="state",
            render_mode="rgb_array",
            visualization_width=image_size,
            visualization_height=image_size,
            observation_width=PICTURE_SIZE,
            observation_height=PICTURE_SIZE,
        )
        self._simulator._get_coverage = _ordered_coverage(self._simulator)
        self.observation_spaces = _observation_spaces()
        self.observation_space = self.observation_spaces[observation]
        self.action_space = gymnasium.spaces.Box(0.0, 512.0, (2,), np.float32)
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
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

    def set_state(self, state: ArrayLike) -> tuple[Observation, dict[str, Any]]:
        """Start an episode in an exact state (gym-pusht's own ``reset_to_state`` ends elsewhere).

        Args:
            state: (5,) agent xy, block xy (pixels), block angle (radians).

        Returns:
            The first observation and info, as `reset` does.

        Raises:
            ValueError: If the state is not five finite numbers.
        """
        state = _checked(state)
        self._simulator.reset(seed=0)  # a fresh physics space; the pose it draws is overwritten
        self._place(state)
        self._simulator.space.step(self._simulator.dt)
        return self._begin(self._simulator.get_obs())

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
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
        return self._describe(state), float(reward), bool(terminated), self._steps >= MAX_STEPS, info

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

    def _corners(self) -> NDArray[np.float32]:
        """Return gym-pusht's ``environment_state`` (16,), which the state gives only up to its last bit."""
        return self._simulator.get_keypoints(self._simulator._block_shapes).astype(np.float32).ravel()

    def _picture(self) -> NDArray[np.uint8]:
        """Draw gym-pusht's ``pixels``, (96, 96, 3) uint8: like the demonstrations, without a cross at the action."""
        with rendering_errors():
            return self._simulator._render(visualize=False)

    def draw(self, state: ArrayLike) -> NDArray[np.uint8]:
        """Draw a state that does not belong to an episode; call `reset` before the next step.

        Args:
            state: (5,), as for `set_state`.

        Returns:
            (96, 96, 3) uint8, as in the observation ``"image"``.

        Raises:
            ValueError: If the state is not five finite numbers.
        """
        self._place(_checked(state))
        # gym-pusht draws the shapes, which follow their bodies at the next physics step or when they are reindexed.
        for body in (self._simulator.agent, self._simulator.block):
            self._simulator.space.reindex_shapes_for_body(body)
        return self._picture()

    def _place(self, state: NDArray[np.float64]) -> None:
        self._simulator.agent.position = state[:2].tolist()
        # Setting the angle turns the block about its centre of gravity and so moves its origin: it has to come first.
        self._simulator.block.angle = float(state[4])
        self._simulator.block.position = state[2:4].tolist()

    def _begin(self, state: NDArray[np.float64]) -> tuple[Observation, dict[str, Any]]:
        """Clear the variables of the previous episode and describe the first state."""
        self._steps = 0
        self._simulator._last_action = None  # drawn as a marker
        coverage = self._simulator._get_coverage()
        score = min(coverage / SUCCESS_COVERAGE, 1.0)
        return self._describe(state), {"is_success": False, "score": score, "coverage": coverage}


def pusht_pictures(observations: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Turn the demonstrations' states into the observations of ``observation="image"``, each picture drawn anew.

    After `pusht_hindsight` the recorded pictures no longer agree with the states. Without it, the drawn pictures differ
    from the recorded ones by 0.08 of 255 on average.

    Args:
        observations: ``"state"`` (T, 5), and no other key.

    Returns:
        ``"image"`` (T, 96, 96, 3) uint8 and ``"agent_pos"`` (T, 2) float32.

    Raises:
        ValueError: If there is no such state, or if there is another key.
        MissingExtraError: See `PushTEnv`.
    """
    for key in observations:
        choose("Push-T observation to draw", key, ("state",))
    positions = pusht_agent_pos(observations)
    with closing(PushTEnv(observation="image")) as env:
        env.reset(seed=0)
        return {"image": np.stack([env.draw(state) for state in observations["state"]]), **positions}


def pusht_pictures_and_features(observations: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Draw the demonstrations' states, and add the observations of ``observation="features"``.

    This is for a policy that acts on pictures alone and learns to predict the features from them
    (``auxiliary=[state]``).

    Args:
        observations: As for `pusht_pictures`.

    Returns:
        The result of `pusht_pictures`, and ``"state"`` (T, 40) float32, see `pusht_features`.

    Raises:
        ValueError: As for `pusht_pictures`.
        MissingExtraError: See `PushTEnv`.
    """
    return pusht_pictures(observations) | pusht_state_features(observations)


def _checked(state: ArrayLike) -> NDArray[np.float64]:
    """Return one state as float64.

    Raises:
        ValueError: If it is not five finite numbers.
    """
    state = np.asarray(state, dtype=np.float64)
    if state.shape != (5,) or not np.isfinite(state).all():
        raise ValueError(f"A Push-T state is five finite numbers, shape (5,); got {state!r}.")
    return state


def _agent_pos(state: NDArray[np.float64]) -> NDArray[np.float32]:
    return state[:2].astype(np.float32)


def _observation_spaces() -> dict[str, gymnasium.Space[Any]]:
    """Return the space of each kind of observation."""

    def vector(size: int) -> gymnasium.Space[Any]:
        return gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)

    picture = gymnasium.spaces.Box(0, 255, (PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
    return {
        "features": vector(FEATURE_DIM),
        "keypoints": gymnasium.spaces.Dict({"keypoint": vector(KEYPOINT_DIM), "agent_pos": vector(2)}),
        "keypoints_agent_pos": vector(KEYPOINT_DIM + 2),
        "corners": gymnasium.spaces.Dict({"environment_state": vector(CORNER_DIM), "agent_pos": vector(2)}),
        "image": gymnasium.spaces.Dict({"image": picture, "agent_pos": vector(2)}),
    }


def _ordered_coverage(simulator: Any) -> Callable[[], float]:
    """Build gym-pusht's coverage function anew, over the block's two shapes in a fixed order.

    Upstream iterates a set of shapes in the order of their memory addresses, so the last bit of its reward changes from
    run to run. The goal never moves: its area is computed once, which saves as much time as the features take.
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
        MissingExtraError: If pymunk 7 or newer is installed; the message names the pin.
    """
    import pymunk

    if int(pymunk.version.split(".")[0]) >= 7:
        raise MissingExtraError(
            f"Push-T (gym-pusht) does not work with pymunk {pymunk.version}; run: pip install 'pymunk<7'"
        )
