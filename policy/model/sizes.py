"""Sizes of networks: checked, and known before a network is built."""

from __future__ import annotations

import torch


def made_for_shapes() -> bool:
    """Return whether modules are being built for their shapes alone, under `torch.device("meta")`.

    Loading a checkpoint begins in this way. Arithmetic and random draws on that device would import torch's compiler,
    which takes longer than the rest of loading.
    """
    return torch.get_default_device().type == "meta"


def check_sizes(**sizes: int) -> None:
    """Reject sizes that are not whole numbers of 1 or more, and odd widths of a timestep embedding.

    Raises:
        ValueError: an invalid size; the message names it.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a whole number of 1 or more; got {size!r}")
    for name in sizes.keys() & {"hidden_size", "timestep_size"}:
        if sizes[name] % 2:
            raise ValueError(f"{name} must be even, for sine and cosine pairs; got {sizes[name]}")
