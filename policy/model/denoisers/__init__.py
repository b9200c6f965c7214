"""Denoisers by name. Each derives from `Denoiser`.

It sets `embed_timestep` and implements `conditions`, which depends on the timestep and the observation alone, and
`denoise`, which also depends on the noisy actions. `Denoiser.forward` joins the three for training: noisy_actions
(B, H, A), timestep (B,) and obs_embedding (B, obs_size) to (B, H, A).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from policy.common.registry import Registry

if TYPE_CHECKING:
    from policy.model.denoisers.denoiser import Denoiser

# Checkpoints store a denoiser's name, never an import path, so loading a checkpoint cannot run foreign code.
# A denoiser's parameters without a default follow from the rest of the configuration; the others are its settings.
DENOISERS: Registry[type[Denoiser]] = Registry(
    "denoiser",
    {
        "residual_mlp": "policy.model.denoisers.residual_mlp:ResidualMLP",
        "modulated_mlp": "policy.model.denoisers.modulated_mlp:ModulatedMLP",
        "unet": "policy.model.denoisers.unet:UNet",
        "transformer": "policy.model.denoisers.transformer:Transformer",
        "encoder_decoder": "policy.model.denoisers.encoder_decoder:EncoderDecoder",
    },
)
