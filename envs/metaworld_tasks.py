"""Several Meta-World tasks in one environment, for one policy that observes which task it is in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from envs.errors import choose
from envs.metaworld import ACTION_DIM, OBSERVATIONS, MetaWorldEnv
from envs.spaces import Observation

# Meta-World's own choice of ten, MT10.
MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)

# All fifty tasks by difficulty: the split of Seo et al. 2022 ("Masked World Models for Visual Control", arXiv
# 2206.14244), by which DP3 and its successors report.
DIFFICULTIES = {
    "easy": (
        "button-press-v3",
        "button-press-topdown-v3",
        "button-press-topdown-wall-v3",
        "button-press-wall-v3",
        "coffee-button-v3",
        "dial-turn-v3",
        "door-close-v3",
        "door-lock-v3",
        "door-open-v3",
        "door-unlock-v3",
        "drawer-close-v3",
        "drawer-open-v3",
        "faucet-close-v3",
        "faucet-open-v3",
        "handle-press-v3",
        "handle-press-side-v3",
        "handle-pull-v3",
        "handle-pull-side-v3",
        "lever-pull-v3",
        "peg-unplug-side-v3",
        "plate-slide-v3",
        "plate-slide-back-v3",
        "plate-slide-back-side-v3",
        "plate-slide-side-v3",
        "reach-v3",
        "reach-wall-v3",
        "window-close-v3",
        "window-open-v3",
    ),
    "medium": (
        "basketball-v3",
        "bin-picking-v3",
        "box-close-v3",
        "coffee-pull-v3",
        "coffee-push-v3",
        "hammer-v3",
        "peg-insert-side-v3",
        "push-wall-v3",
        "soccer-v3",
        "sweep-v3",
        "sweep-into-v3",
    ),
    "hard": (
        "assembly-v3",
        "hand-insert-v3",
        "pick-out-of-hole-v3",
        "pick-place-v3",
        "push-v3",
        "push-back-v3",
    ),
    "very_hard": (
        "disassemble-v3",
        "pick-place-wall-v3",
        "shelf-place-v3",
        "stick-pull-v3",
        "stick-push-v3",
    ),
}
# All fifty tasks in alphabetical order.
MT50 = tuple(sorted(task for tasks in DIFFICULTIES.values() for task in tasks))

# The simulators in which no environment plays, by task and settings. All environments of a process share them: a
# simulator holds 20 MB, so that sixteen environments with fifty each would hold 16 GB.
_IDLE: defaultdict[tuple[Any, ...], list[MetaWorldEnv]] = defaultdict(list)


class MetaWorldTasksEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Several Meta-World tasks; an episode's seed selects its task.

    Seed s is an episode of task ``s % len(tasks)``, the same one as ``MetaWorldEnv(task).reset(seed=s)``; any
    ``len(tasks)`` consecutive seeds play each task once. The observation is the task's own, followed by a one-hot
    vector of the task's index in ``tasks``. Action, info, truncation and rate are those of `MetaWorldEnv`.
    """

    metadata = MetaWorldEnv.metadata
    max_episode_steps = MetaWorldEnv.max_episode_steps

    def __init__(
        self,
        tasks: Sequence[str] = MT10,
        *,
        observation: str = "state",
        render_mode: str | None = None,
        camera: str = "corner2",
        image_size: int = 256,
    ) -> None:
        """Build the first task; the others are built when an episode plays them.

        Args:
            tasks: Names of at least two different tasks, by default the ten of MT10.
            observation: ``"state"`` or ``"features"``, see `MetaWorldEnv`.
            render_mode: ``None`` or ``"rgb_array"``.
            camera: Camera that `render` looks through.
            image_size: Height and width of a frame, in pixels.

        Raises:
            MissingExtraError: If Meta-World, or a system library it needs, is not installed.
            ValueError: If fewer than two tasks are named, one is named twice, or a name or the observation is unknown.
        """
        self.tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        if len(self.tasks) < 2 or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(
                f"tasks must name two or more different Meta-World tasks; got {list(self.tasks)}."
                " For a single one choose env=metaworld env.task=NAME."
            )
        choose("observation of several tasks", observation, OBSERVATIONS)
        for task in self.tasks:
            choose("Meta-World task", task, MT50)
        self.render_mode = render_mode
        self._settings: dict[str, Any] = {
            "observation": observation,
            "render_mode": render_mode,
            "camera": camera,
            "image_size": image_size,
        }
        self._simulator: MetaWorldEnv | None = None
        self._current = 0
        self._open()
        self.observation_spaces = {
            kind: gymnasium.spaces.Box(-np.inf, np.inf, (width + len(self.tasks),), np.float32)
            for kind, width in OBSERVATIONS.items()
        }
        self.observation_space = self.observation_spaces[observation]
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def task_of(self, seed: int) -> str:
        """The task that an episode of this seed plays."""
        return self.tasks[seed % len(self.tasks)]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Seed of this episode and, modulo the number of tasks, its task; or None to draw the next one from
                ``np_random``.
            options: Ignored.

        Returns:
            The first observation and ``{"is_success": False, "score": 0.0}``.
        """
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self.close()
        self._current = seed % len(self.tasks)
        observation, info = self._open().reset(seed=seed)
        return self._observed(observation), info

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Advance by one control step, see `MetaWorldEnv.step`."""
        observation, reward, terminated, truncated, info = self._open().step(action)
        return self._observed(observation), reward, terminated, truncated, info

    def render(self) -> NDArray[np.uint8]:
        """Draw the scene of the current task, see `MetaWorldEnv.render`."""
        return self._open().render()

    def close(self) -> None:
        """Free the renderer, and leave the simulator to other environments."""
        if self._simulator is not None:
            self._simulator.close()
            self._idle().append(self._simulator)
            self._simulator = None

    def _open(self) -> MetaWorldEnv:
        """The simulator of the current task: the one in use, an idle one, or a new one."""
        if self._simulator is None:
            idle = self._idle()
            self._simulator = idle.pop() if idle else MetaWorldEnv(self.tasks[self._current], **self._settings)
        return self._simulator

    def _idle(self) -> list[MetaWorldEnv]:
        return _IDLE[self.tasks[self._current], *self._settings.values()]

    def _observed(self, observation: Observation) -> NDArray[np.float32]:
        assert isinstance(observation, np.ndarray)  # of one of OBSERVATIONS
        one_hot = np.zeros(len(self.tasks), np.float32)
        one_hot[self._current] = 1.0
        return np.concatenate([observation, one_hot])
