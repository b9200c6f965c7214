"""When to plan, and what to execute at each control step: the bookkeeping of one episode, without networks or clocks.

The actions of each plan that are executed, for action_horizon 8, execution_horizon 5 and plans that take 2 control
steps; a dot is a control step during which the plan is computed:

    control step   0 1 2 3 4 5 6 7 8 9 ...
    plan 0         0 1 2 3 4 5 6             the episode starts when this plan arrives
    plan 1                   . . 2 3 4 5 6   started at control step 5, arrives at 7; its actions 0 and 1 are not used
    plan 2                             . .   started at control step 10

A synchronous robot stands still at the dots and then executes the new plan from its first action.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from policy.common.arguments import check_choice

Chunk = NDArray[np.float32]
Mode = Literal["synchronous", "asynchronous", "continuous"]
Late = Literal["hold", "zero"]

# Default number of actions executed before the next plan is started.
EXECUTION_HORIZON = 8


@dataclass(frozen=True, kw_only=True)
class ControllerSettings:
    """How chunks become actions when planning takes time.

    Attributes:
        mode: `synchronous` waits for each plan and executes it from its first action; `asynchronous` goes on executing
            the last plan while the next one is computed, and then switches to the new plan's action for the current
            control step; `continuous` does the same, but inpaints the new plan around the actions that are executed in
            the meantime, and pulls it towards the rest of the last plan with decreasing weight (after the real-time
            chunking of Black et al. 2025).
        delay_steps: simulated duration of a plan, in control steps; an episode's first plan takes none.
        late: action to execute when the last plan is used up and the next one has not arrived: `hold` repeats the last
            action (for position control), `zero` is an action of zeros (for velocity control).
        candidates: chunks sampled for each plan, in one network call; the one closest to the rest of the last plan is
            executed (backward coherence of Liu et al. 2024). No effect where the last plan is used up.

    Raises:
        ValueError: an unknown name, a negative delay, or fewer than one candidate.
    """

    mode: Mode = "synchronous"
    delay_steps: int = 0
    late: Late = "hold"
    candidates: int = 1

    def __post_init__(self) -> None:
        for name, value, allowed in (("mode", self.mode, get_args(Mode)), ("late", self.late, get_args(Late))):
            check_choice(f"controller.{name}", value, allowed)
        if self.delay_steps < 0:
            raise ValueError(f"controller.delay_steps must be 0 or more; got {self.delay_steps}")
        if self.candidates < 1:
            raise ValueError(f"controller.candidates must be 1 or more; got {self.candidates}")

    def check(self, execution_horizon: int, action_horizon: int) -> None:
        """Reject an execution horizon or a delay that is too long for a chunk.

        Args:
            execution_horizon: actions executed before the next plan is started.
            action_horizon: actions in a chunk.

        Raises:
            ValueError: `execution_horizon` outside 1..action_horizon, or a delay that leaves no action of a chunk to
                execute.
        """
        check_execution_horizon(execution_horizon, action_horizon)
        if self.mode != "synchronous" and self.delay_steps >= action_horizon:
            raise ValueError(
                f"controller.delay_steps must be below the {action_horizon} actions of a chunk with"
                f" controller.mode={self.mode}: no action would be left to execute; got {self.delay_steps}"
            )

    def due_after(self, execution_horizon: int, action_horizon: int, delay_steps: int) -> int:
        """Actions of a plan after which the next one is wanted, if that takes `delay_steps` control steps."""
        if self.mode == "synchronous":
            return execution_horizon
        # Early enough for the new plan to arrive before the last one is used up.
        return max(1, min(execution_horizon, action_horizon - delay_steps))

    def begins_after(self, execution_horizon: int, action_horizon: int) -> int:
        """Actions of a plan that are past, executed or not, when the next plan of the episode is begun.

        Args:
            execution_horizon: actions executed before the next plan is started.
            action_horizon: actions in a chunk.
        """
        due = self.due_after(execution_horizon, action_horizon, self.delay_steps)
        # Not before this plan has arrived.
        return due if self.mode == "synchronous" else max(due, self.delay_steps)

    def steps_per_plan(self, execution_horizon: int, action_horizon: int) -> int:
        """Control steps from one plan of an episode to the next; arguments as for `begins_after`."""
        stands_still = self.delay_steps if self.mode == "synchronous" else 0
        return self.begins_after(execution_horizon, action_horizon) + stands_still

    def candidates_of(self, execution_horizon: int, action_horizon: int) -> int:
        """Chunks sampled for a plan: one where nothing of the last plan is left; arguments as for `begins_after`."""
        return self.candidates if self.begins_after(execution_horizon, action_horizon) < action_horizon else 1


def check_execution_horizon(execution_horizon: int, action_horizon: int) -> None:
    """Reject an execution horizon that does not fit a chunk.

    Raises:
        ValueError: `execution_horizon` outside 1..action_horizon.
    """
    if not 1 <= execution_horizon <= action_horizon:
        # The user may have set either of the two; the other is a default, or stored in a checkpoint.
        raise ValueError(
            f"execution_horizon must be within 1..{action_horizon}; got {execution_horizon}:"
            f" a chunk has action_horizon={action_horizon} actions, so give an execution_horizon that fits,"
            " or train with another action_horizon"
        )


@dataclass(frozen=True, kw_only=True)
class LastPlan:
    """The last plan, aligned with a new one.

    Attributes:
        chunk: (action_horizon, action_dim) the last plan's actions from the control step at which the new plan starts,
            padded with copies of its last action.
        keep: (action_horizon,) weight in [0, 1] with which the new plan keeps each of these actions.
        overlap: number of these actions that are not padding: those for control steps that both plans cover.
    """

    chunk: Chunk
    keep: NDArray[np.float32]
    overlap: int


@dataclass
class _Plan:
    chunk: Chunk
    first_step: int  # the control step of its first action


@dataclass
class Timeline:
    """The state of one episode: its control step, the plan being executed and the plan being computed.

    Attributes:
        settings: how chunks become actions.
        execution_horizon: actions executed before the next plan is started.
        action_horizon: actions in a chunk.
        action_dim: width of one action.
        step: the current control step; `next_action` advances it.
        plans: number of plans started.
        late_steps: number of control steps without a planned action.
    """

    settings: ControllerSettings
    execution_horizon: int
    action_horizon: int
    action_dim: int
    step: int = 0
    plans: int = 0
    late_steps: int = 0
    _current: _Plan | None = None
    _coming: _Plan | None = None
    _begun: int | None = None
    _there: int = 0
    _executed: Chunk = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def is_first(self) -> bool:
        """Whether the episode has no plan yet."""
        return self._current is None

    def due(self, delay_steps: int) -> bool:
        """Whether to start planning now, given that a plan takes `delay_steps` control steps.

        Args:
            delay_steps: control steps that the plan will take.
        """
        self._arrive()
        if self._begun is not None or self._coming is not None:
            return False
        if self._current is None:
            return True
        period = self.settings.due_after(self.execution_horizon, self.action_horizon, delay_steps)
        return self.step - self._current.first_step >= period

    def begin(self, delay_steps: int) -> LastPlan | None:
        """Record that a plan is started from the observation of the current control step.

        Args:
            delay_steps: control steps that the plan will take.

        Returns:
            The last plan; None for an episode's first plan.
        """
        self._begun = self.step
        self.plans += 1
        if self._current is None:
            return None
        shift = self.step - self._current.first_step
        ahead = np.minimum(np.arange(self.action_horizon) + shift, self.action_horizon - 1)
        overlap = max(0, self.action_horizon - shift)
        keep = np.zeros(self.action_horizon, np.float32)
        if self.settings.mode == "continuous":
            keep = kept(overlap, delay_steps, self.action_horizon)
        return LastPlan(chunk=self._current.chunk[ahead], keep=keep, overlap=overlap)

    def cancel(self) -> None:
        """Forget the plan that was started by `begin`, because it failed: the same one is due again."""
        self._begun = None
        self.plans -= 1

    def deliver(self, chunk: Chunk, delay_steps: int = 0) -> None:
        """Accept the plan that was started by `begin`.

        Args:
            chunk: (action_horizon, action_dim).
            delay_steps: control steps between its start and the first one at which it may be executed; no effect for an
                episode's first plan.
        """
        assert self._begun is not None, "begin() comes first"
        self._there = self._begun + (0 if self._current is None else delay_steps)
        # A synchronous robot has stood still in the meantime, so its plan starts with the first action.
        first_step = self._there if self.settings.mode == "synchronous" else self._begun
        self._coming, self._begun = _Plan(chunk, first_step), None

    def next_action(self) -> Chunk:
        """Return the (action_dim,) action of the current control step, and advance to the next step."""
        self._arrive()
        action = self._planned()
        if action is None:
            self.late_steps += 1
            hold = self.settings.late == "hold" and self._executed.size
            action = self._executed if hold else np.zeros(self.action_dim, np.float32)
        self.step += 1
        self._executed = action.copy()
        return action.copy()

    def _arrive(self) -> None:
        if self._coming is not None and self.step >= self._there:
            self._current, self._coming = self._coming, None

    def _planned(self) -> Chunk | None:
        if self._current is None:
            return None
        usable = self.execution_horizon if self.settings.mode == "synchronous" else self.action_horizon
        place = self.step - self._current.first_step
        return self._current.chunk[place] if place < usable else None


@contextmanager
def cancelling(*timelines: Timeline) -> Iterator[None]:
    """If the plans that these episodes have begun fail, cancel them."""
    try:
        yield
    except BaseException:
        for timeline in timelines:
            timeline.cancel()
        raise


def kept(overlap: int, committed: int, action_horizon: int) -> NDArray[np.float32]:
    """Weight with which a new plan keeps each action of the last one.

    Args:
        overlap: actions that the last plan still has.
        committed: the number of these that are executed before the new plan arrives.
        action_horizon: actions in a chunk.

    Returns:
        (action_horizon,) 1 for committed actions, then decreasing in equal steps to 0 after the overlap.

    Example:
        >>> kept(overlap=5, committed=2, action_horizon=8).tolist()
        [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    """
    place = np.arange(action_horizon)
    falling = (overlap - place) / (max(0, overlap - committed) + 1)
    return np.where(place < min(committed, overlap), 1.0, np.clip(falling, 0, 1)).astype(np.float32)
