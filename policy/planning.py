"""From observations to chunks: histories, their checks, and one network call for many robots."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from policy.diffusion_policy import PolicyConfig, is_image
from policy.inference import SamplerProgram
from policy.seeding import derive_generator

Observation = NDArray[Any] | Mapping[str, NDArray[Any]]
ByKey = dict[str, NDArray[Any]]


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
        number: of the plan in its episode; noise is drawn from (seed, number).
        observations: (obs_horizon, *shape) under each key.
        previous: (action_horizon, action_dim) the last chunk, shifted to now; None to begin from noise alone.
        keep: (action_horizon,) how much of it to keep; None exactly where `previous` is.
    """

    seed: int
    number: int
    observations: ByKey
    previous: NDArray[np.float32] | None = None
    keep: NDArray[np.float32] | None = None


def sample_plans(
    program: SamplerProgram, requests: Sequence[PlanRequest], plan_batch: int = 1
) -> list[NDArray[np.float32]]:
    """Sample one chunk for each request.

    Args:
        program: the policy's sampling.
        requests: one or more.
        plan_batch: rows in one network call. Rows are padded up to it, because a matrix product's rounding depends on
            its number of rows: with a fixed number a chunk is the same alone or among others.

    Returns:
        (action_horizon, action_dim) chunks in the data's units, in the order of the requests.
    """
    chunks: dict[int, NDArray[np.float32]] = {}
    for fresh in (True, False):
        group = [number for number, request in enumerate(requests) if (request.previous is None) is fresh]
        for start in range(0, len(group), plan_batch):
            numbers = group[start : start + plan_batch]
            chunks |= zip(numbers, _sampled(program, [requests[n] for n in numbers], plan_batch), strict=False)
    return [chunks[number] for number in range(len(requests))]


def _sampled(program: SamplerProgram, requests: Sequence[PlanRequest], plan_batch: int) -> NDArray[np.float32]:
    rows = [*requests, *[requests[-1]] * (plan_batch - len(requests))]
    observations = {
        key: torch.from_numpy(np.stack([row.observations[key] for row in rows])) for key in rows[0].observations
    }
    generators = [derive_generator(row.seed, row.number) for row in rows]
    before: dict[str, Any] = {}
    if rows[0].previous is not None:
        before = {"previous": np.stack([row.previous for row in rows]), "keep": np.stack([row.keep for row in rows])}  # type: ignore[misc]
    chunks: NDArray[np.float32] = program.sample_actions(observations, generator=generators, **before).cpu().numpy()
    return chunks


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
    by_key, expected = as_dict(observation), config.observation_shapes
    if by_key.keys() != expected.keys():
        raise ValueError(f"an observation must have the keys {sorted(expected)}; got {sorted(by_key)}")
    for key, value in by_key.items():
        if np.shape(value) != tuple(expected[key]):
            raise ValueError(f"observation {key!r} must have shape {tuple(expected[key])}; got {np.shape(value)}")
        if not np.isfinite(value).all():
            where = np.argwhere(~np.isfinite(value))[0].tolist()
            raise ValueError(
                f"observation {key!r} must hold finite numbers; got {np.asarray(value)[tuple(where)]} at {where}:"
                " it was not used, and the controller is as it was"
            )
    return {key: np.array(value) for key, value in by_key.items()}


def plain_key(shape: Sequence[int]) -> str:
    """The key under which an observation without keys stands: `image` for a picture, else `state`."""
    return "image" if is_image(shape) else "state"


def as_dict(observation: Observation) -> ByKey:
    """An observation as arrays by key."""
    if isinstance(observation, Mapping):
        return dict(observation)
    return {plain_key(np.shape(observation)): observation}
