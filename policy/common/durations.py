"""Durations as people write them."""

from __future__ import annotations

import math
import re

UNITS = {"s": 1, "min": 60, "h": 3600}


def seconds_of(name: str, value: object) -> float:
    """Read a duration.

    Args:
        name: the setting that it is the value of, for the message.
        value: the text of a number above 0 and its unit.

    Returns:
        Seconds.

    Raises:
        ValueError: it is something else.

    Example:
        >>> seconds_of("recipe.budget", "1.5h")
        5400.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h)", str(value).strip(), re.ASCII)
    if found is None or not float(found[1]):
        got = f"{value:g}" if isinstance(value, float) else repr(value)
        raise ValueError(f"{name} takes a time above 0 with its unit, such as 45s, 30min or 2h; got {got}")
    return float(found[1]) * UNITS[found[2]]


def duration_text(seconds: float) -> str:
    """Write a duration so that `seconds_of` can read it, rounded up to whole seconds, minutes or tenths of an hour.

    >>> duration_text(89), duration_text(91), duration_text(1500), duration_text(8000)
    ('89s', '2min', '25min', '2.3h')
    """
    if seconds < 90:
        return f"{max(1, math.ceil(seconds))}s"
    if seconds < 7200:
        return f"{math.ceil(seconds / 60)}min"
    return f"{math.ceil(seconds / 360) / 10:g}h"


def exact_text(seconds: float) -> str:
    """Write a duration exactly, in the greatest unit that leaves no fraction.

    >>> exact_text(150), exact_text(1800), exact_text(7200), exact_text(0.5)
    ('150s', '30min', '2h', '0.5s')
    """
    unit = next((unit for unit in ("h", "min") if seconds % UNITS[unit] == 0), "s")
    return f"{seconds / UNITS[unit]:.15g}{unit}"
