"""Receding-horizon control: observe, plan a chunk, execute a prefix of it, plan again."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from policy.common.observations import Observation
from policy.control.planning import History, PlanRequest, Plans, checked_observation, sample_plans
from policy.control.timeline import EXECUTION_HORIZON, ControllerSettings, Timeline, cancelling
from policy.diffusion.sampler import Sampler
from policy.inference.backends import SamplerProgram, compile_sampler
from policy.model.diffusion_policy import DiffusionPolicy

Slot = TypeVar("Slot", bound=Hashable)


@dataclass
class _Robot:
    """The current episode of one robot: its seed, its observation history and its timeline."""

    seed: int
    history: History
    timeline: Timeline


@dataclass(kw_only=True)
class RecedingHorizonController:
    """Drives one robot, or many at once, in simulated time: no control step passes while a plan is computed.

    The observation history and the position in the current chunk are kept here, for each slot; the policy has no
    state. Plan n of an episode draws its noise from (episode seed, n) alone, so that an episode does not depend on the
    episodes that run beside it. `RealTimeController` drives one robot in real time.

    Attributes:
        policy: samples the chunks.
        sampler: sampling settings.
        execution_horizon: actions executed before the next plan is started, 1..action_horizon.
        settings: behaviour while a plan is computed, and the number of control steps that this takes.
        plan_batch: plans per network call, see `sample_plans`.
        program: the policy's sampling, compiled for `sampler`; by default it is compiled with the default backend.
        action_space: actions are clipped to it; None leaves them unchanged.
        plans: samples the plans that are due, in place of the program; by default `sample_plans` does.

    Raises:
        ValueError: `execution_horizon`, `settings.delay_steps` or `sampler.ddim_steps` out of range, or a program of
            another sampler.

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
    execution_horizon: int = EXECUTION_HORIZON
    settings: ControllerSettings = field(default_factory=ControllerSettings)
    plan_batch: int = 1
    program: SamplerProgram | None = None
    action_space: Box | None = None
    plans: Plans | None = None
    _episodes: dict[Hashable, _Robot] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.settings.check(self.execution_horizon, self.policy.config.action_horizon)
        if self.plan_batch < 1:
            raise ValueError(f"plan_batch must be 1 or more; got {self.plan_batch}")
        self._plans = self.plans or partial(
            sample_plans, program_for(self.policy, self.sampler, self.program), plan_batch=self.plan_batch
        )

    def reset(self, seed: int, slot: Hashable = 0) -> None:
        """Start an episode.

        Args:
            seed: the episode's seed, 0 or more.
            slot: the robot's slot.
        """
        config = self.policy.config
        timeline = Timeline(self.settings, self.execution_horizon, config.action_horizon, config.action_dim)
        self._episodes[slot] = _Robot(seed, History(config), timeline)

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Return the next action of the robot in slot 0.

        Args:
            observation: the newest observation: a vector, an image, or arrays by key.

        Returns:
            (action_dim,) action in the data's units.

        Raises:
            ValueError: `reset` was not called, or the observation does not fit the policy or is not finite. The
                controller is then unchanged. Or the policy's actions are not finite: the next call plans again.
        """
        return self.act_many({0: observation})[0]

    def act_many(self, observations: Mapping[Slot, Observation]) -> dict[Slot, NDArray[np.float32]]:
        """Return the next action of several robots; the plans that are due are sampled together.

        Args:
            observations: the newest observation of each slot.

        Returns:
            (action_dim,) action of each slot.

        Raises:
            ValueError: see `act`, for all slots.
        """
        histories = {slot: self._episode(slot).history for slot in observations}
        checked = {slot: checked_observation(self.policy.config, seen) for slot, seen in observations.items()}
        for slot, by_key in checked.items():
            histories[slot].add(by_key)
        self.plan(observations)
        return {slot: self.next_action(slot) for slot in observations}

    def observe(self, observation: Observation, slot: Hashable = 0) -> bool:
        """Add the newest observation of a slot.

        `observe`, `plan` and `next_action` do in parts what `act` does, for callers that plan for many slots at once.

        Args:
            observation: the newest observation.
            slot: the robot's slot.

        Returns:
            Whether `plan` must be called before `next_action`.

        Raises:
            ValueError: see `act`.
        """
        episode = self._episode(slot)
        episode.history.add(checked_observation(self.policy.config, observation))
        return episode.timeline.due(self.settings.delay_steps)

    def plan(self, slots: Iterable[Hashable]) -> None:
        """Sample a chunk for each of the slots that needs a new plan.

        Raises:
            ValueError: the policy's actions are not finite; the plans are then due again.
        """
        delay = self.settings.delay_steps
        waiting = [e for e in (self._episodes[slot] for slot in slots) if e.timeline.due(delay)]
        requests = [request_of(e.seed, e.history, e.timeline, self.sampler, delay) for e in waiting]
        with cancelling(*(episode.timeline for episode in waiting)):
            chunks = self._plans(requests)
        for episode, chunk in zip(waiting, chunks, strict=True):
            episode.timeline.deliver(chunk, delay)

    def next_action(self, slot: Hashable = 0) -> NDArray[np.float32]:
        """Return the (action_dim,) next action of a slot for which no plan is due."""
        return clipped(self._episodes[slot].timeline.next_action(), self.action_space)

    def late_steps(self, slot: Hashable = 0) -> int:
        """Control steps of a slot's episode without a planned action."""
        return self._episodes[slot].timeline.late_steps

    def _episode(self, slot: Hashable) -> _Robot:
        if slot not in self._episodes:
            raise ValueError(f"slot {slot!r} has no episode: call reset(seed, slot) first")
        return self._episodes[slot]


def program_for(policy: DiffusionPolicy, sampler: Sampler, program: SamplerProgram | None) -> SamplerProgram:
    """The given program, or, if it is None, the policy's sampling compiled with the default backend.

    Raises:
        ValueError: a sampler that does not fit the policy, see `DiffusionPolicy.settled`, or a program of another one.
    """
    sampler = policy.settled(sampler)
    if program is None:
        return compile_sampler(policy, sampler)
    if program.sampler != sampler:
        raise ValueError(f"the program was compiled for {program.sampler}; the controller has {sampler}")
    return program


def request_of(seed: int, history: History, timeline: Timeline, sampler: Sampler, delay_steps: int) -> PlanRequest:
    """Start the next plan of an episode.

    Args:
        seed: the episode's seed.
        history: the episode's observations.
        timeline: the episode's timeline; it records that a plan was started.
        sampler: sampling settings; with `warm_start`, plans start from the last chunk.
        delay_steps: control steps that the plan will take.

    Returns:
        The request. It has the last plan, and several candidates, only where they have an effect.
    """
    number, observations = timeline.plans, history.stacked()
    last = timeline.begin(delay_steps)
    candidates = timeline.settings.candidates if last is not None and last.overlap else 1
    if last is not None and sampler.warm_start is None and candidates == 1 and not last.keep.any():
        last = None
    return PlanRequest(seed=seed, number=number, observations=observations, last=last, candidates=candidates)


def clipped(action: NDArray[np.float32], action_space: Box | None) -> NDArray[np.float32]:
    """Clip an action to its space; None leaves it unchanged."""
    if action_space is None:
        return action
    return np.clip(action, action_space.low, action_space.high).astype(np.float32)
