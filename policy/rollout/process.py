"""A rollout process: it makes environments, and plays the episodes that its parent hands out."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType

import torch

from policy.common.descriptors import Descriptor
from policy.common.machine import leave_children_alone
from policy.common.plugins import load_plugins
from policy.model.diffusion_policy import DiffusionPolicy
from policy.rollout import handover
from policy.rollout.cells import Task, controllers_of
from policy.rollout.central import plans_from
from policy.rollout.episodes import MakeEnv, run_episodes
from policy.rollout.handover import Parcel
from policy.rollout.probe import unrepeatable
from policy.rollout.watch import Clock, WatchedEnv


@dataclass(frozen=True)
class Fault:
    """The reason why a process cannot continue.

    Attributes:
        reason: in words.
        refused: whether another attempt would end in the same way, because something is wrong with the input.
    """

    reason: str
    refused: bool = False


def serve(
    standard_error: Descriptor,
    plugins: Sequence[str],
    parcel: Parcel,
    make_env: MakeEnv,
    num_envs: int,
    connection: Connection,
    clock: Clock,
) -> None:
    """Run in a process: make environments, and run what the parent sends until it asks for an end by SIGTERM.

    Args:
        standard_error: the parent's, see `standard_error_into`.
        plugins: modules to import.
        parcel: the policies and a folder, see `handover.parcel`.
        make_env: makes an environment.
        num_envs: number of environments.
        connection: to the parent.
        clock: see `WatchedEnv`; the parent reads it.
    """
    with suppress(PermissionError):  # it is a leader already
        os.setpgid(0, 0)
    # As the parent's daemon it would not be allowed children, which some simulators have.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    leave_children_alone()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, args=(parcel.folder,), daemon=True).start()
    torch.set_num_threads(1)  # processes with several spinning threads each would slow each other down

    envs: list[WatchedEnv] = []
    with suppress(KeyboardInterrupt, EOFError, BrokenPipeError):
        try:
            signal.signal(signal.SIGTERM, _leave)
            load_plugins(plugins)
            policies = handover.unpacked(parcel)
            real = standard_error.take()
            os.dup2(real, 2)
            os.close(real)
            for _ in range(num_envs):
                envs.append(WatchedEnv(make_env, clock))
            connection.send("ready")
            _obey(connection, policies, envs)
        except ValueError as error:
            connection.send(Fault(str(error), refused=True))
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:
            connection.send(Fault(_reason(error)))
        finally:
            signal.signal(signal.SIGTERM, _stay)
            for env in envs:
                env.close()


def _obey(connection: Connection, policies: Sequence[DiffusionPolicy], envs: Sequence[WatchedEnv]) -> None:
    """Run what the parent sends: a seed to probe, or cells whose tasks are asked for one by one."""

    def next_task() -> Task | None:
        connection.send("next")
        task: Task | None = connection.recv()
        return task

    while True:
        match connection.recv():
            case int() as seed:
                connection.send(unrepeatable(envs[0], seed))
            case (cells, programs):
                if programs is None:  # the parent samples
                    plans_of = partial(plans_from, connection)
                    controllers = controllers_of(policies, cells, envs[0].action_space, plans_of=plans_of)
                else:
                    controllers = controllers_of(policies, cells, envs[0].action_space, programs)
                for result in run_episodes(controllers, envs, next_task):
                    connection.send(result)


def _leave(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stay(number: int, frame: FrameType | None) -> None:
    """Do nothing. Where SIG_IGN is set at the moment a signal comes, Python prints a traceback."""


def _reason(error: Exception) -> str:
    """An error in one line, with the line of code that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}, line {frame.lineno})"


def _end_with_parent(folder: Path) -> None:
    """End this process and its group when its parent ends, and remove its folder: a parent that was killed cannot."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)
