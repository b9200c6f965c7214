"""Work that is repeated, but only as often as it costs little of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

# Of the time that passes, at most this share goes into the work.
SHARE = 0.01
# The least number of seconds between the end of the work and its next beginning.
INTERVAL = 1.0


class Throttle:
    """Says when work is due again, so that it takes at most a share of the time."""

    def __init__(self) -> None:
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
            self._due_at = ended + max(INTERVAL, (ended - began) / SHARE)
