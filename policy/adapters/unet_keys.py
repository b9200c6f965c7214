"""The U-Net of LeRobot and diffusion_policy under our names. Both projects have the same network."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# The last convolution has this many groups whatever `n_groups` says.
LAST_GROUPS = 8
# What there is to say about a network whose blocks have a shift alone, see `scales` of `unet_weights`.
NO_SCALES = "its blocks have no scale; ours have one, which is 0 and would be trained"
# Names that diffusion_policy has otherwise than LeRobot.
AS_LEROBOT = (
    (r"\.blocks\.0\.block\.", ".conv1.block."),
    (r"\.blocks\.1\.block\.", ".conv2.block."),
    (r"^((?:down|up)_modules\.\d+\.2)\.conv\.", r"\1."),
)
# LeRobot's names and ours.
AS_OURS = (
    (r"^diffusion_step_encoder\.", "embed_timestep."),
    (r"^(down|up)_modules\.(\d+)\.0\.", r"\1.\2.first."),
    (r"^(down|up)_modules\.(\d+)\.1\.", r"\1.\2.second."),
    (r"^down_modules\.(\d+)\.2\.", r"shorten.\1."),
    (r"^up_modules\.(\d+)\.2\.", r"lengthen.\1."),
    (r"^mid_modules\.0\.", "middle.first."),
    (r"^mid_modules\.1\.", "middle.second."),
    (r"^final_conv\.0\.block\.", "last."),
    (r"^final_conv\.1\.", "leave."),
    (r"\.conv1\.block\.", ".first."),
    (r"\.conv2\.block\.", ".second."),
    (r"\.residual_conv\.", ".skip."),
)
# The layer that maps timestep and observation to the modulation of a block.
CONDITION = re.compile(r"(.*\.)cond_encoder\.1\.(weight|bias)")


def unet_weights(theirs: Mapping[str, Tensor], *, timestep_size: int, scales: bool) -> dict[str, Tensor]:
    """Rename a U-Net's weights, and split the layers of its conditions.

    Their blocks compute `scale * x + shift`, ours `(1 + scale) * x + shift`.

    Args:
        theirs: the weights, without a prefix.
        timestep_size: width of the timestep embedding.
        scales: whether the blocks have a scale besides the shift.

    Returns:
        The weights of `policy.model.denoisers.unet.UNet`.
    """
    ours: dict[str, Tensor] = {}
    for key, value in theirs.items():
        name = _renamed(key, AS_LEROBOT + AS_OURS)
        if not (match := CONDITION.fullmatch(name)):
            ours[name] = value
        elif match[2] == "bias":
            ours[f"{match[1]}modulate_by_timestep.bias"] = _bias(value, scales)
        else:
            whole = value if scales else torch.cat([torch.zeros_like(value), value])
            ours[f"{match[1]}modulate_by_timestep.weight"] = whole[:, :timestep_size].contiguous()
            ours[f"{match[1]}modulate_by_observation.weight"] = whole[:, timestep_size:].contiguous()
    return ours


def _renamed(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _bias(value: Tensor, scales: bool) -> Tensor:
    if not scales:
        return torch.cat([torch.zeros_like(value), value])
    scale, shift = value.chunk(2)
    return torch.cat([scale - 1, shift])
