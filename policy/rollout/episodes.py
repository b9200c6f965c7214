"""Episodes in a simulator: many at once in this process, or one at a time."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from policy.common.device import torch_threads
from policy.common.files import json_text, write_text
from policy.common.next_line import hydra_text
from policy.common.observations import Observation, describe_keys, fitting_keys, is_image, plain_key
from policy.control.receding_horizon import RecedingHorizonController
from policy.model.config import PolicyConfig
from policy.model.diffusion_policy import DiffusionPolicy
from policy.model.normalizer import Normalizer
from policy.rollout.cells import Cell, Task, controllers_of
from policy.statistics.results import EpisodeResult

EPISODES_FILE = "episodes.json"
# The most memory that the frames of one recorded episode may take.
MAX_FRAME_BYTES = 4 * 10**9
# An action that is outside of its bounds by this share of their distance is not called so: rounding, a noisy sensor.
BEYOND = 0.01
# A message names so many dimensions at most.
NAMED = 3

# The settings that rename observations: of an imported policy, and of demonstrations.
IMPORTED, TRAINED = "keys", "dataset.observation_keys"

Env = gymnasium.Env[Any, Any]
MakeEnv = Callable[..., Env]


class Controller(Protocol):
    """Drives one robot."""

    def reset(self, seed: int) -> None:
        """Start an episode."""

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Return the next action, (action_dim,)."""
        ...

    def late_steps(self) -> int:
        """Control steps of the episode without a planned action."""
        ...


@dataclass(kw_only=True)
class _Tally:
    seed: int
    observation: Any
    score: float
    broke_off: str
    return_: float = 0.0
    steps: int = 0


@dataclass(kw_only=True)
class Running(_Tally):
    """An episode that a controller drives, so far."""

    task: Task
    controller: RecedingHorizonController


def check_spaces(
    config: PolicyConfig,
    env: Env,
    names: Mapping[str, str] | None = None,
    *,
    setting_of_names: str = IMPORTED,
    family: str | None = None,
) -> None:
    """Reject an environment whose spaces do not fit the policy.

    Args:
        config: the policy's configuration.
        env: the environment.
        names: the name in its source of each observation that was renamed, if the policy is being imported or trained.
        setting_of_names: the setting that renames them.
        family: the `name` of the environment's settings; that of `gym` takes settings of its observations.

    Raises:
        ValueError: a key or shape differs; the message names both sides, and the choice and keys that would fit.
    """
    shapes = _shapes(env.observation_space)
    wanted = {key: tuple(shape) for key, shape in config.observation_shapes.items()}
    if shapes != wanted:
        fits = _what_fits(wanted, env, names or {}, setting_of_names, family)
        raise ValueError(
            f"the environment's observations {_describe(shapes)} do not fit the policy's {_describe(wanted)}:"
            f" choose the env= that the demonstrations came from{fits}"
        )
    if env.action_space.shape != (config.action_dim,):
        raise ValueError(
            f"the environment's actions have shape {env.action_space.shape}, the policy's ({config.action_dim},):"
            " choose the env= that the demonstrations came from"
        )


def describe_clipping(policy: DiffusionPolicy, env: Env) -> str | None:
    """Say which demonstrated actions the environment does not allow, or return None if it allows all.

    Args:
        policy: the policy; it knows the range of the actions that it learned where they are normalised by it.
        env: the environment, which clips actions to its bounds.
    """
    normalizer, space = policy.action_normalizer, env.action_space
    if not isinstance(normalizer, Normalizer) or not isinstance(space, gymnasium.spaces.Box):
        return None
    learned = (normalizer.unnormalize(torch.full_like(normalizer.center, end)).cpu().numpy() for end in (-1, 1))
    # In float32 the distance of two finite bounds may be infinite.
    low, high, least, most = (values.astype(np.float64) for values in (*learned, space.low, space.high))
    span = np.where(np.isfinite(most - least), most - least, high - low)
    outside = np.maximum(least - low, high - most) > BEYOND * span
    if not outside.any():
        return None
    parts = [
        f"action[{i}] from {low[i]:.4g} to {high[i]:.4g}, allowed {space.low[i]:.4g} to {space.high[i]:.4g}"
        for i in np.flatnonzero(outside)
    ]
    more = f", and {len(parts) - NAMED} more" if len(parts) > NAMED else ""
    return (
        "the demonstrated actions leave the environment's bounds, which cut them off"
        f" ({'; '.join(parts[:NAMED])}{more}): choose the env= that they were recorded in, or train on actions in its"
        " units"
    )


