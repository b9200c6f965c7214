"""Networks `forward(noisy_actions (B, H, A), timestep (B,), obs_embedding (B, obs_size)) -> (B, H, A)`."""

from __future__ import annotations

from policy.model.denoisers.denoiser import Denoiser
from policy.model.denoisers.modulated_mlp import ModulatedMLP
from policy.model.denoisers.residual_mlp import ResidualMLP
from policy.model.denoisers.transformer import Transformer
from policy.model.denoisers.unet import UNet

# Checkpoints name a denoiser by its key here, never by an import path, so loading one cannot run foreign code.
DENOISERS: dict[str, type[Denoiser]] = {
    "residual_mlp": ResidualMLP,
    "modulated_mlp": ModulatedMLP,
    "unet": UNet,
    "transformer": Transformer,
}

__all__ = ["DENOISERS", "Denoiser", "ModulatedMLP", "ResidualMLP", "Transformer", "UNet"]
