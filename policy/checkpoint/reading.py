"""Loading checkpoints: all content is checked before memory of a size that a file asks for is allocated."""

from __future__ import annotations

import dataclasses
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
    WEIGHTS,
    Folder,
    open_folder,
    read_json,
    read_tensors,
    refusing,
)
from policy.common.arguments import at_home, check_arguments
from policy.common.registry import Registry
from policy.diffusion.coefficients import SOLVERS
from policy.diffusion.objective import DEFAULT_OBJECTIVE
from policy.diffusion.sampler import Sampler
from policy.model.config import PolicyConfig, config_from_json
from policy.model.denoisers import DENOISERS
from policy.model.diffusion_policy import DiffusionPolicy
from policy.model.encoders import ENCODERS
from policy.model.storage import Origin

T = TypeVar("T")

# Limit of the only size of a policy that the shapes of its weights do not show.
MAX_NUM_STEPS = 100_000
# The first schema whose state encoders have a skip connection unless they say otherwise.
SKIP_SINCE = 3
# The first schema that records the sampler settings.
SAMPLER_SINCE = 4
# How often a checkpoint is read if it is replaced meanwhile; a reading takes a fraction of the time between two saves.
MOST_READINGS = 10


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
        config = policy_config(opened, opened.config["policy"])
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


def policy_config(opened: Folder, data: Mapping[str, Any]) -> PolicyConfig:
    """Read a policy's configuration as a checkpoint states it.

    Args:
        opened: the checkpoint.
        data: JSON data of the configuration.

    Raises:
        ValueError: it is of a part that is not registered, or absurd.
    """
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
