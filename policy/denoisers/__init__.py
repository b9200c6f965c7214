"""Networks `forward(noisy_actions (B, H, A), timestep (B,), obs_embedding (B, obs_size)) -> (B, H, A)`."""

from __future__ import annotations

from torch import nn

from policy.denoisers.modulated_mlp import ModulatedMLP
from policy.denoisers.residual_mlp import ResidualMLP

# Checkpoints name a denoiser by its key here, never by an import path, so loading one cannot run foreign code.
DENOISERS: dict[str, type[nn.Module]] = {"residual_mlp": ResidualMLP, "modulated_mlp": ModulatedMLP}

__all__ = ["DENOISERS", "ModulatedMLP", "ResidualMLP"]
