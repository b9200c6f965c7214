"""An encoder without a network: the observations of each step one after the other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from policy.model.encoders.parts import check_vectors, join_steps, order_of, to_size


class ConcatenateEncoder(nn.Module):
    """Concatenates the normalised state vectors of each step, and then the steps.

    A linear layer maps them to `obs_size` unless they have that width already, as in policies of LeRobot and
    diffusion_policy, whose denoisers take them as they are.

    Args:
        shapes: shape of one observation under each key, without batch and time.
        obs_horizon: number of observations in the history.
        obs_size: width of the embedding.
        order: all keys, in the order within a step; by default sorted.

    Raises:
        ValueError: an observation that is not a vector, or an order that does not name every key once.
    """

    def __init__(
        self, *, shapes: Mapping[str, tuple[int, ...]], obs_horizon: int, obs_size: int, order: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        check_vectors("concatenate", shapes)
        self.order = order_of(shapes, order)
        self.resize = to_size(obs_horizon * sum(shape[0] for shape in shapes.values()), obs_size)

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        """Embed normalised observations.

        Args:
            observations: (B, obs_horizon, D) under each key.

        Returns:
            (B, obs_size).
        """
        embedded: Tensor = self.resize(join_steps([observations[key] for key in self.order]))
        return embedded
