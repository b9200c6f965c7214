"""From observations to chunks: histories, their checks, and one network call for many robots."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from policy.common.observations import ByKey, Observation, as_dict, check_observations
from policy.common.seeding import derive_generator
from policy.control.timeline import LastPlan
from policy.inference.backends import SamplerProgram
from policy.model.config import PolicyConfig


class History:
    """The newest observations of one episode.

    Args:
        config: of the policy, for shapes and the length.
    """

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        self._seen: deque[ByKey] = deque(maxlen=config.obs_horizon)

    def add(self, observation: ByKey) -> None:
        """Take in what `checked_observation` gave; the first one stands in for the ones before it, as in training."""
        self._seen.extend([observation] * (1 if self._seen else self._config.obs_horizon))

    def stacked(self) -> ByKey:
        """(obs_horizon, *shape) under each key, oldest first."""
        return {key: np.stack([seen[key] for seen in self._seen]) for key in self._seen[-1]}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What one plan depends on.

    Attributes:
        seed: of the episode.
        number: of the plan in its episode; noise is drawn from (seed, number), that of candidate n > 0 from (seed,
            number, n).
        observations: (obs_horizon, *shape) under each key.
        last: the plan before; None to begin from noise alone and to compare with nothing.
        candidates: chunks to draw, of which the one closest to the last plan is taken, the first one without it.
    """

    seed: int
    number: int
    observations: ByKey
    last: LastPlan | None = None
    candidates: int = 1


def sample_plans(
    program: SamplerProgram, requests: Sequence[PlanRequest], plan_batch: int = 1
) -> list[NDArray[np.float32]]:
    """Sample one chunk for each request.

    Args:
        program: the policy's sampling.
        requests: one or more.
        plan_batch: requests in one network call. They are padded up to it, because a matrix product's rounding depends
            on its number of rows: with a fixed number a chunk is the same alone or among others.

    Returns:
        (action_horizon, action_dim) chunks in the data's units, in the order of the requests.
    """
    chunks: dict[int, NDArray[np.float32]] = {}
    kinds = [(request.last is None, request.candidates) for request in requests]
    for kind in dict.fromkeys(kinds):  # one call's rows are of one kind
        group = [number for number, other in enumerate(kinds) if other == kind]
        for start in range(0, len(group), plan_batch):
            numbers = group[start : start + plan_batch]
            chunks |= zip(numbers, _sampled(program, [requests[n] for n in numbers], plan_batch), strict=False)
    return [chunks[number] for number in range(len(requests))]


def _sampled(program: SamplerProgram, requests: Sequence[PlanRequest], plan_batch: int) -> list[NDArray[np.float32]]:
    """One chunk a request, in one network call; all requests have a last plan, or none has, and as many candidates."""
    requests = [*requests, *[requests[-1]] * (plan_batch - len(requests))]
    rows = [(request, number) for request in requests for number in range(request.candidates)]
    observations = {
        key: torch.from_numpy(np.stack([request.observations[key] for request, _ in rows]))
        for key in requests[0].observations
    }
    generators = [_generator(request, number) for request, number in rows]
    lasts = [request.last for request, _ in rows if request.last is not None]
    before = {}
    if lasts:
        before = {"previous": np.stack([last.chunk for last in lasts]), "keep": np.stack([last.keep for last in lasts])}
    sampled: NDArray[np.float32] = program.sample_actions(observations, generator=generators, **before).cpu().numpy()
    drawn = sampled.reshape(len(requests), -1, *sampled.shape[1:])
    return [
        chunks[0] if request.last is None else closest(chunks, request.last, program.action_scale)
        for request, chunks in zip(requests, drawn, strict=True)
    ]


def _generator(request: PlanRequest, number: int) -> torch.Generator:
    """Of one candidate: the first one's noise is that of a plan without candidates."""
    return derive_generator(request.seed, request.number, *([number] if number else []))


def closest(candidates: NDArray[np.float32], last: LastPlan, action_scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The candidate that continues the last plan best, by the squared distance over the actions both plans have.

    Args:
        candidates: (N, action_horizon, action_dim), one or more.
        last: what they are to continue; without overlap the first candidate is taken.
        action_scale: (action_dim,) what a distance is measured in.

    Returns:
        (action_horizon, action_dim) one of the candidates.
    """
    apart = ((candidates - last.chunk) / action_scale)[:, : last.overlap]
    chosen: NDArray[np.float32] = candidates[np.square(apart).sum(axis=(1, 2)).argmin()]
    return chosen


def checked_observation(config: PolicyConfig, observation: Observation) -> ByKey:
    """An observation by key, if it fits the policy.

    Args:
        config: of the policy.
        observation: a vector, an image, or arrays by key.

    Returns:
        Copies: the caller may reuse its buffers, and the history must not change with them.

    Raises:
        ValueError: missing or unknown keys, a wrong shape, or a number that is NaN or infinite.
    """
    by_key = {key: np.array(value) for key, value in as_dict(observation).items()}
    check_observations(by_key, config.observation_shapes)
    for key, value in by_key.items():
        if not np.isfinite(value).all():
            where = np.argwhere(~np.isfinite(value))[0].tolist()
            raise ValueError(
                f"observation {key!r} must hold finite numbers; got {value[tuple(where)]} at {where}:"
                " it was not used, and the controller is as it was"
            )
    return by_key
