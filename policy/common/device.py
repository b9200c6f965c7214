"""Where tensors live."""

from __future__ import annotations

import torch


def check_device(device: str) -> str:
    """Refuse a device that this machine does not have.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, ...

    Returns:
        The same.

    Raises:
        ValueError: unknown, or not there.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device} cannot be used here ({reason}): use device=cpu") from error
    return device
