"""Whether one of several cells was shown to be better than a control, or none by more than a margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Superiority:
    """The verdict on cells that are compared with one control.

    Attributes:
        verdict: `better` if a cell is shown to be better, `not better` if none is better by the margin or more, which
            is shown for all of them; otherwise `open`.
        cell: the index of the cell that decides: the one that is shown to be better by most, or else the one of which
            most is still possible.
    """

    verdict: Literal["better", "not better", "open"]
    cell: int


def superiority(low: Sequence[float], high: Sequence[float], margin: float) -> Superiority:
    """Judge cells by the intervals of their differences to a control, which hold together.

    Args:
        low: the lower end of each cell's interval.
        high: the upper end of each.
        margin: the difference that matters, above 0.

    Returns:
        The verdict; its error is at most that of the intervals.

    Example:
        >>> superiority([-0.01, 0.02], [0.10, 0.20], margin=0.05)
        Superiority(verdict='better', cell=1)
        >>> superiority([-0.06, -0.02], [0.01, 0.04], margin=0.05).verdict
        'not better'
        >>> superiority([-0.06, -0.02], [0.01, 0.14], margin=0.05).verdict
        'open'
    """
    cells = range(len(low))
    surest = max(cells, key=low.__getitem__)
    if low[surest] > 0:
        return Superiority(verdict="better", cell=surest)
    highest = max(cells, key=high.__getitem__)
    return Superiority(verdict="not better" if high[highest] < margin else "open", cell=highest)
