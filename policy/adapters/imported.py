"""What an adapter makes of another project's checkpoint: a policy of ours, and what there is to say about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from policy.checkpoint.files import refusing
from policy.checkpoint.reading import check_fit
from policy.control.timeline import check_execution_horizon
from policy.model.by_key import module_name
from policy.model.config import PolicyConfig
from policy.model.diffusion_policy import DiffusionPolicy

# A picture is in [0, 1] there, and in [0, 255] here.
PIXEL = 255.0


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Another project's checkpoint in our terms.

    Attributes:
        project: the project that wrote it.
        config: the policy's configuration.
        weights: its weights and normalisers, under the names of `DiffusionPolicy.state_dict`.
        execution_horizon: actions that the other project executes before the next plan.
        found: what the checkpoint holds, for people, as text by name.
        sampler: how the other project samples, as settings of `Sampler`.
        differences: where our defaults differ from what the other project does, one sentence each.
    """

    project: str
    config: PolicyConfig
    weights: dict[str, Tensor]
    execution_horizon: int
    found: dict[str, str] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    differences: tuple[str, ...] = ()


def build_policy(imported: Imported, source: str) -> DiffusionPolicy:
    """Build the policy, ready to act.

    Args:
        imported: the checkpoint in our terms.
        source: where it came from, for messages.

    Returns:
        The policy in evaluation mode, without gradients.

    Raises:
        ValueError: the weights do not fit the configuration, a part of it cannot be built, a normaliser is not finite,
            or it executes more actions than a chunk has.
    """
    check_execution_horizon(imported.execution_horizon, imported.config.action_horizon)
    for key, value in imported.weights.items():
        # Finite statistics may still have a range too small for float32.
        if "normalizer" in key and not value.isfinite().all():
            raise ValueError(f"the statistics in {source} give {key} a NaN or an infinity: they are not of real data")
    with refusing(Path(source)):
        check_fit(imported.config, imported.weights, source, "the rest of that checkpoint")
        policy = DiffusionPolicy(imported.config)
        policy.load_state_dict(imported.weights)
    return policy.eval().requires_grad_(False)


def with_keys(imported: Imported, keys: Mapping[str, str]) -> Imported:
    """Rename observations.

    Args:
        imported: the checkpoint in our terms.
        keys: names in the checkpoint by the names to use, `{ours: theirs}`.

    Returns:
        The same policy with other names.

    Raises:
        ValueError: a name that the checkpoint does not have, or two observations with one name.
    """
    shapes = imported.config.observation_shapes
    theirs = {their: our for our, their in keys.items()}
    if unknown := sorted(theirs.keys() - shapes.keys()):
        raise ValueError(
            f"keys={{ours: theirs}} names {unknown[0]!r}, which the policy does not observe; it observes"
            f" {', '.join(sorted(shapes))}"
        )
    names = {key: theirs.get(key, key) for key in shapes}
    if len(theirs) < len(keys) or len(set(names.values())) < len(names):
        raise ValueError(f"keys must give each observation one name of its own; got {dict(keys)}")
    prefixes = {normalizer_prefix(key): normalizer_prefix(name) for key, name in names.items()}
    config = dataclasses.replace(
        imported.config,
        observation_shapes={names[key]: shape for key, shape in shapes.items()},
        encoder=_with_names(imported.config.encoder, names),
    )
    weights = {_replaced(key, prefixes): value for key, value in imported.weights.items()}
    return dataclasses.replace(imported, config=config, weights=weights)


def _with_names(encoder: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {**encoder, "order": [names[key] for key in encoder["order"]]}


def _replaced(key: str, prefixes: Mapping[str, str]) -> str:
    for before, after in prefixes.items():
        if key.startswith(before):
            return after + key.removeprefix(before)
    return key


def sampling_differences(project: str, sampler: Mapping[str, Any], scheduler: str, *, clips: bool) -> list[str]:
    """Say how another project samples, and what we do otherwise.

    Args:
        project: its name.
        sampler: how it samples, as settings of `Sampler`.
        scheduler: its own name for that.
        clips: whether it bounds its estimates of the actions.

    Returns:
        One sentence each.
    """
    steps, eta = sampler["ddim_steps"], f" sampler.eta={sampler['eta']}" if sampler["eta"] else ""
    return [
        f"{project} samples with {steps} steps of {scheduler} at leading timesteps, which is ddim_steps={steps}"
        f" sampler.spacing={sampler['spacing']}{eta} here; our default is DDIM at trailing timesteps",
        f"we derive the noise again after clipping; {project} does not, so DDIM samples differ where it clips"
        if clips
        else "the actions have no bound, so that sampler.clip has no effect",
    ]


def normalizer_prefix(key: str) -> str:
    """Return the start of the names of an observation's normaliser."""
    return f"observation_normalizers.{module_name(key)}."


def affine(center: Tensor, gain: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """The buffers of an `AffineNormalizer`, float32."""
    return {name: value.float() for name, value in (("center", center), ("gain", gain), ("offset", offset))}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a prefix before their names."""
    return {f"{prefix}{key}": value for key, value in tensors.items()}
