"""Rollouts in several processes: each has its own environments, its own copy of the policy, and one thread."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch

from policy.controller import RecedingHorizonController
from policy.diffusion_policy import DiffusionPolicy
from policy.evaluation import (
    PLAN_BATCH,
    Env,
    EpisodeResult,
    MakeEnv,
    OnEpisode,
    check_num_envs,
    run_episodes,
    run_in_process,
)
from policy.sampler import Sampler


class RolloutPool:
    """Runs episodes on all cores and gives each its seed's own result, however many run at once.

    With one environment, or on one core, everything runs in this process. Otherwise each core gets a spawned process
    with its share of the environments; a free environment takes the next seed that none has taken.

    Args:
        policy: what acts.
        make_env: makes one environment; picklable.
        num_envs: environments in all.

    Raises:
        ValueError: `num_envs` below 1.
    """

    def __init__(self, policy: DiffusionPolicy, make_env: MakeEnv, num_envs: int) -> None:
        check_num_envs(num_envs)
        self._policy = policy
        self._cleanup = ExitStack()
        self._processes: list[Any] = []
        self._jobs: list[Any] = []
        self._envs: list[Env] = []
        # A GPU is shared by batching in one process, cores by processes.
        workers = min(num_envs, available_cores()) if policy.device.type == "cpu" else 1
        if workers == 1:
            self._envs = [make_env() for _ in range(num_envs)]
            for env in self._envs:
                self._cleanup.callback(env.close)
            return
        context = multiprocessing.get_context("spawn")
        self._taken = context.Value("q", 0)
        self._results = context.Queue()
        self._cleanup.callback(self._stop)
        for index in range(workers):
            share = num_envs // workers + (index < num_envs % workers)
            jobs = context.SimpleQueue()
            process = context.Process(
                target=_serve, args=(policy, make_env, share, jobs, self._taken, self._results), daemon=True
            )
            process.start()
            self._processes.append(process)
            self._jobs.append(jobs)

    def run(
        self, seeds: Sequence[int], *, sampler: Sampler, execution_horizon: int, on_episode: OnEpisode
    ) -> list[EpisodeResult]:
        """Run one episode per seed.

        Args:
            seeds: distinct episode seeds.
            sampler: how chunks are sampled.
            execution_horizon: actions executed before the next plan.
            on_episode: called with each result as it comes, in any order.

        Returns:
            One result per seed, in the order of `seeds`.

        Raises:
            RuntimeError: a worker failed.
        """
        if not self._processes:
            return run_in_process(
                self._policy,
                self._envs,
                seeds,
                sampler=sampler,
                execution_horizon=execution_horizon,
                on_episode=on_episode,
            )
        results: dict[int, EpisodeResult] = {}
        for result in self._run_in_workers(seeds, sampler, execution_horizon):
            results[result.seed] = result
            on_episode(result)
        return [results[seed] for seed in seeds]

    def _run_in_workers(
        self, seeds: Sequence[int], sampler: Sampler, execution_horizon: int
    ) -> Iterator[EpisodeResult]:
        self._taken.value = 0  # every worker is idle here
        for jobs in self._jobs:
            jobs.put((list(seeds), sampler, execution_horizon))
        waiting_for = len(seeds) + len(self._processes)
        while waiting_for:
            try:
                kind, value = self._results.get(timeout=1.0)
            except queue.Empty:
                if dead := [p for p in self._processes if not p.is_alive()]:
                    raise RuntimeError(f"a rollout worker ended with exit code {dead[0].exitcode}") from None
                continue
            if kind == "error":
                raise RuntimeError(f"a rollout worker failed:\n{value}")
            waiting_for -= 1
            if kind == "episode":
                yield value

    def _stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve(policy: DiffusionPolicy, make_env: MakeEnv, num_envs: int, jobs: Any, taken: Any, results: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)  # two processes with two spinning threads each would crawl
    try:
        envs = [make_env() for _ in range(num_envs)]
        while True:
            seeds, sampler, execution_horizon = jobs.get()
            controller = RecedingHorizonController(
                policy=policy, sampler=sampler, execution_horizon=execution_horizon, plan_batch=PLAN_BATCH
            )
            for result in run_episodes(controller, envs, partial(_take, seeds, taken)):
                results.put(("episode", result))
            results.put(("idle", None))
    except Exception:
        results.put(("error", traceback.format_exc()))


def _take(seeds: Sequence[int], taken: Any) -> int | None:
    """The next seed that no worker has taken yet."""
    with taken.get_lock():
        index = taken.value
        taken.value += 1
    return seeds[index] if index < len(seeds) else None
