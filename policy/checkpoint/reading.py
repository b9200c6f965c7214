"""Loading checkpoints: all content is checked before memory of a size that a file asks for is allocated."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

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
from policy.common.arguments import at_home, check_arguments
from policy.common.files import as_json
from policy.common.observations import is_image
from policy.common.registry import Registry
from policy.diffusion.coefficients import SOLVERS
from policy.diffusion.objective import DEFAULT_OBJECTIVE
from policy.diffusion.sampler import Sampler
from policy.model.config import PolicyConfig, config_from_json
from policy.model.defaults import with_defaults
from policy.model.denoisers import DENOISERS
from policy.model.diffusion_policy import DiffusionPolicy
from policy.model.encoders import ENCODERS
from policy.model.storage import Origin
from policy.training.state import TrainState, restore_optimizer, restore_record

T = TypeVar("T")

# Limit of the only size of a policy that the shapes of its weights do not show.
MAX_NUM_STEPS = 100_000
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
# The first schema whose state encoders have a skip connection unless they say otherwise.
SKIP_SINCE = 3
# The first schema that records the sampler settings.
SAMPLER_SINCE = 4
# How often a checkpoint is read if it is replaced meanwhile; a reading takes a fraction of the time between two saves.
MOST_READINGS = 10
# Training settings, and facts for readers, that change no weight, so that a run may go on with others.
MAY_CHANGE = {
    *("execution_horizon", "keep_last", "log_every", "rate_hz", "rollout_every", "sampler", "save_every", "tasks"),
    "val_every",
}

# The name under which a checkpoint notes a checksum of the values in its demonstrations.
CHECKSUM = "dataset.checksum"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        policy: ready to act: averaged weights, evaluation mode.
        env: how to make its environment (`{"name": ..., **settings}`), or None.
        execution_horizon: the execution horizon of the rollouts during training.
        sampler: the sampler settings of these rollouts; those that are open have their defaults.
        training: how it was trained, JSON data.
        path: the folder.
        digest: start of the SHA-256 of its weights, which does not depend on the folder.
        plugins: names of the plugins that were loaded when it was trained, for messages only.
    """

    policy: DiffusionPolicy
    env: dict[str, Any] | None
    execution_horizon: int
    sampler: Sampler = field(default_factory=Sampler)
    training: dict[str, Any]
    path: Path
    digest: str
    plugins: tuple[str, ...] = ()

    def sampler_with(self, given: Mapping[str, Any]) -> Sampler:
        """Return the recorded sampler settings with those that the user gives in their place.

        Args:
            given: settings of `Sampler` by name.

        Raises:
            ValueError: a value outside its range, or settings that do not fit each other or the policy; the message
                says which of them the checkpoint records.
        """
        try:
            chosen = dataclasses.replace(self.sampler, **given)
            self.policy.settled(chosen)
        except ValueError as error:
            own = {name: value for name, value in self.sampler.given.items() if name not in given}
            if not own:
                raise
            raise ValueError(
                f"{error} ({self.path} records {Sampler(**own).overrides}, which another value replaces)"
            ) from error
        return chosen


def load_checkpoint(folder: Path | str, device: str = "cpu", *, root: Path | None = None) -> Checkpoint:
    """Load a policy that is ready to act. The files that are read are verified against their checksums.

    A training may replace the checkpoint while it is read; the new one is then read from its beginning.

    Args:
        folder: the checkpoint folder.
        device: the device of the loaded policy.
        root: folder that links in the checkpoint may not lead out of; by default the checkpoint folder itself.

    Returns:
        The policy, and the data recorded with it.

    Raises:
        ValueError: there is no checkpoint, it is damaged, it was written by a newer version, or it needs a plugin
            that is not loaded.
    """
    return _read_whole(folder, lambda path: _load(path, device, root))


def _read_whole(folder: Path | str, read: Callable[[Path], T]) -> T:
    """Read from a checkpoint; if a training replaces it meanwhile, read from the new one, from its beginning."""
    path = at_home("checkpoint", folder)
    for _ in range(MOST_READINGS):
        before = _identity(path)
        try:
            found = read(path)
        except ValueError:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return found
    raise ValueError(f"{path} is replaced faster than it can be read: try again")


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from the one that takes its place; None while there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _load(folder: Path, device: str, root: Path | None) -> Checkpoint:
    opened = open_folder(folder, root)
    with refusing(opened.path / CONFIG):
        config = _policy_config(opened, opened.config["policy"])
        env, execution_horizon, training = _circumstances(opened, config)
    weights, digest = opened.verify(WEIGHTS)
    tensors = read_tensors(weights)
    with refusing(opened.path):
        check_fit(config, tensors, opened.path)
        policy = DiffusionPolicy(config)
        policy.load_state_dict(tensors, assign=True)  # mapped from the file, not copied
        sampler = _sampler(opened, policy)
    plugins = _plugins(opened)
    policy.origin = Origin(
        env=env, execution_horizon=execution_horizon, sampler=sampler, training=training, plugins=plugins
    )
    return Checkpoint(
        policy=policy.to(device).eval().requires_grad_(False),
        env=env,
        execution_horizon=execution_horizon,
        sampler=sampler,
        training=training,
        path=opened.path,
        digest=digest[:16],
        plugins=plugins,
    )


def digest_of(folder: Path) -> str:
    """Return the start of the SHA-256 of a checkpoint's weights, see `Checkpoint.digest`.

    Raises:
        ValueError: there is no checkpoint, or it is damaged.
    """
    return _read_whole(folder, lambda path: open_folder(path).verify(WEIGHTS)[1][:16])


def read_history(folder: Path) -> list[dict[str, float]]:
    """Read the metrics of the training that a checkpoint belongs to; none from one that cannot resume.

    Raises:
        ValueError: there is no checkpoint, or it is damaged.
    """
    return _read_whole(folder, _history)


