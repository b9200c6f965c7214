"""Residual blocks that timestep and observation modulate (adaLN-Zero), and what the networks made of them share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from policy.model.denoisers.denoiser import Denoiser
from policy.model.denoisers.timestep import TimestepEmbedding


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer, putting out zeros until it is trained."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ModulatedBlock(nn.Module):
    """x + gate * change((1 + scale) * LayerNorm(x) + shift) (Peebles and Xie 2023, sec. 3.2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        # Each block starts as the identity: its gate is zero.
        self.modulate = zeroed(nn.Linear(width, 3 * width))

    def modulation(self, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., width) to 1 + scale, shift and gate, each (..., width)."""
        scale, shift, gate = self.modulate(condition).chunk(3, dim=-1)
        return 1 + scale, shift, gate

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        """(..., width) and its `modulation` to (..., width)."""
        return x + gate * self.change(self.norm(x) * scale + shift)

    def change(self, h: Tensor) -> Tensor:
        """What the block does inside: (..., width) to (..., width)."""
        raise NotImplementedError


class FeedForward(ModulatedBlock):
    """Two linear layers, four times wider in between."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(width)
        self.expand = nn.Linear(width, 4 * width)
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(4 * width, width)

    def change(self, h: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        return self.contract(self.dropout(nn.functional.silu(self.expand(h))))


class ModulatedDenoiser(Denoiser):
    """A stack of modulated blocks; a network made of it brings the way in, the blocks and the way out.

    Args:
        obs_size: width of the observation embedding.
        width: of the blocks (even).
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
        """Three tensors (..., B, width) for each block in turn, see `ModulatedBlock.modulation`."""
        condition = nn.functional.silu(embedded_timestep + self.project_observation(obs_embedding))
        return tuple(part for block in self.blocks for part in block.modulation(condition))  # type: ignore[operator]

    def through_blocks(self, x: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """One timestep's `conditions`, and x that broadcasts against them, through all blocks."""
        for number, block in enumerate(self.blocks):
            x = block(x, *conditions[3 * number : 3 * number + 3])
        return x
