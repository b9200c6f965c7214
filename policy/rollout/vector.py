"""Episodes in a simulator that steps many worlds in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

from policy.common.device import torch_threads
from policy.common.observations import Observation
from policy.control.receding_horizon import RecedingHorizonController
from policy.model.diffusion_policy import DiffusionPolicy
from policy.rollout.cells import Cell, Task, controllers_of
from policy.rollout.episodes import Running, first, result_of, tallied
from policy.rollout.handover import align
from policy.rollout.probe import STEPS, Trajectory, bounded, difference, flat, warning
from policy.statistics.results import EpisodeResult


class Worlds(Protocol):
    """Many worlds of one simulator, such as `envs.VectorWorlds`."""

    num_envs: int
    action_space: gymnasium.spaces.Box

    def start(self, seeds: Sequence[int]) -> list[tuple[Observation, dict[str, Any]]]:
        """Start an episode in each of the first worlds."""
        ...

    def step(
        self, actions: Mapping[int, NDArray[np.float32]]
    ) -> dict[int, tuple[Observation, float, bool, bool, dict[str, Any]]]:
        """Advance all worlds; each of those named acts, and returns what `Env.step` does."""
        ...

    def stop(self, world: int) -> None:
        """End a world's episode before its time."""

    def close(self) -> None:
        """Close the simulator."""


MakeWorlds = Callable[..., Worlds]


class VectorPool:
    """Runs episodes in the worlds of one simulator; the result of an episode does not depend on their number.

    As many episodes as there are worlds start together, and the next ones when all of these are over.

    Args:
        policies: the policies that cells refer to.
        make_worlds: makes the worlds, given `worlds`, their number.
        num_envs: their number.
    """

    def __init__(self, policies: Sequence[DiffusionPolicy], make_worlds: MakeWorlds, num_envs: int) -> None:
        align(policies)
        self._policies = policies
        self._worlds = make_worlds(worlds=num_envs)

    def run(self, cells: Sequence[Cell], tasks: Iterable[Task]) -> Iterator[tuple[Task, EpisodeResult]]:
        """Run one episode per task.

        Args:
            cells: the cells that the tasks refer to.
            tasks: distinct tasks.

        Yields:
            Each task with its result, in the order in which the episodes end.
        """
        remaining = iter(tasks)
        with torch_threads(1):
            controllers = controllers_of(self._policies, cells, self._worlds.action_space)
            while together := list(islice(remaining, self._worlds.num_envs)):
                yield from _run_together(controllers, self._worlds, together)

    def probe(self, seed: int) -> str:
        """Find out whether a seed fixes the episode, whatever its world and whatever runs beside it.

        Args:
            seed: the first seed of the run.

        Returns:
            A warning, or an empty text if it does.
        """
        last = self._worlds.num_envs - 1
        alone = self._trajectory([seed], 0)
        where = difference(alone, self._trajectory([*range(seed + 1, seed + 1 + last), seed], last))
        return "" if where is None else warning(seed, f"was started again with it in another world, {where}")

    def _trajectory(self, seeds: Sequence[int], world: int) -> Trajectory:
        """Play the first control steps of episodes that start together, and return those of one world."""
        generator = np.random.default_rng(seeds[world])
        low, high = bounded(self._worlds.action_space)
        started = self._worlds.start(seeds)
        seen = [flat(started[world][0])]
        running = {number for number, (_, info) in enumerate(started) if not info.get("broke_off")}
        for _ in range(STEPS):
            if world not in running:
                break
            action = generator.uniform(low, high).astype(np.float32)
            stepped = self._worlds.step(dict.fromkeys(running, action))
            observation, reward, *_ = stepped[world]
            seen.append(np.append(flat(observation), reward))
            running = {number for number, (_, _, *over, _) in stepped.items() if not any(over)}
        return seen

    def __enter__(self) -> VectorPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._worlds.close()


def _run_together(
    controllers: Sequence[RecedingHorizonController], worlds: Worlds, tasks: Sequence[Task]
) -> Iterator[tuple[Task, EpisodeResult]]:
    """Run up to as many episodes as there are worlds, which start together."""
    running: dict[int, Running] = {}
    for world, (task, (observation, info)) in enumerate(
        zip(tasks, worlds.start([seed for _, seed in tasks]), strict=True)
    ):
        cell, seed = task
        episode = Running(task=task, controller=controllers[cell], seed=seed, observation=observation, **first(info))
        if episode.broke_off:
            worlds.stop(world)
            yield task, result_of(episode, False, 0)
            continue
        episode.controller.reset(seed, world)
        episode.controller.observe(observation, world)
        running[world] = episode
    while running:
        for controller in controllers:
            controller.plan([world for world, episode in running.items() if episode.controller is controller])
        stepped = worlds.step({world: episode.controller.next_action(world) for world, episode in running.items()})
        for world, returned in stepped.items():
            episode = running[world]
            over, success = tallied(episode, returned)
            if over:
                worlds.stop(world)
                del running[world]
                yield episode.task, result_of(episode, success, episode.controller.late_steps(world))
            else:
                episode.controller.observe(episode.observation, world)
