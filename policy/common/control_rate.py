"""Control rates as files and environments state them, and the warning where they differ."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

# A rate above this is not one of control, and is taken as not stated.
MAX_HZ = 1e6
# Rates that differ by less are the same: many are rounded, such as 30 for 29.97.
TOLERANCE = 0.02


def stated_rate(value: Any) -> float | None:
    """Return a rate in Hz as a file or an environment states it.

    >>> stated_rate(10), stated_rate("10"), stated_rate(0)
    (10.0, None, None)

    Returns:
        The rate, or None if the value is not one: nothing is guessed.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return float(value) if value <= MAX_HZ and not value <= 0 else None


def describe_mismatch(
    demonstrated: float | None, environment: float | None, control_rate: float | None = None
) -> str | None:
    """Say that actions are executed at another rate than they were demonstrated at.

    Args:
        demonstrated: control steps per second of the demonstrations; None if not stated.
        environment: control steps per second of the environment; None if not stated.
        control_rate: periods per second of a real-time rollout, or None.

    Returns:
        The warning; None if no two known rates differ.
    """
    if demonstrated is None:
        return None
    stated = {"the environment steps": environment, "the controller acts": control_rate}
    differing = [
        f"{who} at {rate:g} Hz"
        for who, rate in stated.items()
        if rate is not None and not math.isclose(rate, demonstrated, rel_tol=TOLERANCE)
    ]
    if not differing:
        return None
    rates = "an environment" if control_rate is None else "an environment and a control_rate="
    return (
        f"demonstrated at {demonstrated:g} Hz, {' and '.join(differing)}: each action takes effect for another time"
        f" than it was demonstrated for. Choose {rates} of {demonstrated:g} Hz, or resample the demonstrations;"
        " where env=gym takes a wrong rate from the simulator, env.control_hz=RATE corrects it"
    )
