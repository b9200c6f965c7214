"""Progress bars that are also readable in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


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
    return tqdm(
        items,
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        dynamic_ncols=True,
        mininterval=interval,
        leave=None,  # a bar below another one vanishes at its end
    )
