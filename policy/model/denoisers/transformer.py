"""A diffusion transformer: one token for each action of the chunk."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from policy.model.denoisers.attention import attend, check_heads, positions
from policy.model.denoisers.modulated import ModulatedBlock, ModulatedDenoiser, ModulatedFeedForward, zeroed
from policy.model.sizes import check_sizes


class Attention(ModulatedBlock):
    """A modulated block of multi-head self-attention over all tokens (Vaswani et al. 2017, sec. 3.2)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width)
        self.num_heads = num_heads
        self.project = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)

    def change(self, h: Tensor) -> Tensor:
        """Apply the attention, (B, tokens, width) to (B, tokens, width)."""
        query, key, value = self.project(h).chunk(3, dim=-1)
        return self.join(attend(query, key, value, self.num_heads))


class Transformer(ModulatedDenoiser):
    """Attention and feed-forward blocks over the actions, each modulated by timestep and observation.

    It is the diffusion transformer with adaLN-Zero (Peebles and Xie 2023), with the observation in place of the label.

    Args:
        obs_size: width of the observation embedding.
        action_dim: width of one action.
        action_horizon: actions in one chunk.
        hidden_size: width of a token (even, a multiple of `num_heads`).
        num_layers: number of pairs of an attention and a feed-forward block.
        num_heads: number of attention heads.
        num_steps: T of the schedule.
        dropout: dropout probability inside the feed-forward blocks.

    Raises:
        ValueError: a size below 1, or a `hidden_size` that is odd or not a multiple of `num_heads`.
    """

    def __init__(
        self,
        *,
        obs_size: int,
        action_dim: int,
        action_horizon: int,
        num_steps: int,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        check_sizes(
            obs_size=obs_size,
            action_dim=action_dim,
            action_horizon=action_horizon,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_steps=num_steps,
        )
        check_heads(hidden_size, num_heads)
        super().__init__(obs_size=obs_size, width=hidden_size, num_steps=num_steps)
        self.enter = nn.Linear(action_dim, hidden_size)
        self.positions = positions(action_horizon, hidden_size)
        self.blocks = nn.ModuleList(
            block
            for _ in range(num_layers)
            for block in (Attention(hidden_size, num_heads), ModulatedFeedForward(hidden_size, dropout))
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.leave = zeroed(nn.Linear(hidden_size, action_dim))

    def denoise(self, noisy_actions: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """Apply the blocks to the actions as tokens; see `Denoiser.denoise` for the shapes."""
        for_all_tokens = [condition.unsqueeze(1) for condition in conditions]
        x = self.through_blocks(self.enter(noisy_actions) + self.positions, for_all_tokens)
        return self.leave(self.norm(x))