def _history(folder: Path) -> list[dict[str, float]]:
    opened = open_folder(folder)
    if not os.path.lexists(opened.path / TRAINING_RECORD):
        return []
    file = opened.verify(TRAINING_RECORD)[0]
    record = read_json(file)
    with refusing(file):
        try:
            return [_finite(entry) for entry in record["history"] if math.isfinite(entry["step"])]
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): use another checkpoint") from error


def _finite(entry: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an entry but those that were not finite, which are null in JSON."""
    metrics = {str(name): float(value) for name, value in entry.items() if value is not None}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


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
            config = _policy_config(opened, record["teacher"]) if "teacher" in record else state.policy.config
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
            "policy": with_defaults(_policy_config(opened, was["policy"])),
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


def _policy_config(opened: Folder, data: Mapping[str, Any]) -> PolicyConfig:
    config = config_from_json(data)
    if opened.config["schema_version"] < SKIP_SINCE and config.encoder.get("name") == "state":
        config = dataclasses.replace(config, encoder={"skip": False, **config.encoder})
    for registry, spec in ((ENCODERS, config.encoder), (DENOISERS, config.denoiser)):
        _check_part(opened, registry, spec.get("name"))
    num_steps = config.schedule.get("num_steps", 0)
    if isinstance(num_steps, int) and num_steps > MAX_NUM_STEPS:
        raise ValueError(
            f"{opened.path} asks for schedule.num_steps={num_steps}; a checkpoint may ask for up to {MAX_NUM_STEPS}"
        )
    return config


def _plugins(opened: Folder) -> tuple[str, ...]:
    noted = opened.config.get("plugins")
    return tuple(map(str, noted)) if isinstance(noted, list) else ()


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


def _check_part(opened: Folder, registry: Registry[Any], name: Any) -> None:
    """Reject a part that is not registered. The plugins that a checkpoint names are never imported automatically.

    Raises:
        ValueError: the message names the part, and the plugins loaded in training.
    """
    plugins = _plugins(opened)
    if name in registry or not plugins:
        return
    raise ValueError(
        f"{opened.path} was trained with the {registry.kind} {name!r}, registered by a plugin: if you trust it, add"
        f" plugins=[{','.join(plugins)}]"
    )


def _circumstances(opened: Folder, config: PolicyConfig) -> tuple[dict[str, Any] | None, int, dict[str, Any]]:
    """Read and check the environment, the execution horizon and the training record."""
    env, horizon, training = (opened.config[key] for key in ("env", "execution_horizon", "training"))
    allowed = {
        "env": env is None or (isinstance(env, dict) and isinstance(env.get("name"), str)),
        "execution_horizon": type(horizon) is int and 1 <= horizon <= config.action_horizon,
        "training": isinstance(training, dict),
    }
    for key, fine in allowed.items():
        if not fine:
            raise ValueError(f"{opened.path / CONFIG} is damaged (at {key!r}): use another checkpoint")
    return env, horizon, training


def _sampler(opened: Folder, policy: DiffusionPolicy) -> Sampler:
    """Read and check the sampler settings; a checkpoint of before they were recorded has the defaults."""
    given = opened.config["sampler"] if opened.config["schema_version"] >= SAMPLER_SINCE else {}
    if not isinstance(given, dict):
        raise ValueError(f"{opened.path / CONFIG} is damaged (at 'sampler'): use another checkpoint")
    if policy.config.objective == DEFAULT_OBJECTIVE and "solver" in given:
        _check_part(opened, SOLVERS, given["solver"])
    try:
        sampler = Sampler(**check_arguments("sampler", Sampler, given))
        policy.settled(sampler)
    except ValueError as error:
        raise ValueError(f"the checkpoint {opened.path} records a sampler that it cannot have: {error}") from error
    return sampler


def check_fit(
    config: PolicyConfig, tensors: Mapping[str, torch.Tensor], path: Path | str, stated_in: str = f"its {CONFIG}"
) -> None:
    """Reject weights that do not fit the configured policy, before memory for the policy is allocated.

    Args:
        config: the policy's configuration.
        tensors: the weights.
        path: where they are from, for messages.
        stated_in: where their configuration is from, for messages.

    Raises:
        ValueError: the message names what does not fit.
    """
    with torch.device("meta"), _at_most(tensors, path, stated_in):
        expected = DiffusionPolicy(config).state_dict()
    if expected.keys() != tensors.keys():
        key = sorted(expected.keys() ^ tensors.keys())[0]
        raise ValueError(
            f"the weights in {path} do not fit {stated_in}: {key} is {'missing' if key in expected else 'not in it'}"
        )
    for key, value in expected.items():
        if (value.shape, value.dtype) != (tensors[key].shape, tensors[key].dtype):
            raise ValueError(
                f"the weights in {path} do not fit {stated_in}: {key} should be {value.dtype} of shape"
                f" {tuple(value.shape)}; it is {tensors[key].dtype} of shape {tuple(tensors[key].shape)}"
            )


@contextmanager
def _at_most(tensors: Mapping[str, torch.Tensor], path: Path | str, stated_in: str) -> Iterator[None]:
    """Stop building a network that has more tensors than the weights: a file may ask for a billion layers."""
    thread, made = threading.get_ident(), 0

    def count(module: nn.Module, name: str, value: Any) -> None:
        nonlocal made
        if threading.get_ident() == thread and value is not None:
            made += 1
            if made > 2 * len(tensors) + 1:  # twice as many, because fixed tables are not stored
                raise ValueError(
                    f"the weights in {path} do not fit {stated_in}: it asks for more than their {len(tensors)} tensors"
                )

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
