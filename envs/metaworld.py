"""Meta-World's fifty manipulation tasks, each reset reproducible from its seed, and their scripted experts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from envs.errors import choose, import_extra
from envs.rendering import SceneRenderer, require_rgb_array
from envs.spaces import Observation, check_action

OBSERVATION_DIM = 39
FEATURES_DIM = 30
ACTION_DIM = 4
MAX_REWARD = 10.0
HAND_DIM = 4
OBSERVATIONS = {"state": OBSERVATION_DIM, "features": OBSERVATION_DIM + FEATURES_DIM}  # width of each kind of vector
PICTURE_SIZE = 96  # height and width of an observed picture
# Where the camera is that pictures are observed from; from its place upstream, objects are a pixel or two large.
NEAR_CAMERA, NEAR_POSITION = "corner2", (0.75, 0.075, 0.7)
# Metres. A few centimetres decide whether a grasp succeeds, and the workspace is about a metre wide.
NEAR = 0.05


class MetaWorldEnv(gymnasium.Env[Observation, NDArray[np.float32]]):
    """One Meta-World task with an observable goal, as in the MT1 benchmark.

    Observation: (39,) float32: hand xyz, gripper opening, object poses (14 numbers), the same numbers of the previous
    step, and the goal's xyz. With ``observation="features"`` it is (69,): these, then `metaworld_features`. With
    ``observation="image"`` it is a dict of ``image`` (96, 96, 3) uint8, the camera's picture, and ``hand`` (4,)
    float32, hand xyz and gripper opening; the camera ``corner2`` is then nearer to the table, as in Seo et al. 2022.
    Action: (4,) float32 in [-1, 1]: hand displacement (1 = 1 cm per control step) and gripper effort.

    Upstream ignores ``reset(seed=...)`` and cycles through 50 frozen goals. Here the seed creates the generator that
    draws the goal and the initial poses from the task's own randomisation space, so every seed has a goal of its own.
    Tests hold for all 50 tasks that an episode does not depend on earlier ones.

    ``info["is_success"]`` is the task's own criterion at that step; success does not terminate the episode,
    and many tasks lose it again. ``info["score"]`` is 1 at success, else ``clip(reward / 10, 0, 1)``, and 0 at
    reset, when there is no reward yet. An episode is truncated after 500 steps (80 Hz).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012
    max_episode_steps = 500

    def __init__(
        self,
        task: str = "pick-place-v3",
        *,
        observation: str = "state",
        render_mode: str | None = None,
        camera: str = "corner2",
        image_size: int = 256,
    ) -> None:
        """Build the task.

        Args:
            task: One of the 50 task names, such as ``"pick-place-v3"``.
            observation: ``"state"``; ``"features"``, the state and the relative positions of its parts; or ``"image"``.
            render_mode: ``None`` or ``"rgb_array"``.
            camera: Camera of `render` and of observed pictures.
            image_size: Height and width of a frame that `render` draws, in pixels; observed pictures keep their size.

        Raises:
            MissingExtraError: If Meta-World, or a system library it needs, is not installed.
            ValueError: If the task, the kind of observation or the camera does not exist.
        """
        import_extra("metaworld", title="Meta-World", extra="metaworld")
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        self.task = choose("Meta-World task", task, ALL_V3_ENVIRONMENTS)
        self.observation_spaces = _observation_spaces()
        self.observation = choose("observation", observation, self.observation_spaces)
        self.render_mode = render_mode
        self.image_size = image_size
        self._simulator = _observable_task(ALL_V3_ENVIRONMENTS[task])
        model = self._simulator.model
        self.camera = choose("camera", camera, [model.camera(i).name for i in range(model.ncam)])
        if observation == "image":
            model.camera(NEAR_CAMERA).pos[:] = NEAR_POSITION
        # Most of Meta-World's cameras hang upside down: the z component of their up vector is negative.
        self._upside_down = bool(self._simulator.data.camera(camera).xmat[7] < -1e-6)
        self.observation_space = self.observation_spaces[observation]
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
        self._scene = SceneRenderer(image_size)
        self._observed_scene = SceneRenderer(PICTURE_SIZE)
        self.state = np.zeros(OBSERVATION_DIM, np.float32)  # the newest, whatever is observed of it

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; the same seed gives the same goal and initial state, bit for bit.

        Args:
            seed: Seed of this episode, or None to draw the next one from ``np_random``.
            options: Ignored.

        Returns:
            The first observation and ``{"is_success": False, "score": 0.0}``.
        """
        super().reset(seed=seed)
        simulator = self._simulator
        simulator.np_random = self.np_random
        # This is how upstream makes its goals: it draws one, freezes it and resets. Upstream's reset() builds the scene
        # twice, and the second pass of some tasks reads positions set by the first: both must use the same draw.
        simulator._freeze_rand_vec = False
        simulator.reset_model()
        simulator._freeze_rand_vec = True
        observation, _ = simulator.reset()
        return self._observed(observation), {"is_success": False, "score": 0.0}

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Advance by one control step (12.5 ms).

        Args:
            action: (4,) in [-1, 1].

        Returns:
            Observation, reward in [0, 10], terminated (never), truncated (at 500 steps) and info.

        Raises:
            ValueError: If the action is not four finite numbers, or the episode is over.
        """
        check_action(action, ACTION_DIM)
        observation, reward, terminated, truncated, info = self._simulator.step(action)
        info["is_success"] = bool(info["success"])
        # Some tasks count as solved well before their reward reaches its maximum.
        info["score"] = 1.0 if info["is_success"] else min(max(float(reward) / MAX_REWARD, 0.0), 1.0)
        return self._observed(observation), float(reward), terminated, truncated, info

    def task_of(self, seed: int) -> str:
        """The task that an episode of this seed plays, as in `envs.metaworld_tasks`."""
        return self.task

    def _observed(self, state: NDArray[np.float64]) -> Observation:
        self.state = state.astype(np.float32)
        if self.observation == "image":
            return {"image": self._drawn(self._observed_scene), "hand": self.state[:HAND_DIM]}
        if self.observation == "features":
            return np.concatenate([state, metaworld_features(state)]).astype(np.float32)
        return self.state

    def render(self) -> NDArray[np.uint8]:
        """Draw the scene, (image_size, image_size, 3) uint8, upright.

        Raises:
            RenderingUnavailableError: If this machine cannot render, or ``render_mode`` is None.
        """
        require_rgb_array(self.render_mode)
        return self._drawn(self._scene)

    def close(self) -> None:
        """Free what draws."""
        self._scene.close()
        self._observed_scene.close()

    def _drawn(self, scene: SceneRenderer) -> NDArray[np.uint8]:
        frame = scene.draw(self._simulator.model, self._simulator.data, self.camera)
        return np.ascontiguousarray(frame[::-1, ::-1]) if self._upside_down else frame


