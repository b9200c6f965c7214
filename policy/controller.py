"""Receding-horizon control: observe, plan a chunk, execute a prefix of it, plan again."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from policy.diffusion_policy import DiffusionPolicy, is_image
from policy.inference import SamplerProgram
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
        program: the policy's sampling, compiled for `sampler`; None samples with the policy itself.

    Raises:
        ValueError: `execution_horizon` or `sampler.ddim_steps` out of range, or a program of another sampler.

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
    program: SamplerProgram | None = None
    _episodes: dict[Hashable, _Episode] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.sampler.check(self.policy.schedule.num_steps)
        check_execution_horizon(self.execution_horizon, self.policy.config.action_horizon)
        if self.plan_batch < 1:
            raise ValueError(f"plan_batch must be 1 or more; got {self.plan_batch}")
        if self.program is not None and self.program.sampler != self.sampler:
            raise ValueError(f"the program was compiled for {self.program.sampler}; the controller has {self.sampler}")

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
            observation: the newest observation: a vector, an image, or arrays by key.

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
        checked = {slot: self._checked(slot, observation) for slot, observation in observations.items()}
        for slot, observation in checked.items():
            self._episodes[slot].observe(observation)
        self.plan(observations)
        return {slot: self.next_action(slot) for slot in observations}

    def observe(self, observation: Observation, slot: Hashable = 0) -> bool:
        """Take the newest observation in; `act` in parts, for callers that plan for many slots at once.

        Args:
            observation: of the slot's robot.
            slot: which robot.

        Returns:
            Whether `plan` must come before `next_action`.

        Raises:
            ValueError: see `act_many`.
        """
        checked = self._checked(slot, observation)
        episode = self._episodes[slot]
        episode.observe(checked)
        return episode.chunk is None

    def plan(self, slots: Iterable[Hashable]) -> None:
        """Sample a chunk for those of the slots whose last one is used up."""
        waiting = [episode for episode in (self._episodes[slot] for slot in slots) if episode.chunk is None]
        for start in range(0, len(waiting), self.plan_batch):
            self._plan(waiting[start : start + self.plan_batch])

    def next_action(self, slot: Hashable = 0) -> NDArray[np.float32]:
        """(action_dim,) next action of a slot whose chunk is planned."""
        episode = self._episodes[slot]
        assert episode.chunk is not None, "plan() comes first"
        action = episode.chunk[episode.cursor]
        episode.cursor += 1
        if episode.cursor == self.execution_horizon:
            episode.chunk, episode.cursor = None, 0
        return action

    def _checked(self, slot: Hashable, observation: Observation) -> dict[str, NDArray[Any]]:
        if slot not in self._episodes:
            raise ValueError(f"slot {slot!r} has no episode: call reset(seed, slot) first")
        by_key, expected = as_dict(observation), self.policy.config.observation_shapes
        if by_key.keys() != expected.keys():
            raise ValueError(f"an observation must have the keys {sorted(expected)}; got {sorted(by_key)}")
        for key, value in by_key.items():
            if np.shape(value) != tuple(expected[key]):
                raise ValueError(f"observation {key!r} must have shape {tuple(expected[key])}; got {np.shape(value)}")
        # A copy: the caller may reuse its buffer, and the history must not change with it.
        return {key: np.array(value) for key, value in by_key.items()}

    def _plan(self, episodes: list[_Episode]) -> None:
        padding = [episodes[-1]] * (self.plan_batch - len(episodes))
        rows = [*episodes, *padding]
        observations = {
            key: torch.from_numpy(np.stack([np.stack([seen[key] for seen in e.history]) for e in rows]))
            for key in rows[0].history[-1]
        }
        generators = [derive_generator(e.seed, e.plans) for e in rows]
        if self.program is None:
            chunks = self.policy.sample_actions(observations, generator=generators, **asdict(self.sampler))
        else:
            chunks = self.program.sample_actions(observations, generator=generators)
        for episode, chunk in zip(episodes, chunks.cpu().numpy(), strict=False):
            episode.chunk = chunk
            episode.plans += 1


def plain_key(shape: Sequence[int]) -> str:
    """The key under which an observation without keys stands: `image` for a picture, else `state`."""
    return "image" if is_image(shape) else "state"


def as_dict(observation: Observation) -> dict[str, NDArray[Any]]:
    """An observation as arrays by key."""
    if isinstance(observation, Mapping):
        return dict(observation)
    return {plain_key(np.shape(observation)): observation}


def check_execution_horizon(execution_horizon: int, action_horizon: int) -> None:
    """Refuse to execute more actions than a chunk has.

    Raises:
        ValueError: outside 1..action_horizon.
    """
    if not 1 <= execution_horizon <= action_horizon:
        raise ValueError(f"execution_horizon must be within 1..{action_horizon}; got {execution_horizon}")
