"""Devices and torch threads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from policy.common.arguments import did_you_mean

# The devices that this package supports.
DEVICES = ("cpu", "cuda")


def check_device(device: str) -> str:
    """Reject a device that this machine does not have.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, ...

    Returns:
        The device, unchanged.

    Raises:
        ValueError: the device is unknown or not available.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        meant = "" if device.partition(":")[0] in DEVICES else did_you_mean(device, DEVICES)
        raise ValueError(f"device={device} cannot be used here ({reason}){meant}: use device=cpu") from error
    return device


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run with `count` torch threads: small networks are not faster with more, and workers share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def has_bfloat16_products() -> bool:
    """Whether the processor has instructions for products in bfloat16; False where an older PyTorch cannot tell."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    found: Mapping[str, Any] = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
