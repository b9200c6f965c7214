"""Derivation of independent random streams from seeds."""

from __future__ import annotations

import numpy as np
import torch


def derive_seed(*keys: int) -> int:
    """Derive a 64-bit seed from whole numbers; similar numbers give unrelated seeds.

    Args:
        *keys: non-negative numbers, such as (run seed, step) or (episode seed, plan).

    Returns:
        A seed for torch.

    Raises:
        ValueError: a negative number.
    """
    if min(keys) < 0:
        raise ValueError(f"seed must be 0 or more; got {min(keys)}")
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


def derive_generator(*keys: int) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*keys))