def _observation_spaces() -> dict[str, gymnasium.spaces.Space[Any]]:
    """The space of each kind of observation."""

    def vector(width: int) -> gymnasium.spaces.Box:
        return gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32)

    picture = gymnasium.spaces.Box(0, 255, (PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
    return {
        **{kind: vector(width) for kind, width in OBSERVATIONS.items()},
        "image": gymnasium.spaces.Dict({"image": picture, "hand": vector(HAND_DIM)}),
    }


def metaworld_features(state: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Relative positions of hand, both objects and goal, in metres and magnified near zero.

    Args:
        state: (39,) a Meta-World observation.

    Returns:
        (30,) five differences d of positions, each xyz, then tanh(d / 5 cm) of all of them.
    """
    hand, first, second, goal = state[:3], state[4:7], state[11:14], state[36:39]
    differences = np.concatenate([first - hand, second - hand, goal - hand, goal - first, second - first])
    return np.concatenate([differences, np.tanh(differences / NEAR)])


class MetaWorldExpert:
    """Meta-World's scripted policy for one task, clipped to the action space."""

    def __init__(self, task: str) -> None:
        """Look the scripted policy up.

        Args:
            task: One of the 50 task names.
        """
        import_extra("metaworld", title="Meta-World", extra="metaworld")
        from metaworld.policies import ENV_POLICY_MAP

        policy_class: Any = ENV_POLICY_MAP[choose("Meta-World task", task, ENV_POLICY_MAP)]
        self._policy = policy_class()

    def __call__(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map an observation, whose first 39 numbers are the state, to an action (4,) float32 in [-1, 1]."""
        with warnings.catch_warnings():
            # "Constant(s) may be too high. Environments clip response": the action is clipped below.
            warnings.simplefilter("ignore")
            action = self._policy.get_action(observation[:OBSERVATION_DIM].astype(np.float64))
        return np.clip(action, -1.0, 1.0).astype(np.float32)


def make_metaworld_expert(env: gymnasium.Env[Any, Any], seed: int) -> Callable[[Any], NDArray[np.float32]]:
    """Build the expert of one episode of either Meta-World family; see `envs.make_expert`.

    Raises:
        ValueError: If the environment is not one of Meta-World.
    """
    base: Any = env.unwrapped
    if not hasattr(base, "task_of"):
        raise ValueError(f"The 'metaworld' expert needs a Meta-World environment, got {type(base).__name__}.")
    expert = MetaWorldExpert(base.task_of(seed))
    if isinstance(base, MetaWorldEnv) and base.observation == "image":
        return lambda _: expert(base.state)
    return expert


def _observable_task(task_class: Any) -> Any:
    """Build a bare Meta-World task whose goal is part of the observation and is drawn by a generator."""
    simulator = task_class()
    simulator._partially_observable = False
    del simulator.sawyer_observation_space  # a cached property that depends on the line above
    simulator._set_task_called = True
    simulator.seeded_rand_vec = True
    return simulator
