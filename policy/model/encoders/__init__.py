"""From an observation history, (B, obs_horizon, *shape) under each key, to one embedding (B, obs_size)."""

from __future__ import annotations

from torch import nn

from policy.model.encoders.image import ImageEncoder
from policy.model.encoders.state import StateEncoder

# Checkpoints name an encoder by its key here, never by an import path.
ENCODERS: dict[str, type[nn.Module]] = {"state": StateEncoder, "image": ImageEncoder}

__all__ = ["ENCODERS", "ImageEncoder", "StateEncoder"]
