"""Residual blocks modulated by timestep and observation (adaLN-Zero), and the base class of networks made of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from policy.model.denoisers.denoiser import Denoiser
from policy.model.denoisers.timestep import TimestepEmbedding


def zeroed(layer: nn.Linear) -> nn.Linear:
    """Set a layer's weights to zero, so that it outputs zeros until it is trained, and return it."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ModulatedBlock(nn.Module):
    """Residual block x + gate * change((1 + scale) * LayerNorm(x) + shift) (Peebles and Xie 2023, sec. 3.2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        # Each block starts as the identity: its gate is zero.
        self.modulate = zeroed(nn.Linear(width, 3 * width))

    def modulation(self, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map a condition (..., width) to 1 + scale, shift and gate, each (..., width)."""
        scale, shift, gate = self.modulate(condition).chunk(3, dim=-1)
        return 1 + scale, shift, gate

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        """Apply the block to x (..., width) with its `modulation`; returns (..., width)."""
        return x + gate * self.change(self.norm(x) * scale + shift)

    def change(self, h: Tensor) -> Tensor:
        """Compute the inner function of the block, (..., width) to (..., width)."""
        raise NotImplementedError


class ModulatedFeedForward(ModulatedBlock):
    """A modulated block of two linear layers with a hidden layer of 4 * width."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(width)
        self.expand = nn.Linear(width, 4 * width)
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(4 * width, width)

    def change(self, h: Tensor) -> Tensor:
        """Apply both layers, (..., width) to (..., width)."""
        return self.contract(self.dropout(nn.functional.silu(self.expand(h))))


class ModulatedDenoiser(Denoiser):
    """A stack of modulated blocks. A subclass defines the input layer, the blocks and the output layer.

    Args:
        obs_size: width of the observation embedding.
        width: width of the blocks (even).
        num_steps: T of the schedule.
    """

    blocks: nn.ModuleList

    def __init__(self, *, obs_size: int, width: int, num_steps: int) -> None:
        super().__init__()
        self.embed_timestep = nn.Sequential(
            TimestepEmbedding(num_steps, width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.project_observation = nn.Linear(obs_size, width)

    def conditions(self, embedded_timestep: Tensor, obs_embedding: Tensor) -> tuple[Tensor, ...]:
        """Return three tensors (..., B, width) for each block in turn; see `ModulatedBlock.modulation`."""
        condition = nn.functional.silu(embedded_timestep + self.project_observation(obs_embedding))
        return tuple(part for block in self.blocks for part in block.modulation(condition))  # type: ignore[operator]

    def through_blocks(self, x: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """Apply all blocks to x with the `conditions` of one timestep, which x must broadcast against."""
        for number, block in enumerate(self.blocks):
            x = block(x, *conditions[3 * number : 3 * number + 3])
        return x
