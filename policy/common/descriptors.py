"""Open files that another process receives."""

from __future__ import annotations

import os
from multiprocessing.reduction import DupFd
from typing import Any


class Descriptor:
    """An open file, for another process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def take(self) -> int:
        """The file's number in the process that received it; the caller closes it."""
        return os.dup(self.number)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Received, (DupFd(self.number),)


class _Received:
    """A `Descriptor` as it arrives."""

    def __init__(self, copy: Any) -> None:
        self._copy = copy

    def take(self) -> int:
        """See `Descriptor.take`."""
        return int(self._copy.detach())
