"""Experiment tracking: the only module that imports wandb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable


class Run(Protocol):
    """One tracked run."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record metrics of a training step."""

    def log_table(
        self, name: str, rows: list[dict[str, Any]], image: Path | None = None, videos: Sequence[Path] = ()
    ) -> None:
        """Record a table, a picture of it, and videos."""

    def finish(self) -> str:
        """Close the run; says where it is, or nothing."""


@runtime_checkable
class StartRun(Protocol):
    """Opens a run once its folder and configuration are known: `WandbTracker` or `NoTracker`, settings filled in."""

    def __call__(self, *, folder: Path, config: Mapping[str, Any]) -> Run:
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


class WandbTracker:
    """A Weights & Biases run, offline unless asked otherwise: no account, no network.

    Args:
        folder: the run's files go to `folder/wandb`.
        config: what the run was made with.
        project: W&B project.
        mode: `offline` or `online`.
    """

    def __init__(
        self,
        *,
        folder: Path,
        config: Mapping[str, Any],
        project: str = "ddim-policy",
        mode: Literal["offline", "online"] = "offline",
    ) -> None:
        import wandb  # 1.6 s: only runs that are tracked pay for it

        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            dir=folder,
            mode=mode,
            config=dict(config),
            settings=wandb.Settings(silent=True),
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record metrics of a training step."""
        self._run.log(metrics, step=step)

    def log_table(
        self, name: str, rows: list[dict[str, Any]], image: Path | None = None, videos: Sequence[Path] = ()
    ) -> None:
        """Record rows with equal keys as a table, a picture of it, and mp4 videos."""
        table = self._wandb.Table(columns=[*rows[0]], data=[[*row.values()] for row in rows])
        media: dict[str, Any] = {f"{name}_plot": self._wandb.Image(str(image))} if image else {}
        media |= {f"{name}_video/{file.stem}": self._wandb.Video(str(file), format="mp4") for file in videos}
        self._run.log({name: table, **media})

    def finish(self) -> str:
        """Close the run; gives its folder."""
        folder = str(Path(self._run.dir).parent)
        self._run.finish()
        return folder
