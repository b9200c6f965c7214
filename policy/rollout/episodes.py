"""Rollouts in a simulator, what they are summed up to, and how long a chunk takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray

from policy.control.planning import Observation, plain_key
from policy.control.receding_horizon import RecedingHorizonController
from policy.control.timeline import ControllerSettings
from policy.diffusion.sampler import Sampler
from policy.inference import SamplerProgram, compile_sampler
from policy.model.diffusion_policy import DiffusionPolicy, PolicyConfig, zero_observations
from policy.statistics import bootstrap_interval, wilson_interval

Env = gymnasium.Env[Any, Any]
MakeEnv = Callable[..., Env]

# Rows of one planning call in rollouts, always: see RecedingHorizonController.plan_batch.
PLAN_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """One episode.

    Attributes:
        seed: its initial state, goal and noise.
        success: whether it succeeded at any step (which ends it).
        score: best progress over the episode, in [0, 1], as the environment defines it.
        return_: sum of rewards (`return` in files).
        steps: control steps taken.
        late_steps: those for which there was no action of a plan, see `ControllerSettings`.
        attempts: 1, or more where its process failed and it was run again, with the same seed.
    """

    seed: int
    success: bool
    score: float
    return_: float
    steps: int
    late_steps: int = 0
    attempts: int = 1

    def row(self) -> dict[str, Any]:
        """As written to `episodes.json`."""
        return {
            "seed": self.seed,
            "success": self.success,
            "score": self.score,
            "return": self.return_,
            "steps": self.steps,
            "late_steps": self.late_steps,
            "attempts": self.attempts,
        }

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> EpisodeResult:
        """The inverse of `row`; rows of before delays were simulated have no `late_steps`.

        Raises:
            KeyError: a value is missing.
        """
        values = {name: row[name] for name in ("seed", "success", "score", "steps", "attempts")}
        return EpisodeResult(return_=row["return"], late_steps=row.get("late_steps", 0), **values)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to act: what a sweep compares with others on the same episodes.

    Attributes:
        policy: which of the policies at hand, by number.
        sampler: how chunks are sampled.
        execution_horizon: actions executed before the next plan.
        controller: what happens while a plan is made.
        backend: what samples, see `compile_sampler`.
        weights: of the backend.
    """

    sampler: Sampler
    execution_horizon: int
    controller: ControllerSettings = field(default_factory=ControllerSettings)
    policy: int = 0
    backend: str = "eager"
    weights: str = "float32"


# Number of a cell, and the episode's seed.
Task = tuple[int, int]
# Compiled sampling by the number of its cell.
Programs = Mapping[int, SamplerProgram]


class Controller(Protocol):
    """Drives one robot."""

    def reset(self, seed: int) -> None:
        """Begin an episode."""

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """The next action."""
        ...

    def late_steps(self) -> int:
        """Control steps without an action of a plan."""
        ...


@dataclass(kw_only=True)
class _Progress:
    seed: int
    observation: Any
    score: float
    return_: float = 0.0
    steps: int = 0


@dataclass(kw_only=True)
class _Running(_Progress):
    task: Task
    controller: RecedingHorizonController


def check_spaces(config: PolicyConfig, env: Env) -> None:
    """Refuse an environment whose spaces do not fit the policy.

    Args:
        config: of the policy.
        env: gives the spaces.

    Raises:
        ValueError: naming both sides.
    """
    space = env.observation_space
    spaces = space.spaces if isinstance(space, gymnasium.spaces.Dict) else {plain_key(space.shape or ()): space}
    shapes = {key: tuple(part.shape or ()) for key, part in spaces.items()}
    wanted = {key: tuple(shape) for key, shape in config.observation_shapes.items()}
    if shapes != wanted:
        raise ValueError(
            f"the environment's observations {_describe(shapes)} do not fit the policy's {_describe(wanted)}:"
            " choose the env= that the demonstrations came from"
        )
    if env.action_space.shape != (config.action_dim,):
        raise ValueError(
            f"the environment's actions have shape {env.action_space.shape}, the policy's ({config.action_dim},):"
            " choose the env= that the demonstrations came from"
        )


