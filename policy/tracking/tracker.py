"""The interfaces of a tracker, and a tracker that records nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


class MetricsLog(Protocol):
    """Receives the metrics of training steps."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a training step."""


class SentToAll:
    """Sends the metrics of training steps to several places.

    Args:
        *logs: the places.
    """

    def __init__(self, *logs: MetricsLog) -> None:
        self._logs = logs

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a training step in each place."""
        for log in self._logs:
            log.log(metrics, step)


class TrackedRun(MetricsLog, Protocol):
    """One tracked run."""

    def log_table(
        self, name: str, rows: list[dict[str, Any]], image: Path | None = None, videos: Sequence[Path] = ()
    ) -> None:
        """Record rows with equal keys as a table, a picture of it, and mp4 videos."""

    def finish(self) -> str:
        """Close the run and return its folder, or an empty string if there is none."""


@runtime_checkable
class OpenRun(Protocol):
    """Opens a run once its folder and configuration are known: a tracker class with its settings filled in."""

    def __call__(self, *, folder: Path, config: Mapping[str, Any]) -> TrackedRun:
        """Open the run."""
        ...


class NoTracker:
    """A tracker that records nothing.

    Args:
        folder: not used.
        config: not used.
    """

    def __init__(self, *, folder: Path | None = None, config: Mapping[str, Any] | None = None) -> None:
        pass

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Do nothing."""

    def log_table(
        self, name: str, rows: list[dict[str, Any]], image: Path | None = None, videos: Sequence[Path] = ()
    ) -> None:
        """Do nothing."""

    def finish(self) -> str:
        """Return an empty string."""
        return ""
