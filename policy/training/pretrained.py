"""Pretrained weights of an encoder, from a file of the user's own; nothing is downloaded."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor

from policy.common.arguments import at_home


def read_weights(file: str) -> dict[str, Tensor]:
    """Read a file of tensors by name, without running anything in it.

    Args:
        file: a `.pth` file of torchvision, or a `.safetensors` file of timm.

    Returns:
        The tensors, on the CPU.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path = at_home("encoder.pretrained", file)
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # both readers raise many types
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"encoder.pretrained={file} cannot be read as weights ({reason}): give the .pth file of torchvision or the"
            " .safetensors file of timm"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"encoder.pretrained={file} does not hold tensors by name: give a state dictionary")
    return found
