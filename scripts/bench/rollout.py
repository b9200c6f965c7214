"""Measure how fast episodes roll out, compared with the raw environment on every core.

The raw environment replays the actions that the policy took, so that both simulate the same physics. The policy has the
preset's size and random weights: its actions differ from those of a trained policy, but its cost is the same. The first
row is the cost of the environment's door (`envs.checked`), in CPU time.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch

import envs
from policy import DiffusionPolicy, PolicyConfig, RecedingHorizonController, Sampler
from policy.common.device import torch_threads
from policy.common.machine import available_cores
from policy.common.progress import progress
from policy.rollout.cells import Cell, controllers_of
from policy.rollout.episodes import Env
from policy.rollout.workers import RolloutPool
from scripts.bench.kept_rows import KeptRows, Row

PRESETS: dict[str, tuple[dict[str, Any], int]] = {
    "pusht_state": ({"name": "pusht"}, 96),
    "metaworld": ({"name": "metaworld", "task": "pick-place-v3"}, 64),
}
DDIM_STEPS = 8
NUM_ENVS = (1, 8, 16, 32, 64)
BACKENDS = ("fused", "onnx")
# Of the comparison with the environment behind the door: many short turns, because the machine's load changes.
TURNS, TURN_STEPS = 1500, 20


def main() -> None:
    """Run the benchmark; the same command goes on where it was stopped."""
    cases = list(itertools.product(PRESETS, BACKENDS, NUM_ENVS))
    with KeptRows("rollout", "gymnasium", measurements=1 + len(cases)) as rows:
        rows.measure({"door": "pusht"}, lambda: [door_row({"name": "pusht"})])
        for case in cases:
            rows.measure(dict(zip(("preset", "backend", "num_envs"), case, strict=True)), partial(_rows, *case))
    rows.report()


def _rows(preset: str, backend: str, num_envs: int) -> list[Row]:
    env, episodes = PRESETS[preset]
    with closing(envs.make(**env)) as simulator:
        policy, cores = _policy(simulator), available_cores()
        cell = Cell(sampler=Sampler(ddim_steps=DDIM_STEPS), execution_horizon=8, backend=backend)
        # Measured right before the rate, so that both meet the same load.
        raw, share = _raw_and_share(policy, simulator, cell, range(4))
    rate = _pool_rate(policy, env, cell, num_envs, episodes)
    return [
        {
            "preset": preset,
            "backend": backend,
            "num_envs": num_envs,
            "ddim_steps": DDIM_STEPS,
            "steps_per_s": rate,
            "raw_steps_per_s": raw,
            "cores": cores,
            "fraction": rate / (raw * cores),
            "policy_share": share,
        }
    ]


def door_row(env: dict[str, Any]) -> Row:
    """Measure what `CheckedEnv` costs: the same episodes through it and in the environment that it wraps, in turns.

    Args:
        env: settings of the environment.

    Returns:
        Steps per CPU second of both (medians), and the median and the quartiles of the door's overhead in per cent.
    """
    seconds: dict[str, list[float]] = {"raw": [], "checked": []}
    with closing(envs.make(**env)) as checked:
        players = [("raw", checked.unwrapped), ("checked", checked)]
        space: Any = checked.action_space
        generator = np.random.default_rng(0)
        for turn in range(TURNS):
            actions = generator.uniform(space.low, space.high, (TURN_STEPS, *space.shape)).astype(np.float32)
            for name, player in players:
                checked.reset(seed=turn)  # both step the same simulator: another one would lie elsewhere in memory
                begin = time.process_time()
                for action in actions:
                    player.step(action)
                seconds[name].append(time.process_time() - begin)
            players.reverse()
    ratios = np.array(seconds["checked"]) / np.array(seconds["raw"])
    low, median, high = (100 * (float(value) - 1) for value in np.quantile(ratios, (0.25, 0.5, 0.75)))
    rates = {name: TURN_STEPS / float(np.median(times)) for name, times in seconds.items()}
    return {
        "preset": f"the door: {env['name']}",
        "steps_per_s": rates["checked"],
        "raw_steps_per_s": rates["raw"],
        "overhead_percent": median,
        "overhead_low": low,
        "overhead_high": high,
    }


def _policy(env: Env) -> DiffusionPolicy:
    assert env.observation_space.shape is not None
    assert env.action_space.shape is not None
    torch.manual_seed(0)
    config = PolicyConfig(
        observation_shapes={"state": env.observation_space.shape}, action_dim=env.action_space.shape[0]
    )
    policy = DiffusionPolicy(config).eval().requires_grad_(False)
    space: Any = env.action_space
    policy.action_normalizer.fit(space.low, space.high)
    for parameter in policy.denoiser.parameters():  # the zeros that it starts with would not move the robot
        parameter.data += 0.02 * torch.randn_like(parameter)
    return policy


def _raw_and_share(policy: DiffusionPolicy, env: Env, cell: Cell, seeds: Sequence[int]) -> tuple[float, float]:
    """Steps per second of the environment alone, and the policy's share of a rollout's time with full batches."""
    controller = controllers_of([policy], [cell], env.action_space)[0]
    played: list[list[np.ndarray[Any, Any]]] = []
    with torch_threads(1):
        for seed in seeds:
            observation, _ = env.reset(seed=seed)
            controller.reset(seed)
            actions, over = [], False
            while not over:
                actions.append(controller.act(observation))
                observation, _, terminated, truncated, info = env.step(actions[-1])
                over = bool(terminated or truncated or info["is_success"])
            played.append(actions)
        raw = _replay(env, seeds, played)
        planning = _planning_seconds(controller, observation)
    stepping = cell.execution_horizon / raw
    return raw, planning / (planning + stepping)


def _replay(env: Env, seeds: Sequence[int], played: Sequence[Sequence[Any]]) -> float:
    seconds = 0.0
    for seed, actions in zip(seeds, played, strict=True):
        env.reset(seed=seed)
        begin = time.perf_counter()
        for action in actions:
            env.step(action)
        seconds += time.perf_counter() - begin
    return sum(map(len, played)) / seconds


def _planning_seconds(controller: RecedingHorizonController, observation: Any) -> float:
    """Seconds of planning per chunk, in batches of the size that rollouts use."""
    slots, times = range(controller.plan_batch), []
    for repeat in range(20):
        for slot in slots:
            controller.reset(repeat, slot)
            controller.observe(observation, slot)
        begin = time.perf_counter()
        controller.plan(slots)
        times.append(time.perf_counter() - begin)
    return float(np.median(times)) / len(slots)


def _pool_rate(policy: DiffusionPolicy, env: dict[str, Any], cell: Cell, num_envs: int, episodes: int) -> float:
    with RolloutPool([policy], partial(envs.make, **env), num_envs) as pool:
        list(pool.run([cell], [(0, seed) for seed in range(num_envs)]))  # wait until the processes have started
        begin = time.perf_counter()
        played = pool.run([cell], [(0, seed) for seed in range(episodes)])
        name = f"{env['name']}, {cell.backend}, {num_envs} at once"
        steps = sum(result.steps for _, result in progress(played, total=episodes, desc=name, unit="episode"))
        return steps / (time.perf_counter() - begin)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
