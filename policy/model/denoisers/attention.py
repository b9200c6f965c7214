"""What the denoisers with tokens share: attention by heads, and learned positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from policy.model.sizes import made_for_shapes


def check_heads(hidden_size: int, num_heads: int) -> None:
    """Reject a width that the heads cannot share.

    Raises:
        ValueError: `hidden_size` is not a multiple of `num_heads`.
    """
    if hidden_size % num_heads:
        raise ValueError(
            f"hidden_size must be a multiple of num_heads, which share it; got {hidden_size} for {num_heads} heads"
        )


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int, seen: Tensor | None = None) -> Tensor:
    """Multi-head attention without its linear layers (Vaswani et al. 2017, sec. 3.2).

    Args:
        query: (N, tokens, width).
        key: (N, memory, width).
        value: (N, memory, width).
        num_heads: number of attention heads.
        seen: (tokens, memory) bool, the places that each token attends to; None for all of them.

    Returns:
        (N, tokens, width).
    """
    query, key, value = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key, value))
    attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    return attended.transpose(1, 2).flatten(2)


def positions(tokens: int, width: int) -> nn.Parameter:
    """Learned positions, (tokens, width)."""
    return nn.Parameter(torch.empty(tokens, width) if made_for_shapes() else 0.02 * torch.randn(tokens, width))