def check_num_envs(num_envs: int) -> None:
    """Refuse to roll out in no environment.

    Raises:
        ValueError: below 1.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be 1 or more; got {num_envs}")


def _describe(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key} {shape}" for key, shape in sorted(shapes.items()))


def run_episodes(
    controllers: Sequence[RecedingHorizonController], envs: Sequence[Env], next_task: Callable[[], Task | None]
) -> Iterator[tuple[Task, EpisodeResult]]:
    """Run episodes in several environments at once; a finished one starts on the next task.

    Each environment runs on its own to the end of its chunk. Then all wait for a plan at the same time, and one network
    call serves them all.

    Args:
        controllers: one a cell; each uses one slot an environment.
        envs: identical environments with `info["is_success"]` and `info["score"]`.
        next_task: gives the next task, or None when there are no more.

    Yields:
        Results, as episodes end: at success, or when the environment ends them.
    """
    running: dict[int, _Running] = {}

    def start(slot: int) -> None:
        running.pop(slot, None)
        if (task := next_task()) is not None:
            cell, seed = task
            observation, info = envs[slot].reset(seed=seed)
            controllers[cell].reset(seed, slot)
            controllers[cell].observe(observation, slot)
            running[slot] = _Running(
                task=task,
                controller=controllers[cell],
                seed=seed,
                observation=observation,
                score=float(info["score"]),
            )

    for slot in range(len(envs)):
        start(slot)
    while running:
        for controller in controllers:
            controller.plan([slot for slot, episode in running.items() if episode.controller is controller])
        for slot, episode in list(running.items()):
            if (success := _execute_chunk(envs[slot], episode, slot)) is not None:
                yield episode.task, _result(episode, success, episode.controller.late_steps(slot))
                start(slot)


def _execute_chunk(env: Env, episode: _Running, slot: int) -> bool | None:
    """Act until the next plan is due; gives whether the episode succeeded once it is over."""
    while True:
        over, success = _step(env, episode, episode.controller.next_action(slot))
        if over:
            return success
        if episode.controller.observe(episode.observation, slot):
            return None


def _result(episode: _Progress, success: bool, late_steps: int) -> EpisodeResult:
    return EpisodeResult(
        seed=episode.seed,
        success=success,
        score=episode.score,
        return_=episode.return_,
        steps=episode.steps,
        late_steps=late_steps,
    )


def _step(env: Env, episode: _Progress, action: NDArray[np.float32]) -> tuple[bool, bool]:
    episode.observation, reward, terminated, truncated, info = env.step(action)
    episode.return_ += float(reward)
    episode.score = max(episode.score, float(info["score"]))
    episode.steps += 1
    success = bool(info["is_success"])
    return success or terminated or truncated, success


def controllers_of(
    policies: Sequence[DiffusionPolicy],
    cells: Sequence[Cell],
    action_space: gymnasium.Space[Any],
    programs: Programs = {},  # noqa: B006  (never changed)
) -> list[RecedingHorizonController]:
    """One controller a cell, planning in batches of the size that all rollouts use.

    Args:
        policies: what acts.
        cells: one for each controller.
        action_space: a `Box`.
        programs: those of the cells, by number, that are compiled already.

    Returns:
        The controllers.
    """
    assert isinstance(action_space, Box)
    return [
        RecedingHorizonController(
            policy=policies[cell.policy],
            sampler=cell.sampler,
            execution_horizon=cell.execution_horizon,
            settings=cell.controller,
            plan_batch=PLAN_BATCH,
            program=programs.get(number) or program_of(policies[cell.policy], cell),
            action_space=action_space,
        )
        for number, cell in enumerate(cells)
    ]


def program_of(policy: DiffusionPolicy, cell: Cell) -> SamplerProgram:
    """The compiled sampling of a cell."""
    return compile_sampler(policy, cell.sampler, backend=cell.backend, weights=cell.weights)


def portable_programs(policies: Sequence[DiffusionPolicy], cells: Iterable[Cell]) -> dict[Cell, SamplerProgram]:
    """The programs of those cells whose backend takes seconds to compile and can be sent to other processes."""
    return {cell: program_of(policies[cell.policy], cell) for cell in cells if cell.backend == "onnx"}


def run_in_process(
    policies: Sequence[DiffusionPolicy], envs: Sequence[Env], cells: Sequence[Cell], tasks: Iterable[Task]
) -> Iterator[tuple[Task, EpisodeResult]]:
    """Run tasks in this process, on one thread.

    Args:
        policies: what acts.
        envs: identical environments, all used at once.
        cells: what the tasks refer to.
        tasks: distinct ones.

    Yields:
        Each task with its result, as they come.
    """
    remaining = iter(tasks)
    with torch_threads(1):
        controllers = controllers_of(policies, cells, envs[0].action_space)
        yield from run_episodes(controllers, envs, lambda: next(remaining, None))


def play_episode(controller: Controller, env: Env, seed: int, watch: Callable[[], None]) -> EpisodeResult:
    """Run one episode in one environment.

    Args:
        controller: drives it.
        env: as for `run_episodes`.
        seed: of the episode.
        watch: called after the reset and after every control step.

    Returns:
        The result.
    """
    observation, info = env.reset(seed=seed)
    controller.reset(seed)
    episode = _Progress(seed=seed, observation=observation, score=float(info["score"]))
    watch()
    over = success = False
    while not over:
        over, success = _step(env, episode, controller.act(episode.observation))
        watch()
    return _result(episode, success, controller.late_steps())


def record_episode(controller: Controller, env: Env, seed: int) -> tuple[EpisodeResult, list[NDArray[np.uint8]]]:
    """Run one episode and keep its pictures.

    Args:
        controller: drives it.
        env: with `render_mode="rgb_array"`.
        seed: of the episode.

    Returns:
        The result, and (H, W, 3) uint8 frames, the initial one included.
    """
    frames: list[NDArray[np.uint8]] = []
    result = play_episode(controller, env, seed, lambda: frames.append(_frame(env)))
    return result, frames


def _frame(env: Env) -> NDArray[np.uint8]:
    frame = env.render()
    assert isinstance(frame, np.ndarray)
    return frame


def summarize(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Success rate with its 95 % Wilson interval, mean score with its 95 % bootstrap interval, and other means.

    Args:
        results: one or more.

    Returns:
        JSON data: `episodes successes success_rate success_low success_high score_mean score_low score_high return_mean
        steps_mean late_steps_mean`.
    """
    successes = sum(result.success for result in results)
    low, high = wilson_interval(successes, len(results))
    scores = [result.score for result in results]
    score_low, score_high = bootstrap_interval(scores, bounds=(0, 1))
    return {
        "episodes": len(results),
        "successes": successes,
        "success_rate": successes / len(results),
        "success_low": low,
        "success_high": high,
        "score_mean": float(np.mean(scores)),
        "score_low": score_low,
        "score_high": score_high,
        "return_mean": float(np.mean([result.return_ for result in results])),
        "steps_mean": float(np.mean([result.steps for result in results])),
        "late_steps_mean": float(np.mean([result.late_steps for result in results])),
    }


