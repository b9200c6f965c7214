"""Stop long work between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether the user asked for an end, by Ctrl-C or SIGTERM."""

    def __init__(self) -> None:
        self._asked = False
        self._at_once = False

    def __call__(self) -> bool:
        """Whether to stop; work in steps polls this."""
        return self._asked

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that may be cut off anywhere: inside, a request raises KeyboardInterrupt."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Note the request; a signal handler."""
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._at_once:
            raise KeyboardInterrupt


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C (or SIGTERM) into a stop request that the work polls; a second Ctrl-C interrupts at once.

    Yields:
        The request.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
