"""Receding-horizon control: observe, plan a chunk, execute a prefix of it, plan again."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import NDArray

from policy.common.observations import Observation
from policy.control.planning import History, PlanRequest, checked_observation, sample_plans
from policy.control.timeline import EXECUTION_HORIZON, ControllerSettings, Timeline
from policy.diffusion.sampler import Sampler
from policy.inference.backends import SamplerProgram, compile_sampler
from policy.model.diffusion_policy import DiffusionPolicy

Slot = TypeVar("Slot", bound=Hashable)


@dataclass
class _Robot:
    """One robot's running episode: what it has seen, and how far it is."""

    seed: int
    history: History
    timeline: Timeline


@dataclass(kw_only=True)
class RecedingHorizonController:
    """Drives one robot, or many at once, with a policy, in simulated time: it waits for a plan without a step passing.

    The observation history and the place in the current chunk live here, one per slot; the policy keeps none. Plan n
    of an episode draws its noise from (episode seed, n) alone, so that an episode runs the same whatever else runs.
    `RealTimeController` drives one robot against the clock.

    Attributes:
        policy: gives the chunks.
        sampler: how they are sampled.
        execution_horizon: actions executed before the next plan is begun, 1..action_horizon.
        settings: what happens while a plan is made, and how long that takes.
        plan_batch: plans in one network call, see `sample_plans`.
        program: the policy's sampling, compiled for `sampler`; by default with the default backend.
        action_space: actions are clipped to it; None leaves them as they are.

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
    _episodes: dict[Hashable, _Robot] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.settings.check(self.execution_horizon, self.policy.config.action_horizon)
        if self.plan_batch < 1:
            raise ValueError(f"plan_batch must be 1 or more; got {self.plan_batch}")
        self._program = program_for(self.policy, self.sampler, self.program)

    def reset(self, seed: int, slot: Hashable = 0) -> None:
        """Begin an episode.

        Args:
            seed: of the episode; 0 or more.
            slot: which robot.
        """
        config = self.policy.config
        timeline = Timeline(self.settings, self.execution_horizon, config.action_horizon, config.action_dim)
        self._episodes[slot] = _Robot(seed, History(config), timeline)

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """The next action of the robot in slot 0.

        Args:
            observation: the newest observation: a vector, an image, or arrays by key.

        Returns:
            (action_dim,) action in the data's units.

        Raises:
            ValueError: `reset` was not called, or an observation that does not fit the policy or is not finite; the
                controller is then as it was before.
        """
        return self.act_many({0: observation})[0]

    def act_many(self, observations: Mapping[Slot, Observation]) -> dict[Slot, NDArray[np.float32]]:
        """The next action of several robots, planned together where a plan is due.

        Args:
            observations: the newest observation of each slot.

        Returns:
            (action_dim,) action of each slot.

        Raises:
            ValueError: see `act`; no slot has then taken its observation in.
        """
        histories = {slot: self._episode(slot).history for slot in observations}
        checked = {slot: checked_observation(self.policy.config, seen) for slot, seen in observations.items()}
        for slot, by_key in checked.items():
            histories[slot].add(by_key)
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
            ValueError: see `act`.
        """
        episode = self._episode(slot)
        episode.history.add(checked_observation(self.policy.config, observation))
        return episode.timeline.due(self.settings.delay_steps)

    def plan(self, slots: Iterable[Hashable]) -> None:
        """Sample a chunk for those of the slots that are due one."""
        delay = self.settings.delay_steps
        waiting = [e for e in (self._episodes[slot] for slot in slots) if e.timeline.due(delay)]
        requests = [request_of(e.seed, e.history, e.timeline, self.sampler, delay) for e in waiting]
        for episode, chunk in zip(waiting, sample_plans(self._program, requests, self.plan_batch), strict=True):
            episode.timeline.deliver(chunk, delay)

    def next_action(self, slot: Hashable = 0) -> NDArray[np.float32]:
        """(action_dim,) next action of a slot for which no plan is due."""
        return clipped(self._episodes[slot].timeline.next_action(), self.action_space)

    def late_steps(self, slot: Hashable = 0) -> int:
        """Control steps of a slot's episode for which there was no action of a plan."""
        return self._episodes[slot].timeline.late_steps

    def _episode(self, slot: Hashable) -> _Robot:
        if slot not in self._episodes:
            raise ValueError(f"slot {slot!r} has no episode: call reset(seed, slot) first")
        return self._episodes[slot]


def program_for(policy: DiffusionPolicy, sampler: Sampler, program: SamplerProgram | None) -> SamplerProgram:
    """The program given, or the policy's own sampling as one.

    Raises:
        ValueError: more denoising steps than the schedule has timesteps, or a program of another sampler.
    """
    sampler.check(policy.schedule.num_steps)
    if program is None:
        return compile_sampler(policy, sampler)
    if program.sampler != sampler:
        raise ValueError(f"the program was compiled for {program.sampler}; the controller has {sampler}")
    return program


def request_of(seed: int, history: History, timeline: Timeline, sampler: Sampler, delay_steps: int) -> PlanRequest:
    """Begin an episode's next plan.

    Args:
        seed: of the episode.
        history: what it has seen.
        timeline: where it is.
        sampler: whether plans begin from the last chunk.
        delay_steps: control steps that the plan will take.

    Returns:
        What to sample; the last plan and candidates are part of it only where they are used.
    """
    number, observations = timeline.plans, history.stacked()
    last = timeline.begin(delay_steps)
    candidates = timeline.settings.candidates if last is not None and last.overlap else 1
    if last is not None and sampler.warm_start is None and candidates == 1 and not last.keep.any():
        last = None
    return PlanRequest(seed=seed, number=number, observations=observations, last=last, candidates=candidates)


def clipped(action: NDArray[np.float32], action_space: Box | None) -> NDArray[np.float32]:
    """An action within its space."""
    if action_space is None:
        return action
    return np.clip(action, action_space.low, action_space.high).astype(np.float32)