def format_summary(summary: Mapping[str, Any]) -> str:
    """The summary of a rollout in one line, for people."""
    return (
        f"success {summary['success_rate']:.0%} ({summary['successes']} of {summary['episodes']},"
        f" 95 % {summary['success_low']:.0%} to {summary['success_high']:.0%}),"
        f" score {summary['score_mean']:.3f} ({summary['score_low']:.3f} to {summary['score_high']:.3f}),"
        f" return {summary['return_mean']:.1f},"
        f" {summary['steps_mean']:.0f} control steps"
    )


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run with so many threads: small networks run no faster on more, and workers share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def chunk_latency(program: SamplerProgram, candidates: int = 1, repeats: int = 30) -> dict[str, float]:
    """How long one robot waits for one plan: on one thread, batch 1, or as many rows as it has candidates.

    Args:
        program: the policy's sampling; with `sampler.warm_start` a chunk after the first is timed.
        candidates: chunks drawn for a plan.
        repeats: timed calls at least; as many as fit into half a second, after a fifth of a second untimed.

    Returns:
        `latency_ms_median` and `latency_ms_p90`, in milliseconds.
    """
    config = program.config
    observations = zero_observations(config, rows=candidates)
    chunks = torch.zeros(candidates, config.action_horizon, config.action_dim)
    previous = None if program.sampler.warm_start is None else chunks
    generator = [torch.Generator().manual_seed(number) for number in range(candidates)]

    def timed_call() -> float:
        begin = time.perf_counter()
        program.sample_actions(observations, generator=generator, previous=previous).cpu()
        return time.perf_counter() - begin

    times: list[float] = []
    with torch_threads(1):
        warm_up = 0.0
        while warm_up < 0.2:  # caches, allocator and the processor's clock settle
            warm_up += timed_call()
        while len(times) < repeats or sum(times) < 0.5:
            times.append(timed_call())
    median, p90 = 1e3 * np.percentile(times, [50, 90])
    return {"latency_ms_median": float(median), "latency_ms_p90": float(p90)}
