"""Errors that a command reports in one sentence although no setting is wrong."""

from __future__ import annotations


class SaveError(OSError):
    """A file could not be written; what was written before it is intact."""


class ParityError(RuntimeError):
    """An imported policy computes something else than the project that it comes from."""


class WorkerError(RuntimeError):
    """Episodes failed repeatedly."""


class PeerError(RuntimeError):
    """Another process of a training on torchrun ended before its time."""
