"""Errors that a command reports in one sentence although no setting is wrong, and the reason that another one gives."""

from __future__ import annotations


class SaveError(OSError):
    """A file could not be written; what was written before it is intact."""


class ParityError(RuntimeError):
    """An imported policy computes something else than the project that it comes from."""


class WorkerError(RuntimeError):
    """Episodes failed repeatedly."""


class PeerError(RuntimeError):
    """Another process of a training on torchrun ended before its time."""


def reason_of(error: BaseException) -> str:
    """The first line of an error's text; its type before it where that is a mere word, as of a `KeyError`, or nothing.

    >>> reason_of(KeyError("action"))
    "KeyError: 'action'"
    >>> reason_of(TimeoutError())
    'TimeoutError'
    >>> reason_of(OSError("no space left"))
    'no space left'
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if " " in lines[0] else f"{type(error).__name__}: {lines[0]}"