def check_num_envs(num_envs: int) -> None:
    """Reject a number of environments below 1.

    Raises:
        ValueError: `num_envs` is below 1.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be 1 or more; got {num_envs}")


def _shapes(space: gymnasium.Space[Any]) -> dict[str, tuple[int, ...]]:
    spaces = space.spaces if isinstance(space, gymnasium.spaces.Dict) else {plain_key(space.shape or ()): space}
    return {key: tuple(part.shape or ()) for key, part in spaces.items()}


def _what_fits(
    wanted: Mapping[str, tuple[int, ...]],
    env: Env,
    names: Mapping[str, str],
    setting_of_names: str,
    family: str | None,
) -> str:
    """Say under which names an environment fits, or with which of the observations that its setting offers."""
    offered = {"it fits": env.observation_space}
    for value, space in getattr(env.unwrapped, "observation_spaces", {}).items():
        offered[f"env.observation={value} fits"] = space
    for fits, space in offered.items():
        if keys := fitting_keys(wanted, _shapes(space)):
            renamed = describe_keys({ours: names.get(theirs, theirs) for ours, theirs in keys.items()})
            setting = shlex.quote(f"{setting_of_names}={renamed}")
            if setting_of_names == IMPORTED:
                setting += f" of ddim-import, or the same as {TRAINED} of ddim-train"
            other = any(ours != theirs for ours, theirs in keys.items())
            return f"; {fits}{f' under other names: {setting}' if other else ''}"
    shapes = _shapes(env.observation_space)
    if shapes.items() <= wanted.items():
        own = {key: names.get(key, key) for key in sorted(shapes)}
        fewer = hydra_text([*own]) if [*own] == [*own.values()] else describe_keys(own)
        return f"; a policy that was trained with {shlex.quote(f'{TRAINED}={fewer}')} fits"
    if family != "gym":
        return ""
    if wanted.items() <= shapes.items():
        return f"; it fits with {shlex.quote(f'env.observation_keys={hydra_text(sorted(wanted))}')}"
    sides = {side for shape in wanted.values() if is_image(shape) for side in shape[:2]}
    if len(sides) == 1 and shapes.keys() == wanted.keys():
        (side,) = sides
        resized = {key: (side, side, shape[2]) if is_image(shape) else shape for key, shape in shapes.items()}
        return f"; it fits with env.image_size={side}" if resized == wanted else ""
    return ""


def _describe(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key} {shape}" for key, shape in sorted(shapes.items()))


def run_episodes(
    controllers: Sequence[RecedingHorizonController], envs: Sequence[Env], next_task: Callable[[], Task | None]
) -> Iterator[tuple[Task, EpisodeResult]]:
    """Run episodes in several environments at once; an environment that is done takes the next task.

    Each environment acts until its next plan is due. Then all of them need a plan at the same time, and those of one
    cell share the network calls.

    Args:
        controllers: one per cell; each uses one slot per environment.
        envs: identical environments of `envs.make`, or others with `is_success` and `score` in every info.
        next_task: returns the next task, or None when there are no more.

    Yields:
        Each task with its result, when the episode ends: at success, or when the environment ends it.
    """
    running: dict[int, Running] = {}

    def start(slot: int) -> Iterator[tuple[Task, EpisodeResult]]:
        """Start the slot's next episode; yield those that break off at once."""
        running.pop(slot, None)
        while (task := next_task()) is not None:
            cell, seed = task
            observation, info = envs[slot].reset(seed=seed)
            episode = Running(
                task=task, controller=controllers[cell], seed=seed, observation=observation, **first(info)
            )
            if episode.broke_off:
                yield task, result_of(episode, False, 0)
                continue
            controllers[cell].reset(seed, slot)
            controllers[cell].observe(observation, slot)
            running[slot] = episode
            return

    for slot in range(len(envs)):
        yield from start(slot)
    while running:
        for controller in controllers:
            controller.plan([slot for slot, episode in running.items() if episode.controller is controller])
        for slot, episode in list(running.items()):
            if (success := _execute_chunk(envs[slot], episode, slot)) is not None:
                yield episode.task, result_of(episode, success, episode.controller.late_steps(slot))
                yield from start(slot)


