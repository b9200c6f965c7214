"""A transformer whose actions attend to the observations and the timestep as tokens of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from policy.model.denoisers.attention import attend, check_heads, positions
from policy.model.denoisers.denoiser import Denoiser
from policy.model.denoisers.modulated import zeroed
from policy.model.denoisers.timestep import TimestepEmbedding
from policy.model.sizes import check_sizes, made_for_shapes


class SelfAttention(nn.Module):
    """Residual block of self-attention after a layer norm, (N, tokens, width) to the same."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """Apply the block; see `attend` for `seen`."""
        query, key, value = self.project(self.norm(x)).chunk(3, dim=-1)
        return x + self.dropout(self.join(attend(query, key, value, self.num_heads, seen)))


class CrossAttention(nn.Module):
    """Residual block of attention to the memory after a layer norm, (N, tokens, width) to the same."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.ask = nn.Linear(width, width)
        self.project = nn.Linear(width, 2 * width)
        self.join = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, projected: Tensor, seen: Tensor | None) -> Tensor:
        """Apply the block to x with the memory (N, memory, 2 * width) from `project`; see `attend` for `seen`."""
        key, value = projected.chunk(2, dim=-1)
        return x + self.dropout(self.join(attend(self.ask(self.norm(x)), key, value, self.num_heads, seen)))


class FeedForward(nn.Module):
    """Residual block of two linear layers after a layer norm, with a hidden layer of 4 * width."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block, (..., width) to (..., width)."""
        hidden = self.dropout(nn.functional.gelu(self.expand(self.norm(x))))
        return x + self.dropout(self.contract(hidden))


