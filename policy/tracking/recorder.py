"""A program that records to Weights & Biases in its own process. It is the only module that imports wandb.

`WandbTracker` starts it as a script and sends it the calls to record, one JSON object per line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

KEPT = "the checkpoint's history keeps all metrics, episodes.json and sweep.json all results"


def _record(messages: Iterator[dict[str, Any]], answer: TextIO, warn: Callable[[str], None]) -> int:
    """Record the caller's messages until they end.

    Args:
        messages: the name and the arguments of one call each; the first call opens the run.
        answer: receives one line, the run's folder.
        warn: prints a warning for the user.

    Returns:
        The exit code: 0, or 1 if recording failed and the reason has been printed.
    """
    recorded, exit_code = "nothing", 1  # the run has failed if the messages end without `finish`
    try:
        opening = next(messages)
        run = _open(**opening["arguments"], warn=warn)
        print(Path(run.dir).parent, file=answer, flush=True)
        for message in messages:
            match message:
                case {"call": "log", "arguments": {"metrics": metrics, "step": step}}:
                    run.log({"step": step, **metrics})
                    recorded = f"steps up to {step}"
                case {"call": "log_table", "arguments": table}:
                    run.log(_media(**table))
                case {"call": "finish"}:
                    exit_code = 0
        run.finish(exit_code)
    except Exception as error:
        warn(f"W&B failed and has recorded {recorded} ({_line(error)}): {KEPT}")
        return 1
    return 0


def _open(
    *, folder: str, config: dict[str, Any], project: str, mode: str, patience: float, warn: Callable[[str], None]
) -> Any:
    """Open a wandb run; if an online run cannot be opened, open an offline one."""
    _settle_folders(Path(folder))
    import wandb

    # The system charts show the caller's process, not this one, and console output is left to the caller.
    # Git is not asked, because it runs programs that the settings of a repository name.
    settings = wandb.Settings(
        silent=True, console="off", init_timeout=patience, x_stats_pid=os.getppid(), disable_git=True
    )

    def start(mode: Any) -> Any:
        return wandb.init(project=project, dir=folder, config=config, mode=mode, settings=settings)

    try:
        run = start(mode)
    except Exception as error:
        if mode == "offline":
            raise
        run = start("offline")
        warn(
            f"W&B cannot be reached ({_line(error)}) and records offline: `wandb login`, then"
            f" `wandb sync {Path(run.dir).parent}` upload it later; {KEPT}"
        )
    # W&B's own step counter never goes back: W&B would drop the steps that a resumed run logs again.
    run.define_metric("*", step_metric="step")
    return run


def _settle_folders(folder: Path) -> None:
    """Let W&B keep its copies beside the run where the user's own folders for them cannot be written to."""
    for variable, xdg, default in (
        ("WANDB_DATA_DIR", "XDG_DATA_HOME", "~/.local/share"),
        ("WANDB_CACHE_DIR", "XDG_CACHE_HOME", "~/.cache"),
    ):
        place = Path(os.path.expanduser(os.environ.get(xdg) or default)) / "wandb"
        there = next(path for path in (place.absolute(), *place.absolute().parents) if os.path.exists(path))
        if not os.access(there, os.W_OK | os.X_OK):
            os.environ.setdefault(variable, str(folder))


def _media(*, name: str, rows: list[dict[str, Any]], image: str | None, videos: list[str]) -> dict[str, Any]:
    import wandb

    media: dict[str, Any] = {name: wandb.Table(columns=[*rows[0]], data=[[*row.values()] for row in rows])}
    if image:
        media[f"{name}_plot"] = wandb.Image(image)
    return media | {f"{name}_video/{Path(file).stem}": wandb.Video(file, format="mp4") for file in videos}


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _main() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the caller handles it, and this process ends with the caller
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its telemetry would wait for a server that never answers
    # W&B prints output and starts a service process: neither may hold the caller's pipes or terminal.
    messages, answer, terminal = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)

    def warn(message: str) -> None:
        print(f"warning: {message}", file=terminal, flush=True)

    return _record(map(json.loads, messages), answer, warn)


if __name__ == "__main__":
    sys.exit(_main())