def _execute_chunk(env: Env, episode: Running, slot: int) -> bool | None:
    """Act until the next plan is due (returns None) or the episode is over (returns whether it succeeded)."""
    while True:
        over, success = _step(env, episode, episode.controller.next_action(slot))
        if over:
            return success
        if episode.controller.observe(episode.observation, slot):
            return None


def result_of(episode: _Tally, success: bool, late_steps: int) -> EpisodeResult:
    """The result of an episode that is over."""
    return EpisodeResult(
        seed=episode.seed,
        success=success,
        score=episode.score,
        return_=episode.return_,
        steps=episode.steps,
        late_steps=late_steps,
        broke_off=episode.broke_off,
    )


def first(info: Mapping[str, Any]) -> dict[str, Any]:
    """What the info of a reset says of an episode."""
    return {"score": float(info["score"]), "broke_off": info.get("broke_off", "")}


def _step(env: Env, episode: _Tally, action: NDArray[np.float32]) -> tuple[bool, bool]:
    return tallied(episode, env.step(action))


def tallied(episode: _Tally, returned: tuple[Any, Any, bool, bool, Mapping[str, Any]]) -> tuple[bool, bool]:
    """Add what a control step returned to an episode; return whether it is over, and whether it succeeded."""
    episode.observation, reward, terminated, truncated, info = returned
    episode.return_ += float(reward)
    episode.score = max(episode.score, info["score"])
    episode.steps += 1
    episode.broke_off = info.get("broke_off", "")
    success: bool = info["is_success"]
    return success or terminated or truncated, success


def run_in_process(
    policies: Sequence[DiffusionPolicy], envs: Sequence[Env], cells: Sequence[Cell], tasks: Iterable[Task]
) -> Iterator[tuple[Task, EpisodeResult]]:
    """Run tasks in this process, on one thread.

    Args:
        policies: the policies that the cells refer to.
        envs: identical environments, all used at once.
        cells: the cells that the tasks refer to.
        tasks: distinct tasks.

    Yields:
        Each task with its result, in the order in which the episodes end.
    """
    remaining = iter(tasks)
    with torch_threads(1):
        controllers = controllers_of(policies, cells, envs[0].action_space)
        yield from run_episodes(controllers, envs, lambda: next(remaining, None))


def play_episode(controller: Controller, env: Env, seed: int, watch: Callable[[], None]) -> EpisodeResult:
    """Run one episode in one environment.

    Args:
        controller: drives the robot.
        env: the environment, as for `run_episodes`.
        seed: the episode's seed.
        watch: called after the reset and after every control step.

    Returns:
        The result.
    """
    observation, info = env.reset(seed=seed)
    controller.reset(seed)
    episode = _Tally(seed=seed, observation=observation, **first(info))
    watch()
    over, success = bool(episode.broke_off), False
    while not over:
        over, success = _step(env, episode, controller.act(episode.observation))
        watch()
    return result_of(episode, success, controller.late_steps())


def record_episode(controller: Controller, env: Env, seed: int) -> tuple[EpisodeResult, list[NDArray[np.uint8]]]:
    """Run one episode and keep its frames.

    Args:
        controller: drives the robot.
        env: the environment, with `render_mode="rgb_array"`.
        seed: the episode's seed.

    Returns:
        The result, and (H, W, 3) uint8 frames, including the initial one.

    Raises:
        ValueError: the frames would fill the memory.
    """
    frames: list[NDArray[np.uint8]] = []
    room = MAX_FRAME_BYTES

    def watch() -> None:
        nonlocal room
        frames.append(_frame(env))
        room -= frames[-1].nbytes
        if room < 0:
            raise ValueError(f"frames of {frames[-1].shape} fill {MAX_FRAME_BYTES / 1e9:g} GB: draw smaller ones")

    result = play_episode(controller, env, seed, watch)
    return result, frames


def _frame(env: Env) -> NDArray[np.uint8]:
    frame = env.render()
    assert isinstance(frame, np.ndarray)
    return frame


def write_episodes(results: Sequence[EpisodeResult], folder: Path) -> Path:
    """Write `episodes.json`, with one entry per episode.

    Args:
        results: the results of a rollout.
        folder: receives the file.

    Returns:
        The file.
    """
    file = folder / EPISODES_FILE
    write_text(file, json_text([result.row() for result in results], indent=1))
    return file
