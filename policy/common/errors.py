"""Errors that a command reports in one sentence although no setting is wrong."""

from __future__ import annotations


class SaveError(OSError):
    """A checkpoint could not be written; earlier checkpoints are intact."""


class WorkerError(RuntimeError):
    """Episodes failed repeatedly."""
