"""Encoders: they map an observation history, (B, obs_horizon, *shape) under each key, to an embedding (B, obs_size)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from policy.common.registry import Registry

if TYPE_CHECKING:
    from torch import nn

# Checkpoints store an encoder's name, never an import path, so loading a checkpoint cannot run foreign code.
# An encoder's parameters without a default follow from the rest of the configuration; the others are its settings.
ENCODERS: Registry[type[nn.Module]] = Registry(
    "encoder",
    {
        "state": "policy.model.encoders.state:StateEncoder",
        "image": "policy.model.encoders.image:ImageEncoder",
        "concatenate": "policy.model.encoders.concatenate:ConcatenateEncoder",
        "resnet": "policy.model.encoders.resnet:ResNetEncoder",
    },
)
