"""Resuming a training run from its checkpoint, and what may differ from how it was stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from policy.checkpoint.files import (
    CONFIG,
    TRAINING_RECORD,
    TRAINING_WEIGHTS,
    WEIGHTS,
    Folder,
    open_folder,
    read_json,
    read_tensors,
    refusing,
)
from policy.checkpoint.reading import check_fit, policy_config
from policy.common.files import as_json
from policy.common.observations import is_image
from policy.model.defaults import with_defaults
from policy.model.diffusion_policy import DiffusionPolicy
from policy.training.state import TrainState, restore_optimizer, restore_record

# Training settings added after the first schema, with the values in effect for checkpoints without them.
SETTINGS_OF_BEFORE = {
    "init_normalizers": "keep",
    "keep_last": 3,
    "precision": "float32",
    "rectify_steps": 0,
    "rectify_ddim_steps": 8,
    "timesteps_per_chunk": 1,
    "corrective_noise": 0.0,
    "exchange": 0.0,
    "action_weights": "equal",
}
# Training settings, and facts for readers, that change no weight, so that a run may go on with others.
MAY_CHANGE = {
    *("execution_horizon", "keep_last", "log_every", "rate_hz", "rollout_every", "sampler", "save_every", "tasks"),
    "val_every",
}

# The name under which a checkpoint notes a checksum of the values in its demonstrations.
CHECKSUM = "dataset.checksum"


def resume_training(
    folder: Path, state: TrainState, training: Mapping[str, Any], rollouts: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Restore a run exactly as its checkpoint stored it.

    Args:
        folder: the checkpoint folder.
        state: a fresh state of the same configuration, changed in place.
        training: how it is trained, as given to `save_checkpoint`; must be equal to what was stored. Settings that are
            newer than the checkpoint must have the values that were in effect without them. Those in `MAY_CHANGE`
            may differ, the `dataset` may have moved unless it holds pictures, and `steps` may grow, unless
            rectification has begun.
        rollouts: the settings of its rollouts, `execution_horizon` and those of the sampler that differ from their
            defaults as `sampler`; all may differ.

    Returns:
        The settings that differ, with the values that were stored.

    Raises:
        ValueError: the checkpoint is missing, damaged, or of another configuration.
    """
    opened = open_folder(folder)
    path, changes = opened.path, _changed(opened, state, training, rollouts)
    files = {name: opened.verify(name)[0] for name in (WEIGHTS, TRAINING_WEIGHTS, TRAINING_RECORD)}
    averaged, tensors = read_tensors(files[WEIGHTS]), read_tensors(files[TRAINING_WEIGHTS])
    record = read_json(files[TRAINING_RECORD])
    with refusing(path):
        for policy, found in ((state.ema, averaged), (state.policy, _under("policy.", tensors))):
            check_fit(policy.config, found, path)
            policy.load_state_dict(found)
        if teacher := _under("teacher.", tensors):
            # Checkpoints of before a teacher could be another policy do not store its configuration.
            config = policy_config(opened, record["teacher"]) if "teacher" in record else state.policy.config
            check_fit(config, teacher, path)
            state.teacher = DiffusionPolicy(config).to(state.policy.device).eval().requires_grad_(False)
            state.teacher.load_state_dict(teacher)
        try:
            restore_optimizer(state, _under("optimizer.", tensors))
            restore_record(state, record)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): use another checkpoint") from error
    return changes


def _changed(
    opened: Folder, state: TrainState, training: Mapping[str, Any], rollouts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings that differ from those that a run was stored with, and refuse those that may not."""
    was, path = opened.config, opened.path
    changes: dict[str, Any] = {}
    with refusing(path / CONFIG):
        # Policy settings that are newer than the checkpoint had the values that are now their defaults.
        before = {
            "policy": with_defaults(policy_config(opened, was["policy"])),
            "training": {**SETTINGS_OF_BEFORE, **was["training"]},
            "rollouts": {"execution_horizon": was["execution_horizon"], "sampler": was.get("sampler", {})},
        }
        now = {"policy": with_defaults(state.policy.config), "training": dict(training), "rollouts": rollouts}
        refused: dict[str, str] = {}
        for part in before:
            then, after = as_json(before[part]), as_json(now[part])
            differ = {key: then[key] for key in sorted(then.keys() & after.keys()) if then[key] != after[key]}
            changes |= differ
            may_not = [key for key in differ if not _may_change(key, then, after, state)]
            if may_not:
                refused[part] = ", ".join(describe_before(key, then[key], after[key]) for key in may_not)
        if refused:
            were = "; ".join(f"{part}: {settings}" for part, settings in refused.items())
            keeps = "" if "policy" in refused else f", with init={path} if it should begin with these weights"
            raise ValueError(
                f"{path} was trained with other settings ({were}): to go on, give the same settings; to start anew,"
                f" choose another output_dir={keeps}"
            )
    return changes


def describe_before(name: str, then: Any, now: Any) -> str:
    """Say what a setting was; of one with settings of its own, only those that differ.

    Args:
        name: of the setting.
        then: its value then, JSON data.
        now: its value now.

    Example:
        >>> describe_before("encoder", {"name": "state", "skip": False}, {"name": "state", "noise": 0.1})
        'encoder.noise was null, encoder.skip was false'
    """
    if name == CHECKSUM:
        return "the demonstrations held other values"
    if isinstance(then, dict) and isinstance(now, dict):
        inner = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
        return ", ".join(describe_before(f"{name}.{key}", then.get(key), now.get(key)) for key in inner)
    return f"{name} was {json.dumps(then)}"


def _may_change(key: str, then: Mapping[str, Any], now: Mapping[str, Any], state: TrainState) -> bool:
    """Return whether a run may go on with another value of a setting than the one that it was stored with."""
    if key == "steps":  # once a run rectifies, more steps of the phase before would start that phase again
        return bool(now["steps"] > then["steps"] and not (then.get("rectify_steps") and then["step"] >= then["steps"]))
    if key == "dataset":  # it may have moved, where the checksum tells that it is the same one; it leaves pictures out
        pictures = any(map(is_image, state.policy.config.observation_shapes.values()))
        return CHECKSUM in then and then[CHECKSUM] == now[CHECKSUM] and not pictures
    return key in MAY_CHANGE


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
