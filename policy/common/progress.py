"""Progress bars that are also readable in a log file, and messages beside them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from tqdm import tqdm

from policy.common.torchrun import started_world

_OPEN: WeakSet[tqdm[Any]] = WeakSet()


def say(text: str) -> None:
    """Print a line on standard output; a progress bar on the terminal makes way for it."""
    tqdm.write(text)


def progress(items: Iterable[Any] | None = None, *, total: int, desc: str, unit: str, initial: int = 0) -> tqdm[Any]:
    """Create a progress bar on standard error, updated continuously on a terminal and every ten seconds elsewhere.

    Args:
        items: the items to iterate over; None for a bar that is updated by hand.
        total: total units of work.
        desc: name of the stage.
        unit: name of one unit of work.
        initial: units of work that are already done.

    Returns:
        The bar: an iterator over the items, and a context manager.
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm(
        items,
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        dynamic_ncols=True,
        mininterval=interval,
        leave=None,  # a bar below another one vanishes at its end
        disable=not started_world().first,
    )
    _OPEN.add(bar)
    return bar


def close_bars() -> None:
    """End all progress bars, so that an error that follows begins on a line of its own."""
    for bar in list(_OPEN):
        bar.close()
    _OPEN.clear()


def on_its_own_line(message: str) -> str:
    """Return a message that begins on a line of its own, also where a bar is in progress."""
    return f"\n{message}" if any(not bar.disable for bar in _OPEN) else message
