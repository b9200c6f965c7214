"""Experiment tracking: the only module that imports wandb, and the program that talks to it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, runtime_checkable

# Entries that may wait for W&B: hours of training, a few megabytes.
WAITING = 10_000
KEPT = "the checkpoint's history keeps all metrics, episodes.json and sweep.json all results"


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

    W&B lives in a process of its own that is told what to record and never waited for: whatever befalls it (no login,
    no network, a crash, a call that never returns) costs the caller a warning. Only `finish` waits, within bounds.

    Args:
        folder: the run's files go to `folder/wandb`.
        config: what the run was made with.
        project: W&B project.
        mode: `offline`, or `online`, which records offline where there is no login or no answer.
        patience: seconds that `finish` waits at most; half of them for the server's answer to a new online run.

    Raises:
        ValueError: `patience` is not a positive number of seconds.
    """

    def __init__(
        self,
        *,
        folder: Path,
        config: Mapping[str, Any],
        project: str = "ddim-policy",
        mode: Literal["offline", "online"] = "offline",
        patience: float = 30.0,
    ) -> None:
        if not 0 < patience <= threading.TIMEOUT_MAX:
            raise ValueError(f"tracker.patience must be above 0 seconds; got {patience}")
        folder.mkdir(parents=True, exist_ok=True)
        self._patience = patience
        self._lost = 0
        self._waiting: queue.Queue[str | None] = queue.Queue(WAITING)
        # No pipe: what W&B leaves behind could hold one open. `finish` closes it.
        self._answer = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            # Without -P, the modules beside this file would hide some of the standard library.
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=self._answer,
            text=True,
            start_new_session=True,  # Ctrl-C is the caller's to handle
        )
        threading.Thread(target=self._write, name="tracker", daemon=True).start()
        self._tell("open", folder=folder, config=config, project=project, mode=mode, patience=patience / 2)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record metrics of a training step."""
        self._tell("log", metrics=metrics, step=step)

    def log_table(
        self, name: str, rows: list[dict[str, Any]], image: Path | None = None, videos: Sequence[Path] = ()
    ) -> None:
        """Record rows with equal keys as a table, a picture of it, and mp4 videos."""
        self._tell("log_table", name=name, rows=rows, image=image, videos=videos)

    def finish(self) -> str:
        """Close the run; gives its folder, or nothing if there is none."""
        fault = self._end()
        with self._answer:
            self._answer.seek(0)
            folder = self._answer.readline().strip()
        if fault:
            upload = f"`wandb sync {folder}` uploads what it has; " if folder else ""
            warnings.warn(f"W&B {fault}: {upload}{KEPT}", stacklevel=2)
        return folder

    def _end(self) -> str:
        """Wait for the process, within bounds; gives what went wrong and was not said yet."""
        deadline = time.monotonic() + self._patience
        try:
            for last in (_message("finish"), None):
                self._waiting.put(last, timeout=max(0.0, deadline - time.monotonic()))
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
        except (queue.Full, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
            return f"was ended, unfinished after {self._patience:g} s (tracker.patience)"
        if code < 0:
            return f"was killed (signal {-code})"
        return f"was too slow and lacks {self._lost} entries" if self._lost and code == 0 else ""

    def _tell(self, call: str, **arguments: Any) -> None:
        try:
            self._waiting.put_nowait(_message(call, **arguments))
        except queue.Full:
            self._lost += 1

    def _write(self) -> None:
        """Wait for the process in the caller's stead: what a thread does."""
        assert self._process.stdin is not None
        while (line := self._waiting.get()) is not None:
            with suppress(OSError):  # a process that has ended said why
                print(line, file=self._process.stdin, flush=True)
        with suppress(OSError):
            self._process.stdin.close()


def _message(call: str, **arguments: Any) -> str:
    return json.dumps({"call": call, "arguments": arguments}, default=_as_json)


def _as_json(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


# From here on: what runs in W&B's process.


def _record(messages: Iterator[dict[str, Any]], answer: TextIO, warn: Callable[[str], None]) -> int:
    """Record what the caller tells, until it has no more to say.

    Args:
        messages: a call's name and arguments each; the first opens the run.
        answer: receives one line, the run's folder.
        warn: tells the user.

    Returns:
        The exit code: 1 where recording failed and the reason has been printed.
    """
    recorded, exit_code = "nothing", 1  # the run of a caller that falls silent before it finishes has failed
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
    """A wandb run; offline where an online one cannot be had."""
    import wandb

    # Charts of the machine show the caller's process, not this one; its output is the caller's as well.
    settings = wandb.Settings(silent=True, console="off", init_timeout=patience, x_stats_pid=os.getppid())

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
    # W&B's own steps never go back: it would drop what a resumed run logs again.
    run.define_metric("*", step_metric="step")
    return run


def _media(*, name: str, rows: list[dict[str, Any]], image: str | None, videos: list[str]) -> dict[str, Any]:
    import wandb

    media: dict[str, Any] = {name: wandb.Table(columns=[*rows[0]], data=[[*row.values()] for row in rows])}
    if image:
        media[f"{name}_plot"] = wandb.Image(image)
    return media | {f"{name}_video/{Path(file).stem}": wandb.Video(file, format="mp4") for file in videos}


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _main() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the caller's to handle, whose end is this process's
    # W&B prints, and starts a service: neither may get hold of the caller's pipes and terminal.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its telemetry would wait for a server that never answers
    messages, answer, terminal = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)

    def warn(message: str) -> None:
        print(f"warning: {message}", file=terminal, flush=True)

    return _record(map(json.loads, messages), answer, warn)


if __name__ == "__main__":
    sys.exit(_main())
