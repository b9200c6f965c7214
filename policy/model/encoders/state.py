"""An encoder for observations that are vectors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from policy.model.encoders.parts import check_noise, check_vectors, final_mlp, join_vectors


class StateEncoder(nn.Module):
    """An MLP over the flattened history of all state vectors, and a linear layer beside it.

    Args:
        shapes: shape of one observation under each key, without batch and time.
        obs_horizon: number of observations in the history.
        obs_size: width of the embedding.
        hidden_size: width of the hidden layer.
        noise: standard deviation of the Gaussian noise added to the normalised observations in training, so that
            states near the demonstrated ones lead to the same actions.
        dropout: dropout probability of the hidden layer.
        skip: whether to add a linear map of the history to the embedding, past the hidden layer and its dropout (a skip
            connection): exact numbers, such as small distances, then reach the denoiser as they are.

    Raises:
        ValueError: an observation that is not a vector (an image, for instance), or a setting out of range.
    """

    def __init__(
        self,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        obs_horizon: int,
        obs_size: int,
        hidden_size: int = 256,
        noise: float = 0.0,
        dropout: float = 0.0,
        skip: bool = True,
    ) -> None:
        super().__init__()
        check_vectors("state", shapes)
        check_noise(noise)
        self.keys = sorted(shapes)
        self.noise = noise
        width = obs_horizon * sum(shape[0] for shape in shapes.values())
        self.layers = final_mlp(width, hidden_size, obs_size, dropout)
        self.skip = nn.Linear(width, obs_size) if skip else None

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        """Embed normalised observations.

        Args:
            observations: (B, obs_horizon, D) under each key.

        Returns:
            (B, obs_size).
        """
        x = join_vectors(observations, self.keys, self.noise if self.training else 0.0)
        embedded: Tensor = self.layers(x)
        return embedded if self.skip is None else embedded + self.skip(x)
