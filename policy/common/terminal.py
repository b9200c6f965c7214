"""A terminal obeys control characters; texts from files may hold some, and are printed with their codes instead."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

# Control characters, and those that turn the direction of writing or end a line in their own way; tab and line feed are
# kept.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# The same without what progress bars move the cursor with.
ODD = re.compile(rf"(?!\x1b\[A|\r){CONTROL.pattern}")

# How libraries colour their messages.
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def uncoloured(text: str) -> str:
    """Leave out the colours of a text for a terminal."""
    return COLOUR.sub("", text)


def printable(text: str) -> str:
    r"""Write control characters as Python does.

    >>> print(printable("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return CONTROL.sub(_code, text)


def _code(match: re.Match[str]) -> str:
    return ascii(match[0])[1:-1]


class _Printable:
    """A text stream to which characters of a pattern are written as their codes, and texts without their colours."""

    def __init__(self, stream: TextIO, pattern: re.Pattern[str]) -> None:
        self._stream, self._pattern = stream, pattern

    def write(self, text: str) -> int:
        return self._stream.write(self._pattern.sub(_code, uncoloured(text)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """In this block, what is printed does not control the terminal, except by progress bars on standard error."""
    out, err = _Printable(sys.stdout, CONTROL), _Printable(sys.stderr, ODD)
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
        yield
