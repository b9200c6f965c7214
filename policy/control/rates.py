"""The highest control rates that the duration of plans allows, for a robot that waits and for one that plans ahead."""

from __future__ import annotations

import math


def waiting_rate(slow_plan: float) -> float:
    """The highest control rate at which a robot that waits for its plans keeps every deadline.

    Whatever the execution horizon is, the control step that plans has one period for it.

    Args:
        slow_plan: seconds of a control step that plans, of the slowest that may occur.

    Returns:
        Control steps per second.
    """
    return 1 / slow_plan


def planning_ahead_rate(
    typical_plan: float, slow_plan: float, slow_step: float, *, execution_horizon: int, action_horizon: int
) -> float:
    """The highest control rate at which a robot that plans ahead has no late step.

    A plan that takes d control steps is executed from its action d. It is started when `execution_horizon` actions of
    the last plan are executed, or earlier, so that it arrives before the last one is used up; but not before the last
    one has arrived, since one plan is computed at a time. So the last plan has action_horizon - max(d, start) actions
    left, which must be d or more. `RealTimeController` plans the start from the time that recent plans took, so that a
    slow plan after typical ones must fit although it was expected to take the typical time.

    Args:
        typical_plan: seconds of a plan, of the typical one, which the next one is expected to take.
        slow_plan: seconds of the slowest plan that may occur.
        slow_step: seconds of the slowest control step that does not plan, which must fit in a period.
        execution_horizon: actions executed before the next plan is started, if it takes no time.
        action_horizon: actions in a chunk.

    Returns:
        Control steps per second; 0 if chunks are too short to plan ahead at any rate.

    Example:
        >>> planning_ahead_rate(0.02, 0.02, 1e-4, execution_horizon=8, action_horizon=8)
        200.0
        >>> planning_ahead_rate(0.01, 0.02, 1e-4, execution_horizon=8, action_horizon=8)
        50.0
    """
    for delay_steps in range(action_horizon // 2, 0, -1):
        expected = math.ceil(delay_steps * typical_plan / slow_plan)
        start = max(delay_steps, min(execution_horizon, action_horizon - expected))
        if start + delay_steps <= action_horizon:
            return 1 / max(slow_plan / delay_steps, slow_step)
    return 0.0
