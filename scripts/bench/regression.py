"""Plain regression as a plugin, beside which a benchmark puts diffusion: `plugins=[scripts.bench.regression]`.

With `denoiser=regression prediction_type=sample` a policy learns the mean of the chunks that follow an observation, on
the same windows, with the same normalisers and the same training loop; one denoising step returns that mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

import policy
from policy.model.denoisers.denoiser import Denoiser
from policy.model.denoisers.timestep import TimestepEmbedding


class Regression(Denoiser):
    """An MLP from the observation embedding to the chunk; it sees neither the noisy chunk nor the timestep.

    Args:
        obs_size: width of the observation embedding.
        action_dim: width of one action.
        action_horizon: actions in one chunk.
        num_steps: T of the schedule.
        hidden_size: width of a hidden layer.
        num_layers: number of hidden layers.
    """

    def __init__(
        self,
        *,
        obs_size: int,
        action_dim: int,
        action_horizon: int,
        num_steps: int,
        hidden_size: int = 256,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        self.embed_timestep = TimestepEmbedding(num_steps, 2)
        widths = [obs_size] + [hidden_size] * num_layers
        hidden = [part for entering, leaving in pairwise(widths) for part in (nn.Linear(entering, leaving), nn.GELU())]
        self.regress = nn.Sequential(*hidden, nn.Linear(widths[-1], action_horizon * action_dim))

    def conditions(self, embedded_timestep: Tensor, obs_embedding: Tensor) -> tuple[Tensor, ...]:
        """Compute the chunk (..., B, action_horizon * action_dim), the same at every timestep."""
        chunk = self.regress(obs_embedding)
        return (chunk.expand(*embedded_timestep.shape[:-2], *chunk.shape),)

    def denoise(self, noisy_actions: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """Return the chunk, in the shape of the actions."""
        return conditions[0].unflatten(1, noisy_actions.shape[1:])


policy.DENOISERS.register("regression", Regression)
