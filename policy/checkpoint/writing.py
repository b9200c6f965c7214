"""Writing checkpoints."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from policy.checkpoint.files import (
    CONFIG,
    SCHEMA_VERSION,
    TRAINING_RECORD,
    TRAINING_WEIGHTS,
    WEIGHTS,
    replacing,
    write_json,
    write_tensors,
)
from policy.common.plugins import loaded_plugins
from policy.diffusion.sampler import Sampler
from policy.model.config import config_to_json
from policy.model.diffusion_policy import DiffusionPolicy
from policy.training.state import TrainState, optimizer_tensors, run_record


def save_checkpoint(
    folder: Path,
    state: TrainState,
    *,
    env: Mapping[str, Any] | None,
    execution_horizon: int,
    sampler: Sampler | None = None,
    training: Mapping[str, Any],
) -> None:
    """Write a checkpoint; the old one at `folder` is replaced only once the new one is complete and on disk.

    Args:
        folder: the checkpoint folder.
        state: the run's state.
        env: how to make the environment, or None.
        execution_horizon: recorded for rollouts.
        sampler: recorded for rollouts; None for the defaults.
        training: how it was trained, JSON data.

    Raises:
        SaveError: it cannot be written, for example because the disk is full.
    """
    with replacing(folder) as new:
        write_policy(
            new,
            state.ema,
            env=env,
            execution_horizon=execution_horizon,
            sampler=sampler,
            training={**training, "step": state.step},
        )
        write_json(new / TRAINING_RECORD, run_record(state))
        newest = {f"policy.{k}": v for k, v in state.policy.state_dict().items()}
        memory = {f"optimizer.{k}": v for k, v in optimizer_tensors(state).items()}
        teacher = {f"teacher.{k}": v for k, v in state.teacher.state_dict().items()} if state.teacher else {}
        write_tensors(new / TRAINING_WEIGHTS, newest | memory | teacher)


def write_policy(
    folder: Path,
    policy: DiffusionPolicy,
    *,
    env: Mapping[str, Any] | None,
    execution_horizon: int,
    sampler: Sampler | None = None,
    training: Mapping[str, Any],
    plugins: Sequence[str] = (),
) -> None:
    """Write the files that acting needs; `seal` completes the folder.

    Args:
        folder: an existing folder.
        policy: the policy to write.
        env: how to make the environment, or None.
        execution_horizon: recorded for rollouts.
        sampler: recorded for rollouts; None for the defaults.
        training: how it was trained, JSON data.
        plugins: plugins that were loaded when it was trained, besides those of this process.
    """
    needed = list(dict.fromkeys([*plugins, *loaded_plugins()]))
    config = {
        "schema_version": SCHEMA_VERSION,
        "policy": config_to_json(policy.config),
        "env": dict(env) if env else None,
        "execution_horizon": execution_horizon,
        "sampler": sampler.given if sampler else {},
        "training": dict(training),
        # Stored for error messages only: loading a checkpoint does not import them.
        **({"plugins": needed} if needed else {}),
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("ddim-policy", "numpy")},
            "torch": str(torch.__version__),  # with its build (such as +cpu), which the package's own version may lack
        },
    }
    write_json(folder / CONFIG, config)
    write_tensors(folder / WEIGHTS, policy.state_dict())
