"""Experiment tracking with Weights & Biases that never blocks its caller."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from policy.tracking import recorder

# Largest number of entries that wait for W&B: hours of training, a few megabytes.
WAITING = 10_000


class WandbTracker:
    """A Weights & Biases run. It is offline by default and then needs neither an account nor a network.

    W&B runs in its own process, which receives the calls to record and is never waited for. Any failure there (no
    login, no network, a crash, a call that never returns) costs the caller only a warning. Only `finish` waits, for a
    limited time.

    Args:
        folder: folder of the run; W&B's files go to `folder/wandb`.
        config: configuration to record with the run.
        project: W&B project.
        mode: `offline`, or `online`, which records offline if there is no login or the server does not answer.
        patience: longest time that `finish` waits, in seconds; a new online run waits half of it for the server.

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
        # A file and not a pipe: processes that W&B leaves behind could hold a pipe open. `finish` closes the file.
        self._answer = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            # Without -P, modules beside that file could hide modules of the standard library.
            [sys.executable, "-P", recorder.__file__],
            stdin=subprocess.PIPE,
            stdout=self._answer,
            text=True,
            cwd=Path(recorder.__file__).parent,  # W&B reads settings, such as its server, in its current folder
            start_new_session=True,  # Ctrl-C reaches only the caller, which handles it
        )
        threading.Thread(target=self._write, name="tracker", daemon=True).start()
        self._tell("open", folder=folder.absolute(), config=config, project=project, mode=mode, patience=patience / 2)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a training step."""
        self._tell("log", metrics=metrics, step=step)

    def log_table(
        self, name: str, rows: list[dict[str, Any]], image: Path | None = None, videos: Sequence[Path] = ()
    ) -> None:
        """Record rows with equal keys as a table, a picture of it, and mp4 videos."""
        picture, clips = image and image.absolute(), [video.absolute() for video in videos]
        self._tell("log_table", name=name, rows=rows, image=picture, videos=clips)

    def finish(self) -> str:
        """Close the run and return its folder, or an empty string if there is none."""
        fault = self._end()
        with self._answer:
            self._answer.seek(0)
            folder = self._answer.readline().strip()
        if fault:
            upload = f"`wandb sync {folder}` uploads what it has; " if folder else ""
            warnings.warn(f"W&B {fault}: {upload}{recorder.KEPT}", stacklevel=2)
        return folder

    def _end(self) -> str:
        """Wait for the process for a limited time, and return a fault that has not been reported yet, or ''."""
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
        """Write the waiting entries to the process, in a thread, so that the caller does not wait for it."""
        assert self._process.stdin is not None
        while (line := self._waiting.get()) is not None:
            with suppress(OSError):  # a process that has ended has printed the reason
                print(line, file=self._process.stdin, flush=True)
        with suppress(OSError):
            self._process.stdin.close()


def _message(call: str, **arguments: Any) -> str:
    return json.dumps({"call": call, "arguments": arguments}, default=_as_json)


def _as_json(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
