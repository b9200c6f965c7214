"""Checkpoints: a folder of safetensors and JSON. Loading one never executes anything it holds.

checkpoint/
  config.json           what the policy is made of, its environment, how it was trained
  policy.safetensors    the averaged weights and the normalisers' statistics: what acts
  training.safetensors  the newest weights and the optimiser's memory: what a resumed run needs besides
  training.json         step and history
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from policy.diffusion_policy import DiffusionPolicy, config_from_json, config_to_json
from policy.training import TrainState, optimizer_tensors, restore_optimizer

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint folder gives back.

    Attributes:
        policy: ready to act: averaged weights, evaluation mode.
        env: how to make its environment (`{"name": ..., **settings}`), or None.
        execution_horizon: what it was evaluated with while training.
        training: how it was trained: JSON data.
        path: the folder.
        digest: of the weights, wherever they lie.
    """

    policy: DiffusionPolicy
    env: dict[str, Any] | None
    execution_horizon: int
    training: dict[str, Any]
    path: Path
    digest: str


def save_checkpoint(
    folder: Path,
    state: TrainState,
    *,
    env: Mapping[str, Any] | None,
    execution_horizon: int,
    training: Mapping[str, Any],
) -> None:
    """Write a checkpoint; what was at `folder` before is replaced only once the new one is whole and on disk.

    Args:
        folder: the checkpoint folder.
        state: of the run.
        env: how to make the environment, or None.
        execution_horizon: recorded for rollouts.
        training: how it was trained, JSON data.
    """
    new, old = _beside(folder, "new"), _beside(folder, "old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    config = {
        "schema_version": SCHEMA_VERSION,
        "policy": config_to_json(state.policy.config),
        "env": dict(env) if env else None,
        "execution_horizon": execution_horizon,
        "training": {**training, "step": state.step},
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("ddim-policy", "torch", "numpy")},
        },
    }
    _write_json(new / "config.json", config)
    _write_json(new / "training.json", {"step": state.step, "history": state.history})
    save_file(_contiguous(state.ema.state_dict()), new / "policy.safetensors")
    training_tensors = {f"policy.{k}": v for k, v in state.policy.state_dict().items()}
    training_tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(state).items()}
    save_file(_contiguous(training_tensors), new / "training.safetensors")
    for file in new.iterdir():
        shutil.copymode(new / "config.json", file)  # safetensors makes its files readable to their owner only
        _sync(file)
    # A folder cannot be replaced in one step. Between these two renames only `old` is there: `_whole` finds it.
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path | str, device: str = "cpu") -> Checkpoint:
    """Load a policy that is ready to act.

    Args:
        folder: the checkpoint folder.
        device: where to put it.

    Returns:
        The policy and what was recorded with it.

    Raises:
        ValueError: no checkpoint there, a damaged one, or one written by a newer version.
    """
    path = _whole(Path(folder).expanduser())
    config = _read_config(path)
    try:
        policy = DiffusionPolicy(config_from_json(config["policy"]))
        _load_strictly(policy, _read_tensors(path / "policy.safetensors"), path)
        return Checkpoint(
            policy=policy.to(device).eval().requires_grad_(False),
            env=config["env"],
            execution_horizon=int(config["execution_horizon"]),
            training=config["training"],
            path=path,
            digest=hashlib.sha256((path / "policy.safetensors").read_bytes()).hexdigest()[:16],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}/config.json is damaged (at {error}): use another checkpoint") from error


def check_env(env: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Refuse an environment that a file chose and that would import a module: code is the user's to choose.

    Args:
        env: as the file states it.
        source: the file, for the message.

    Returns:
        `env` as a dictionary.

    Raises:
        ValueError: its id is of the form "module:Id".
    """
    if ":" in str(env.get("id", "")):
        raise ValueError(
            f"{source} asks for the environment {env['id']}, which would import a module of its choice:"
            f" if you trust it, add env=gym env.id={env['id']}"
        )
    return dict(env)


def choose_env(checkpoint: Checkpoint, override: Mapping[str, Any] | None) -> dict[str, Any]:
    """The environment to act in: the checkpoint's own, with some settings changed, or another one.

    Args:
        checkpoint: names its environment.
        override: with a `name` it replaces the checkpoint's; without one it changes single settings.

    Returns:
        `{"name": ..., **settings}`.

    Raises:
        ValueError: the checkpoint names none, or one that only the user may choose.
    """
    if override and "name" in override:
        return dict(override)
    if checkpoint.env is None:
        raise ValueError(f"{checkpoint.path} names no environment: add env=...")
    return check_env({**checkpoint.env, **(override or {})}, checkpoint.path)


def resume_training(folder: Path, state: TrainState, training: Mapping[str, Any]) -> None:
    """Put a run back exactly where its checkpoint left it.

    Args:
        folder: the checkpoint folder.
        state: a fresh state of the same configuration, changed in place.
        training: how it is trained, as given to `save_checkpoint`; must be the same.

    Raises:
        ValueError: the checkpoint is missing, damaged, or of another configuration.
    """
    path = _whole(folder)
    was = _read_config(path)
    for part, now in (("policy", config_to_json(state.policy.config)), ("training", dict(training))):
        before = {key: value for key, value in was[part].items() if key != "step"}
        if changed := sorted(key for key, value in _as_json(now).items() if before.get(key) != value):
            raise ValueError(
                f"{path} was trained with other settings ({part}: {', '.join(changed)}): to go on, give the same"
                " settings; to start anew, choose another output_dir="
            )
    tensors = _read_tensors(path / "training.safetensors")
    record = _read_json(path / "training.json")
    _load_strictly(state.ema, _read_tensors(path / "policy.safetensors"), path)
    _load_strictly(state.policy, _under("policy.", tensors), path)
    try:
        restore_optimizer(state, _under("optimizer.", tensors))
        state.step = int(record["step"])
        state.history = list(record["history"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): use another checkpoint") from error


def is_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint, whole or half replaced, is at `folder`."""
    return folder.exists() or _beside(folder, "old").exists()


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def _whole(folder: Path) -> Path:
    # A run killed between the two renames of `save_checkpoint` leaves its last good checkpoint under this name.
    if not folder.exists() and _beside(folder, "old").exists():
        return _beside(folder, "old")
    if not (folder / "config.json").is_file():
        raise ValueError(f"no checkpoint at {folder}: set checkpoint= to the folder that scripts/train.py names")
    return folder


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _load_strictly(policy: DiffusionPolicy, tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        policy.load_state_dict(tensors)
    except RuntimeError as error:
        detail = str(error).replace("\n", " ")
        raise ValueError(f"the weights in {path} do not fit its config.json: {detail}") from error


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}): use another checkpoint") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}): use another checkpoint") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} is damaged (not a JSON object): use another checkpoint")
    return data


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path / "config.json")
    if config.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has checkpoint schema {config.get('schema_version')!r}; this version reads {SCHEMA_VERSION}:"
            " use the ddim-policy version that wrote it"
        )
    for key, kinds in (("policy", dict), ("training", dict), ("env", (dict, type(None)))):
        if key not in config or not isinstance(config[key], kinds):
            raise ValueError(f"{path}/config.json is damaged (at {key!r}): use another checkpoint")
    return config


def _as_json(data: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(data)))


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
