"""The configuration of a policy that starts from a trained one, or learns from one, and the data that fit it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from policy.common.arguments import check_choice
from policy.common.files import as_json
from policy.data.demonstrations import Demonstrations
from policy.model.config import DataShapes, PolicyConfig, PolicySettings
from policy.model.defaults import with_defaults

# Settings of the loss: no weight depends on them, so that a run may start from a checkpoint with others.
OF_THE_LOSS = {"auxiliary_weight", "loss_weighting", "min_snr_gamma"}
# Settings that a distilled policy has from its teacher, because noises and chunks would not fit otherwise.
OF_THE_TEACHER = (
    "obs_horizon",
    "action_horizon",
    "past_actions",
    "differences",
    "direction_differences",
    "end_differences",
    "ignored",
    "normalizer",
    "action_bound",
)


def config_for(settings: PolicySettings, dataset: Demonstrations, auxiliary: Sequence[str]) -> PolicyConfig:
    """Combine the settings of a policy with the sizes that follow from its demonstrations.

    Args:
        settings: the user's settings.
        dataset: the demonstrations.
        auxiliary: those of the dataset's keys that are privileged observations.

    Returns:
        The configuration.

    Raises:
        ValueError: a key that the dataset does not have, or a shape that policies do not support.
    """
    return PolicyConfig(**vars(settings), **vars(_shapes(dataset, auxiliary)))


def config_from(
    trained: PolicyConfig, source: object, given: Mapping[str, Any], auxiliary: Sequence[str], *, rectifies: bool
) -> PolicyConfig:
    """The configuration of a run that starts from a trained policy: that policy's own, but for settings of the loss.

    A run that only rectifies may change the prediction type as well. It does so by itself for a policy that predicts
    the noise, which a single step cannot sample from; see `policy.training.rectification`.

    Args:
        trained: configuration of the trained policy.
        source: the checkpoint, for messages.
        given: the settings that the user gives, see `PolicySettings`; those of a part may be given without its name.
        auxiliary: privileged observations that the user gives; none keeps the policy's own.
        rectifies: whether the run has no steps on demonstrations.

    Returns:
        The configuration.

    Raises:
        ValueError: a setting other than the trained policy's; the message gives both values.
    """
    free = OF_THE_LOSS | ({"prediction_type"} if rectifies else set())
    kept = {name: value for name, value in given.items() if name not in free}
    _refuse_others(kept, trained, source, "whose settings this run keeps")
    if auxiliary and set(auxiliary) != set(trained.auxiliary_shapes):
        raise ValueError(
            f"auxiliary={[*auxiliary]} differs from the {[*trained.auxiliary_shapes]} of {source}, whose settings this"
            " run keeps: leave it out"
        )
    changed = {name: value for name, value in given.items() if name in free}
    if rectifies and trained.prediction_type == "epsilon":
        changed = {"prediction_type": "sample", **changed}
    return dataclasses.replace(trained, **changed)


def config_of_student(
    teacher: PolicyConfig,
    source: object,
    given: Mapping[str, Any],
    dataset: Demonstrations,
    auxiliary: Sequence[str],
) -> PolicyConfig:
    """The configuration of a new policy that learns from a teacher's chunks.

    It has the user's settings, and the teacher's shapes and horizons.

    Args:
        teacher: configuration of the teacher.
        source: the teacher's checkpoint, for messages.
        given: the settings that the user gives, see `PolicySettings`.
        dataset: the demonstrations, whose observations it learns from.
        auxiliary: those of the dataset's keys that are privileged observations.

    Returns:
        The configuration.

    Raises:
        ValueError: a setting that must be the teacher's and is not; the message gives both values.
    """
    kept = {name: value for name, value in given.items() if name in OF_THE_TEACHER}
    _refuse_others(kept, teacher, source, "whose chunks the policy learns")
    inherited = {name: getattr(teacher, name) for name in OF_THE_TEACHER}
    return PolicyConfig(
        **{**given, **inherited},
        observation_shapes=teacher.observation_shapes,
        action_dim=teacher.action_dim,
        auxiliary_shapes=_shapes(dataset, auxiliary).auxiliary_shapes,
    )


def fitting(dataset: Demonstrations, config: PolicyConfig, source: object, *, with_actions: bool) -> Demonstrations:
    """Return the demonstrations with the observations of a policy alone, if they fit it.

    A dot in a policy's key, as in those of LeRobot, is a slash in the keys of demonstrations.

    Args:
        dataset: the demonstrations.
        config: the policy's configuration.
        source: the checkpoint that it comes from, for messages.
        with_actions: whether it learns from their actions too.

    Raises:
        ValueError: an observation is missing or of another shape, or the actions are of another width; the message
            gives all shapes that differ.
    """
    expected = {**config.observation_shapes, **config.auxiliary_shapes}
    keys = {key: key if key in dataset.observations else key.replace(".", "/") for key in expected}
    shapes = dataset.observation_shapes
    pairs = [(f"observation {key!r}", shapes.get(keys[key]), shape) for key, shape in expected.items()]
    if with_actions:
        pairs.append(("an action", dataset.actions.shape[1:], (config.action_dim,)))
    differing = [
        f"{what} is {'missing' if found is None else tuple(found)} in the data and {tuple(shape)} in the checkpoint"
        for what, found, shape in pairs
        if found is None or tuple(found) != tuple(shape)
    ]
    if differing:
        there = ", ".join(f"{key} {tuple(shape)}" for key, shape in shapes.items())
        raise ValueError(
            f"{dataset.source} does not fit {source}: {'; '.join(differing)}. The data have {there}:"
            " dataset.observation_keys= chooses and renames them"
        )
    return dataclasses.replace(dataset, observations={key: dataset.observations[keys[key]] for key in expected})


def _shapes(dataset: Demonstrations, auxiliary: Sequence[str]) -> DataShapes:
    shapes = dataset.observation_shapes
    for key in auxiliary:
        check_choice("auxiliary observation", key, shapes)
    return DataShapes(
        observation_shapes={key: shape for key, shape in shapes.items() if key not in auxiliary},
        auxiliary_shapes={key: shapes[key] for key in auxiliary},
        action_dim=dataset.actions.shape[1],
    )


def _refuse_others(given: Mapping[str, Any], trained: PolicyConfig, source: object, why: str) -> None:
    """Refuse settings that differ from a trained policy's; what the policy does not store has its default."""
    for name, value, trained_value in _differences(as_json(dict(given)), with_defaults(trained)):
        raise ValueError(f"{name}={value} differs from the {trained_value} of {source}, {why}: leave it out")


def _differences(
    given: Mapping[str, Any], stored: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name of each setting that differs, as the user writes it, with both values."""
    for name, value in given.items():
        before = stored.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from _differences(value, before, f"{prefix}{name}.")
        elif value != before:
            yield f"{prefix}{name}", value, before
