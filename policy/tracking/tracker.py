"""What a tracker is, and the one that records nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


class MetricsLog(Protocol):
    """Where the metrics of training steps go."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record metrics of a training step."""


class TrackedRun(MetricsLog, Protocol):
    """One tracked run."""

    def log_table(
        self, name: str, rows: list[dict[str, Any]], image: Path | None = None, videos: Sequence[Path] = ()
    ) -> None:
        """Record a table, a picture of it, and videos."""

    def finish(self) -> str:
        """Close the run; says where it is, or nothing."""


@runtime_checkable
class OpenRun(Protocol):
    """Opens a run once its folder and configuration are known: `WandbTracker` or `NoTracker`, settings filled in."""

    def __call__(self, *, folder: Path, config: Mapping[str, Any]) -> TrackedRun:
        """Open the run."""
        ...


class NoTracker:
    """Records nothing.

    Args:
        folder: not used.
        config: not used.
    """

    def __init__(self, *, folder: Path | None = None, config: Mapping[str, Any] | None = None) -> None:
        pass

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Does nothing."""

    def log_table(
        self, name: str, rows: list[dict[str, Any]], image: Path | None = None, videos: Sequence[Path] = ()
    ) -> None:
        """Does nothing."""

    def finish(self) -> str:
        """Has nothing to say."""
        return ""
