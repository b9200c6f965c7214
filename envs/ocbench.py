"""OCBench's 27 manipulation tasks that run on a CPU, from state and from pictures, and their scripted controllers."""

from __future__ import annotations

import difflib
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import gymnasium
import numpy as np
from numpy.typing import NDArray

from envs.errors import import_extra
from envs.rendering import SceneRenderer, require_rgb_array
from envs.spaces import Observation, check_action

ACTION_DIM = 7
CAMERAS = ("front", "side", "wrist")  # in the order of the simulator's pictures
VERSION = "-v0"
# Tells the stream of the expert's own draws from others that start from the same seed.
EXPERT_STREAM = 0x0CBE


class OCBenchEnv(gymnasium.Env[Any, NDArray[np.float32]]):
    """One OCBench task: a UR5e arm with a gripper moves cubes and disks, presses buttons, opens drawers and windows.

    Observation: a float32 vector whose first 19 numbers are the robot (6 joint angles, 6 joint velocities, xyz of the
    gripper, cosine and sine of its yaw, its opening and contact) and whose others are the objects; positions are in
    decimetres. The tasks ``visual-*`` have three pictures instead, keys ``front``, ``side`` and ``wrist``. The goal of
    a task is fixed and not part of the observation.
    Action: (7,) float32 in [-1, 1]: displacements of the six joints and of the gripper's opening. It is clipped.

    Success ends an episode, and so does a state from which the task cannot be solved any more.
    """

    def __init__(
        self,
        task: str = "block-cpu-lite-single-task1",
        *,
        render_mode: str | None = None,
        image_size: int = 224,
        p_mistake: float = 0.0,
        max_episode_steps: int | None = None,
    ) -> None:
        """Build the task.

        Args:
            task: A registered id without its version, such as ``"block-cpu-lite-single-task1"`` or
                ``"visual-block-cpu-lite-single-task1"``.
            render_mode: ``None`` or ``"rgb_array"``.
            image_size: Height and width of a picture, in pixels, both observed and rendered.
            p_mistake: Probability that the expert starts a sub-task with a mistake, which it corrects afterwards; the
                environment does not depend on it.
            max_episode_steps: Control steps after which an episode is truncated, by default as the task is registered.

        Raises:
            MissingExtraError: If OCBench, or a system library that it needs, is not installed.
            ValueError: If the task does not exist or needs a GPU, or a number is out of range.
        """
        if not 0.0 <= p_mistake <= 1.0:
            raise ValueError(f"p_mistake={p_mistake} is out of range; it is a probability, from 0 to 1.")
        self.task = _chosen(task)
        self.p_mistake = p_mistake
        self.render_mode = render_mode
        self.image_size = image_size
        self.is_visual = task.startswith("visual-")
        spec = gymnasium.spec(task + VERSION)
        self.max_episode_steps = max_episode_steps or spec.max_episode_steps
        self.simulator: Any = gymnasium.make(
            spec, max_episode_steps=max_episode_steps, disable_env_checker=True, width=image_size, height=image_size
        )
        # Frees what draws before the interpreter tears OpenGL down, even if nobody calls close().
        self._finalizer = weakref.finalize(self, self.simulator.close)
        self._bare = cast(Any, self.simulator.unwrapped)
        self._scene = SceneRenderer(image_size)
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": round(1.0 / self._bare.control_timestep()),
        }
        self.info: dict[str, Any] = {}  # the simulator's own, of the newest observation: what the controllers see
        self.observation_space = self._plain_space()
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; the same seed gives the same initial state.

        Args:
            seed: Seed of this episode, or None to go on with the simulator's generator.
            options: Ignored.

        Returns:
            The first observation and ``{"is_success": False, "score": 0.0}``.
        """
        observation, self.info = self.simulator.reset(seed=seed)
        return self._plain(observation), {"is_success": False, "score": 0.0}

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Advance by one control step (0.1 s).

        Args:
            action: (7,) finite numbers, clipped to [-1, 1].

        Returns:
            Observation, reward (1 on success), terminated, truncated and info.

        Raises:
            ValueError: If the action is not seven finite numbers.
        """
        check_action(action, ACTION_DIM)
        observation, reward, terminated, truncated, self.info = self.simulator.step(np.clip(action, -1.0, 1.0))
        is_success = bool(self.info["success"])
        outcome = {"is_success": is_success, "score": float(is_success)}
        return self._plain(observation), float(reward), bool(terminated), bool(truncated), outcome

    def render(self) -> NDArray[np.uint8]:
        """Draw the scene from the front, (image_size, image_size, 3) uint8, without shadows.

        Raises:
            RenderingUnavailableError: If this machine cannot render, or ``render_mode`` is None.
        """
        require_rgb_array(self.render_mode)
        return self._scene.draw(self._bare.model, self._bare.data, CAMERAS[0])

    def close(self) -> None:
        """Free what draws."""
        self._finalizer()
        self._scene.close()

    def _plain_space(self) -> gymnasium.spaces.Space[Any]:
        if self.is_visual:
            picture = gymnasium.spaces.Box(0, 255, (self.image_size, self.image_size, 3), np.uint8)
            return gymnasium.spaces.Dict({camera: picture for camera in CAMERAS})
        width = self.simulator.observation_space.shape
        return gymnasium.spaces.Box(-np.inf, np.inf, width, np.float32)

    def _plain(self, observation: NDArray[Any]) -> Observation:
        if self.is_visual:
            return dict(zip(CAMERAS, observation, strict=True))
        return observation.astype(np.float32)


