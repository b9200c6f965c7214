"""Failures that a command reports in one sentence, although no setting was wrong."""

from __future__ import annotations


class SaveError(OSError):
    """A checkpoint could not be written; those before it are whole."""


class WorkerError(RuntimeError):
    """Episodes failed again and again."""
