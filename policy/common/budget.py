"""Work that is repeated, but only as often as it costs little of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """Says when work is due again, so that it takes at most a share of the time.

    Args:
        share: of the time that passes, at most this much goes into the work.
        interval: the least number of seconds between the end of the work and its next beginning.
    """

    def __init__(self, share: float = 0.01, interval: float = 1.0) -> None:
        self._share, self._interval = share, interval
        self._due_at = 0.0

    def due(self) -> bool:
        """Whether the work may be done again."""
        return time.monotonic() >= self._due_at

    @contextmanager
    def spent(self) -> Iterator[None]:
        """Count the time of this block as spent on the work."""
        began = time.monotonic()
        try:
            yield
        finally:
            ended = time.monotonic()
            self._due_at = ended + max(self._interval, (ended - began) / self._share)
