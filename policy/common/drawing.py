"""Matplotlib as this project uses it: no file in the current folder, and nothing in a text, changes how it draws."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in this block, with Matplotlib's own settings; `$` in a name is a dollar and begins no formula."""
    # It says twice that it takes a temporary folder if its cache folder cannot be written to.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    # When it is first imported, Matplotlib reads a file `matplotlibrc` of the current folder before any other.
    with chdir(Path(__file__).parent):
        import matplotlib.style
    with matplotlib.style.context("default", after_reset=True):
        matplotlib.rcParams["text.parse_math"] = False
        yield
