"""Progress bars that also read well in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(items: Iterable[Any] | None = None, *, total: int, desc: str, unit: str, initial: int = 0) -> tqdm[Any]:
    """A progress bar on standard error: lively on a terminal, a line every ten seconds elsewhere.

    Args:
        items: what to iterate over; None for a bar that is updated by hand.
        total: units of work in all.
        desc: name of the stage.
        unit: what is counted.
        initial: done already.

    Returns:
        The bar: an iterator over the items, and a context manager.
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(items, total=total, initial=initial, desc=desc, unit=unit, dynamic_ncols=True, mininterval=interval)
