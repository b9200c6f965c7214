"""A terminal obeys control characters; texts from files may hold some, and are printed with their codes instead."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

# Control characters, and those that turn the direction of writing. Kept: tab, line ends, and the one sequence that
# progress bars move the cursor with.
CONTROL = re.compile(r"(?!\x1b\[A)[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Write control characters as Python does.

    >>> print(printable("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


class _Printable:
    """A text stream to which only printable characters are written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """In this block, what is printed to standard output and standard error does not control the terminal."""
    out, err = (cast(TextIO, _Printable(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield
