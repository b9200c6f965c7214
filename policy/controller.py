"""Receding-horizon control: observe, plan a chunk, execute a prefix of it, plan again."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from policy.diffusion_policy import DiffusionPolicy
from policy.sampler import Sampler
from policy.seeding import derive_generator

Slot = TypeVar("Slot", bound=Hashable)
Observation = NDArray[Any] | Mapping[str, NDArray[Any]]


@dataclass
class _Episode:
    """One robot's running episode: what it has seen, and how far it is in its chunk."""

    seed: int
    history: deque[dict[str, NDArray[Any]]]
    chunk: NDArray[np.float32] | None = None
    cursor: int = 0
    plans: int = 0

    def observe(self, observation: dict[str, NDArray[Any]]) -> None:
        # The first observation stands in for the ones before it, as in training.
        missing = (self.history.maxlen or 1) if not self.history else 1
        self.history.extend([observation] * missing)


@dataclass(kw_only=True)
class RecedingHorizonController:
    """Drives one robot, or many at once, with a policy.

    The observation history and the place in the current chunk live here, one per slot; the policy keeps none. Plan n
    of an episode draws its noise from (episode seed, n) alone, so that an episode runs the same whatever else runs.

    Attributes:
        policy: gives the chunks.
        sampler: how they are sampled.
        execution_horizon: actions executed before the next plan, 1..action_horizon.
        plan_batch: rows in one network call. Rows are padded up to it, because a matrix product's rounding depends on
            its number of rows: with a fixed number an episode's actions are the same alone or among others.

    Raises:
        ValueError: `execution_horizon` or `sampler.ddim_steps` out of range.

    Example:
        >>> import numpy as np
        >>> from policy import DiffusionPolicy, PolicyConfig, RecedingHorizonController
        >>> policy = DiffusionPolicy(PolicyConfig(observation_shapes={"state": (5,)}, action_dim=2))
        >>> controller = RecedingHorizonController(policy=policy, execution_horizon=4)
        >>> controller.reset(seed=0)
        >>> controller.act(np.zeros(5, np.float32)).shape
        (2,)
    """

    policy: DiffusionPolicy
    sampler: Sampler = field(default_factory=Sampler)
    execution_horizon: int = 8
    plan_batch: int = 1
    _episodes: dict[Hashable, _Episode] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.sampler.check(self.policy.schedule.num_steps)
        check_execution_horizon(self.execution_horizon, self.policy.config.action_horizon)
        if self.plan_batch < 1:
            raise ValueError(f"plan_batch must be 1 or more; got {self.plan_batch}")

    def reset(self, seed: int, slot: Hashable = 0) -> None:
        """Begin an episode.

        Args:
            seed: of the episode; 0 or more.
            slot: which robot.
        """
        self._episodes[slot] = _Episode(seed, deque(maxlen=self.policy.config.obs_horizon))

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """The next action of the robot in slot 0.

        Args:
            observation: the newest observation: a vector, or arrays by key.

        Returns:
            (action_dim,) action in the data's units.

        Raises:
            ValueError: `reset` was not called, or an observation that does not fit the policy.
        """
        return self.act_many({0: observation})[0]

    def act_many(self, observations: Mapping[Slot, Observation]) -> dict[Slot, NDArray[np.float32]]:
        """The next action of several robots, planned together where their chunks are used up.

        Args:
            observations: the newest observation of each slot.

        Returns:
            (action_dim,) action of each slot.

        Raises:
            ValueError: a slot without `reset`, or an observation that does not fit the policy.
        """
        if missing := [slot for slot in observations if slot not in self._episodes]:
            raise ValueError(f"slot {missing[0]!r} has no episode: call reset(seed, slot) first")
        seen = {slot: self._checked(as_dict(observation)) for slot, observation in observations.items()}
        for slot, observation in seen.items():
            self._episodes[slot].observe(observation)
        waiting = [e for e in (self._episodes[slot] for slot in observations) if e.chunk is None]
        for start in range(0, len(waiting), self.plan_batch):
            self._plan(waiting[start : start + self.plan_batch])
        return {slot: self._next_action(self._episodes[slot]) for slot in observations}

    def _checked(self, observation: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        expected = self.policy.config.observation_shapes
        if observation.keys() != expected.keys():
            raise ValueError(f"an observation must have the keys {sorted(expected)}; got {sorted(observation)}")
        for key, value in observation.items():
            if np.shape(value) != tuple(expected[key]):
                raise ValueError(f"observation {key!r} must have shape {tuple(expected[key])}; got {np.shape(value)}")
        # A copy: the caller may reuse its buffer, and the history must not change with it.
        return {key: np.array(value) for key, value in observation.items()}

    def _next_action(self, episode: _Episode) -> NDArray[np.float32]:
        assert episode.chunk is not None
        action = episode.chunk[episode.cursor]
        episode.cursor += 1
        if episode.cursor == self.execution_horizon:
            episode.chunk, episode.cursor = None, 0
        return action

    def _plan(self, episodes: list[_Episode]) -> None:
        padding = [episodes[-1]] * (self.plan_batch - len(episodes))
        rows = [*episodes, *padding]
        observations = {
            key: torch.from_numpy(np.stack([np.stack([seen[key] for seen in e.history]) for e in rows]))
            for key in rows[0].history[-1]
        }
        chunks = self.policy.sample_actions(
            observations, generator=[derive_generator(e.seed, e.plans) for e in rows], **asdict(self.sampler)
        )
        for episode, chunk in zip(episodes, chunks.cpu().numpy(), strict=False):
            episode.chunk = chunk
            episode.plans += 1


def as_dict(observation: Observation) -> dict[str, NDArray[Any]]:
    """An observation as arrays by key; a plain vector stands under `state`."""
    if isinstance(observation, Mapping):
        return dict(observation)
    return {"state": observation}


def check_execution_horizon(execution_horizon: int, action_horizon: int) -> None:
    """Refuse to execute more actions than a chunk has.

    Raises:
        ValueError: outside 1..action_horizon.
    """
    if not 1 <= execution_horizon <= action_horizon:
        raise ValueError(f"execution_horizon must be within 1..{action_horizon}; got {execution_horizon}")
