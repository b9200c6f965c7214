"""Long lists in a sentence."""

from __future__ import annotations

from collections.abc import Sequence


def first_of(names: Sequence[object], most: int) -> str:
    """The first names, and how many more there are.

    >>> first_of([3, 5, 8], 2), first_of([3, 5], 2)
    ('3, 5 and 1 more', '3, 5')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