class DecoderLayer(nn.Module):
    """Self-attention of the actions, attention to the memory, and a feed-forward block."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.actions = SelfAttention(width, num_heads, dropout)
        self.memory = CrossAttention(width, num_heads, dropout)
        self.feed_forward = FeedForward(width, dropout)

    def forward(self, x: Tensor, projected: Tensor, earlier: Tensor | None, seen: Tensor | None) -> Tensor:
        """Apply the layer to x (N, tokens, width); see `CrossAttention` for `projected`, `attend` for the masks."""
        return self.feed_forward(self.memory(self.actions(x, earlier), projected, seen))


class EncoderDecoder(Denoiser):
    """An encoder-decoder transformer (the transformer of Chi et al. 2023, sec. III-A).

    The encoder makes a memory of the timestep and the observations; the decoder's tokens, one for each action, attend
    to it. The keys and values of the memory do not depend on the actions and are computed for all timesteps at once.

    Args:
        obs_size: width of the observation embedding, a multiple of `obs_tokens`.
        action_dim: width of one action.
        action_horizon: actions in one chunk.
        num_steps: T of the schedule.
        hidden_size: width of a token (even, a multiple of `num_heads`).
        num_layers: number of decoder layers.
        num_heads: number of attention heads.
        obs_tokens: number of tokens into which the observation embedding is split, such as `obs_horizon` with
            `encoder=concatenate`, which embeds the steps one after the other.
        encoder_layers: number of encoder layers of self-attention; 0 for an MLP on each token.
        causal: whether an action attends to no later action, and action i to the observation tokens 0..i only; see
            `check_past_actions`.
        dropout: dropout probability.

    Raises:
        ValueError: a size below 1, a `hidden_size` that is odd or not a multiple of `num_heads`, or an `obs_size` that
            is not a multiple of `obs_tokens`.
    """

    earlier: Tensor | None
    seen: Tensor | None

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
        obs_tokens: int = 1,
        encoder_layers: int = 0,
        causal: bool = True,
        dropout: float = 0.0,
    ) -> None:
        check_sizes(
            obs_size=obs_size,
            action_dim=action_dim,
            action_horizon=action_horizon,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            obs_tokens=obs_tokens,
            num_steps=num_steps,
        )
        check_heads(hidden_size, num_heads)
        if obs_size % obs_tokens:
            raise ValueError(f"obs_size must be a multiple of obs_tokens; got {obs_size} for {obs_tokens} tokens")
        if encoder_layers < 0:
            raise ValueError(f"encoder_layers must be 0 or more; got {encoder_layers}")
        super().__init__()
        self.obs_tokens = obs_tokens
        # Layers of self-attention mix the observations before the actions attend to them.
        self.unseen = obs_tokens - 1 if causal and not encoder_layers else 0
        self.embed_timestep = TimestepEmbedding(num_steps, hidden_size, endpoint=True)
        self.enter_observation = nn.Linear(obs_size // obs_tokens, hidden_size)
        self.memory_positions = positions(1 + obs_tokens, hidden_size)
        self.encoder = encoder(hidden_size, encoder_layers, num_heads, dropout)
        self.enter = nn.Linear(action_dim, hidden_size)
        self.positions = positions(action_horizon, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(DecoderLayer(hidden_size, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.leave = zeroed(nn.Linear(hidden_size, action_dim))
        # The first place of the memory is the timestep's.
        masks = {
            "earlier": up_to_diagonal(action_horizon, action_horizon, 0),
            "seen": up_to_diagonal(action_horizon, 1 + obs_tokens, 1),
        }
        for name, mask in masks.items():
            self.register_buffer(name, mask if causal else None, persistent=False)

    def conditions(self, embedded_timestep: Tensor, obs_embedding: Tensor) -> tuple[Tensor, ...]:
        """Return the memory as each layer projects it, (..., B, 1 + obs_tokens, 2 * width)."""
        observations = self.enter_observation(obs_embedding.unflatten(-1, (self.obs_tokens, -1)))
        several = embedded_timestep.shape[:-2]
        # Not len(), which would fix the number of rows where this is traced.
        timestep = embedded_timestep[..., None, :].expand(*several, observations.shape[0], 1, -1)
        tokens = torch.cat([timestep, observations.expand(*several, -1, -1, -1)], dim=-2) + self.memory_positions
        rows = self.encoder(self.dropout(tokens).reshape(-1, *tokens.shape[-2:]))
        memory = rows.reshape(tokens.shape)
        return tuple(layer.memory.project(memory) for layer in self.layers)  # type: ignore[union-attr, operator]

    def denoise(self, noisy_actions: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """Decode the actions as tokens; see `Denoiser.denoise` for the shapes."""
        x = self.dropout(self.enter(noisy_actions) + self.positions)
        for layer, projected in zip(self.layers, conditions, strict=True):
            x = layer(x, projected, self.earlier, self.seen)
        return self.leave(self.norm(x))

    def check_past_actions(self, past_actions: int) -> None:
        """See `Denoiser.check_past_actions`; those of causal attention alone do not depend on later observations."""
        if past_actions < self.unseen:
            raise ValueError(
                f"past_actions must be {self.unseen} or more with denoiser.causal=true and denoiser.obs_tokens="
                f"{self.obs_tokens}, or the first actions would not depend on the newest observation; got"
                f" {past_actions}: raise it, or choose denoiser.causal=false or denoiser.encoder_layers=1"
            )


def encoder(width: int, num_layers: int, num_heads: int, dropout: float) -> nn.Sequential:
    """Build the encoder, (N, tokens, width) to the same: layers of self-attention, or an MLP if there is none."""
    if not num_layers:
        return nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
    return nn.Sequential(
        *(
            block
            for _ in range(num_layers)
            for block in (SelfAttention(width, num_heads, dropout), FeedForward(width, dropout))
        )
    )


def up_to_diagonal(rows: int, columns: int, diagonal: int) -> Tensor:
    """A (rows, columns) bool mask of the places on and below a diagonal; 0 is the main one, 1 the next above it."""
    mask = torch.empty(rows, columns, dtype=torch.bool)
    return mask if made_for_shapes() else mask.fill_(True).tril(diagonal)
