"""From observations to chunks: observation histories, their checks, and one network call for many robots."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
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
        config: the policy's configuration; its `obs_horizon` is the length of the history.
    """

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        self._seen: deque[ByKey] = deque(maxlen=config.obs_horizon)

    def add(self, observation: ByKey) -> None:
        """Add a checked observation; an episode's first one also stands in for the ones before it, as in training."""
        self._seen.extend([observation] * (1 if self._seen else self._config.obs_horizon))

    def stacked(self) -> ByKey:
        """The history, (obs_horizon, *shape) under each key, oldest first."""
        return {key: np.stack([seen[key] for seen in self._seen]) for key in self._seen[-1]}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """Everything that one plan depends on.

    Attributes:
        seed: the episode's seed.
        number: index of the plan in its episode. The noise is drawn from (seed, number), and that of candidate n > 0
            from (seed, number, n).
        observations: (obs_horizon, *shape) under each key.
        last: the previous plan; None to start from noise alone and to take the first candidate.
        candidates: chunks to sample, of which the one closest to the previous plan is taken.
    """

    seed: int
    number: int
    observations: ByKey
    last: LastPlan | None = None
    candidates: int = 1


# Samples one chunk (action_horizon, action_dim) in the data's units for each request.
Plans = Callable[[Sequence[PlanRequest]], list[NDArray[np.float32]]]


def sample_plans(
    program: SamplerProgram, requests: Sequence[PlanRequest], plan_batch: int = 1
) -> list[NDArray[np.float32]]:
    """Sample one chunk for each request.

    Args:
        program: samples the chunks.
        requests: one or more.
        plan_batch: requests per network call. Every call is padded to this number, because the rounding of a matrix
            product depends on its number of rows: with a fixed number, a chunk does not depend on the other requests.

    Returns:
        (action_horizon, action_dim) chunks in the data's units, in the order of the requests.
    """
    chunks: dict[int, NDArray[np.float32]] = {}
    kinds = [(request.last is None, request.candidates) for request in requests]
    for kind in dict.fromkeys(kinds):  # all rows of one call are of the same kind
        group = [number for number, other in enumerate(kinds) if other == kind]
        for start in range(0, len(group), plan_batch):
            numbers = group[start : start + plan_batch]
            chunks |= zip(numbers, _sampled(program, [requests[n] for n in numbers], plan_batch), strict=False)
    return [chunks[number] for number in range(len(requests))]


def _sampled(program: SamplerProgram, requests: Sequence[PlanRequest], plan_batch: int) -> list[NDArray[np.float32]]:
    """Sample one chunk per request in one network call.

    Either all requests have a last plan or none has, and all have the same number of candidates.
    """
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
    if not np.isfinite(sampled).all():  # with finite weights, too, if these are absurd
        raise ValueError(
            "the policy's actions are not finite, because its training diverged: train again with a lower"
            " train.learning_rate"
        )
    drawn = sampled.reshape(len(requests), -1, *sampled.shape[1:])
    return [
        chunks[0] if request.last is None else closest(chunks, request.last, program.action_scale)
        for request, chunks in zip(requests, drawn, strict=True)
    ]


def _generator(request: PlanRequest, number: int) -> torch.Generator:
    """The generator of one candidate; the first candidate has the noise of a plan without further candidates."""
    return derive_generator(request.seed, request.number, *([number] if number else []))


def closest(candidates: NDArray[np.float32], last: LastPlan, action_scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The candidate with the least squared distance to the last plan, over the control steps that both plans cover.

    Args:
        candidates: (N, action_horizon, action_dim), one or more.
        last: the plan to continue; without overlap the first candidate is taken.
        action_scale: (action_dim,) unit of the distance in each dimension.

    Returns:
        (action_horizon, action_dim), one of the candidates.
    """
    apart = ((candidates - last.chunk) / action_scale)[:, : last.overlap]
    chosen: NDArray[np.float32] = candidates[np.square(apart).sum(axis=(1, 2)).argmin()]
    return chosen


def checked_observation(config: PolicyConfig, observation: Observation) -> ByKey:
    """Check that an observation fits the policy, and return it as arrays by key.

    Args:
        config: the policy's configuration.
        observation: a vector, an image, or arrays by key.

    Returns:
        Copies of the arrays: the caller may reuse its buffers, and the history must not change with them.

    Raises:
        ValueError: missing or unknown keys, a wrong shape, or a value that is no number, NaN or infinite.
    """
    by_key = {key: np.array(value) for key, value in as_dict(observation).items()}
    check_observations(by_key, config.observation_shapes)
    for key, value in by_key.items():
        if value.dtype.kind not in "biuf":
            raise ValueError(f"observation {key!r} must hold numbers; got an array of {value.dtype}")
        if not np.isfinite(value).all():
            where = np.argwhere(~np.isfinite(value))[0].tolist()
            raise ValueError(
                f"observation {key!r} must hold finite numbers; got {value[tuple(where)]} at {where}:"
                " it was not used, and the controller is as it was"
            )
    return by_key