class OCBenchExpert:
    """OCBench's controller for one episode, clipped to the action space.

    A controller sees the simulator's own quantities, not the observation, and makes random choices: how fast it moves,
    in which order, by which way. It takes them from numpy's global generator, which is therefore lent the expert's own
    state during each call and gets its own back afterwards.
    """

    def __init__(self, env: OCBenchEnv, seed: int) -> None:
        """Prepare the expert; the controller starts with the first observation.

        Args:
            env: The environment that the episode is played in.
            seed: Seed of the controller's choices.
        """
        self._env = env
        self._random: Any = np.random.MT19937([seed, EXPERT_STREAM]).state
        self._controller: Any = None

    def __call__(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map the newest observation of the environment to an action (7,) float32 in [-1, 1]."""
        with self._own_randomness():
            if self._controller is None:
                self._controller = _controller(self._env)
                self._controller.reset(observation, self._env.info)
            action = self._controller.select_action(observation, self._env.info)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        others: Any = np.random.get_state(legacy=False)  # noqa: NPY002
        np.random.set_state(self._random)  # noqa: NPY002
        try:
            yield
        finally:
            self._random = np.random.get_state(legacy=False)  # noqa: NPY002
            np.random.set_state(others)  # noqa: NPY002


def make_ocbench_expert(env: gymnasium.Env[Any, Any], seed: int) -> OCBenchExpert:
    """Build the expert of one episode; see `envs.make_expert`.

    Raises:
        ValueError: If the environment is not an OCBench task.
    """
    base = env.unwrapped
    if not isinstance(base, OCBenchEnv):
        raise ValueError(f"The 'ocbench' expert needs an OCBench environment, got {type(base).__name__}.")
    return OCBenchExpert(base, seed)


def ocbench_tasks() -> list[str]:
    """The tasks that run on a CPU at 10 control steps a second: 27 from state, then their 27 twins ``visual-*``.

    Raises:
        MissingExtraError: If OCBench, or a system library that it needs, is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GLFW complains where there is no display; pictures are drawn without it
        import_extra("ocbench.envs.env", title="OCBench", extra="ocbench")
    _keep_standard_error()
    names = [
        name.removesuffix(VERSION)
        for name, spec in gymnasium.registry.items()
        if str(spec.entry_point).startswith("ocbench.") and "-cpu-lite-" in name
    ]
    return sorted(names, key=lambda name: (name.startswith("visual-"), name))


def _keep_standard_error() -> None:
    """Keep absl, by which dm_control logs, from closing a standard error that was redirected when it was imported.

    It does so when logging is configured anew, and takes the stream from whoever had redirected it.
    """
    from absl import logging

    logging.get_absl_handler().python_handler.stream = sys.__stderr__


def _chosen(task: str) -> str:
    """Return a task that this family has, or say why it has not this one and which ones are near."""
    tasks = ocbench_tasks()
    if task in tasks:
        return task
    if scene(task) not in map(scene, tasks):
        reason = "is not known"
    elif "-cpu-" not in task:
        reason = "needs a GPU"
    else:
        reason = "is not one of its lite tasks" if "-lite-" not in task else "is not known"
    alike = [name for name in tasks if name.startswith("visual-") == task.startswith("visual-")]
    near = ", ".join(difflib.get_close_matches(task, alike, n=3, cutoff=0.0))
    raise ValueError(f"The OCBench task {task!r} {reason}; choose a lite one on the CPU, such as {near}.")


def scene(task: str) -> str:
    """The scene of a task: block, chamber, hanoi or switch."""
    return task.removeprefix("visual-").split("-")[0]


def _controller(env: OCBenchEnv) -> Any:
    """Build the controller of a task, which makes mistakes at the environment's rate."""
    from ocbench import oracles

    if scene(env.task) == "switch":  # it draws a rate for each episode from a range
        return oracles.SwitchController(env=env.simulator, p_mistake_range=(env.p_mistake, env.p_mistake))
    controllers = {
        "block": oracles.BlockController,
        "chamber": oracles.ChamberController,
        "hanoi": oracles.HanoiController,
    }
    return controllers[scene(env.task)](env=env.simulator, p_mistake=env.p_mistake)
