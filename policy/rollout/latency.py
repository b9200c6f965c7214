"""The latency of a plan: how long one robot waits for it."""

from __future__ import annotations

import time

import numpy as np
import torch

from policy.common.device import torch_threads
from policy.inference.backends import SamplerProgram
from policy.model.diffusion_policy import zero_observations


def chunk_latency(program: SamplerProgram, candidates: int = 1, repeats: int = 30) -> dict[str, float]:
    """Measure how long one robot waits for one plan, on one thread, with one row per candidate.

    Args:
        program: the policy's sampling; with `sampler.warm_start`, chunks that start from a previous one are timed.
        candidates: chunks sampled per plan.
        repeats: minimum number of timed calls. Calls are timed for at least half a second, after an untimed warm-up of
            a fifth of a second.

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
