"""An encoder for observations that contain images, with or without state vectors."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, repeat

import torch
from torch import Tensor, nn

from policy.model.encoders.parts import check_noise, final_mlp, join_vectors

# Channels per group of the group norm, as in the published code of Diffusion Policy (Chi et al. 2023).
GROUP_WIDTH = 16
# Kernel size and stride of each convolution; the last pair also applies to all later ones. Early strides make the
# network cheap, and the spatial softmax interpolates positions between the remaining grid points.
CONVOLUTIONS = ((8, 4), (3, 2), (3, 1))
SMALLEST_IMAGE = 16


class SpatialSoftmax(nn.Module):
    """Spatial softmax (Levine et al. 2016): the expected position of each feature map, two coordinates per map.

    Each map has a learned sharpness, the inverse of the softmax temperature. At a sharpness of 1, normalised feature
    maps give all positions nearly the same weight: the expected position is then close to the centre of every image,
    and the gradient is too small to change that.

    Args:
        channels: number C of feature maps.
        sharpness: initial sharpness of each map.
    """

    def __init__(self, channels: int, sharpness: float = 5.0) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.full((channels, 1), sharpness))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, 2 * C): all horizontal positions, then all vertical ones, within -1..1."""
        height, width = x.shape[2:]
        weights = (self.sharpness * x.flatten(2)).softmax(dim=2).unflatten(2, (height, width))
        across = torch.linspace(-1, 1, width, dtype=x.dtype, device=x.device)
        down = torch.linspace(-1, 1, height, dtype=x.dtype, device=x.device)
        return torch.cat([weights.sum(dim=2) @ across, weights.sum(dim=3) @ down], dim=1)


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Shift each row's images by a random whole number of pixels, repeating the border (DrQ, Yarats et al. 2021).

    All images of a row are shifted alike, so that motion between them is preserved. The shifts come from torch's global
    generator on the CPU, whatever device the images are on.

    Args:
        images: (B, obs_horizon, H, W, C).
        pixels: largest shift in each direction.

    Returns:
        (B, obs_horizon, H, W, C) shifted images.
    """
    batch, _, height, width, _ = images.shape
    padded = nn.functional.pad(images, (0, 0, *(pixels,) * 4), mode="replicate")
    down, across = (torch.randint(2 * pixels + 1, (batch,)).tolist() for _ in range(2))
    # Slicing copies runs of pixels, which is about ten times faster than indexing pixel by pixel.
    return torch.stack(
        [rows[:, y : y + height, x : x + width] for rows, y, x in zip(padded, down, across, strict=True)]
    )


def camera_network(in_channels: int, channels: tuple[int, ...], features: int) -> nn.Sequential:
    """Build convolutions, a spatial softmax and a linear layer, (N, in_channels, H, W) to (N, features).

    The norm is group norm: a row's embedding must not depend on the rest of its batch, and averaged weights do not
    include batch statistics (Chi et al. 2023, sec. III-B).
    """
    layers: list[nn.Module] = []
    for width, (kernel, stride) in zip(channels, chain(CONVOLUTIONS, repeat(CONVOLUTIONS[-1])), strict=False):
        if layers:
            layers.append(nn.ReLU())
        layers += [
            nn.Conv2d(in_channels, width, kernel, stride, padding=(kernel - stride + 1) // 2, bias=False),
            nn.GroupNorm(width // GROUP_WIDTH, width),
        ]
        in_channels = width
    return nn.Sequential(*layers, SpatialSoftmax(in_channels), nn.Linear(2 * in_channels, features))


class ImageEncoder(nn.Module):
    """A small CNN per camera, and an MLP over the history of the image features and all state vectors.

    Args:
        shapes: shape of one observation under each key, without batch and time: (H, W, C) for an image of 1, 3 or 4
            channels, (D,) for a vector.
        obs_horizon: number of observations in the history; a camera's CNN is the same for all of them.
        obs_size: width of the embedding.
        channels: widths of the convolutions, multiples of 16.
        features: number of features of one image.
        hidden_size: width of the hidden layer.
        shift: largest random shift of the images in training, in pixels, drawn for each row and camera; 0 for none.
        noise: standard deviation of the Gaussian noise added to the normalised vectors in training.
        dropout: dropout probability of the hidden layer.

    Raises:
        ValueError: no image at all, an image that is too small or not (H, W, C), or a setting out of range.
    """

    def __init__(
        self,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        obs_horizon: int,
        obs_size: int,
        channels: tuple[int, ...] = (32, 64, 64),
        features: int = 64,
        hidden_size: int = 256,
        shift: int = 4,
        noise: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.vectors = sorted(key for key, shape in shapes.items() if len(shape) == 1)
        self.images = sorted(shapes.keys() - set(self.vectors))
        if not self.images:
            raise ValueError(f"the image encoder needs an image; {self.vectors} are vectors: choose encoder=state")
        for key in self.images:
            shape = tuple(shapes[key])
            if len(shape) != 3 or shape[2] not in (1, 3, 4) or min(shape[:2]) < SMALLEST_IMAGE:
                raise ValueError(
                    f"an image must have the shape (height, width, channels), {SMALLEST_IMAGE} pixels or more each way "
                    f"and 1, 3 or 4 channels; observation {key!r} has shape {shape}"
                )
        if not channels or any(width < 1 or width % GROUP_WIDTH for width in channels):
            raise ValueError(f"encoder.channels must be one or more multiples of {GROUP_WIDTH}; got {channels}")
        for name, size, least in (("features", features, 1), ("shift", shift, 0)):
            if size < least:
                raise ValueError(f"encoder.{name} must be {least} or more; got {size}")
        check_noise(noise)
        self.shift = shift
        self.noise = noise
        # A list, because names in a ModuleDict must not contain dots, and keys such as observation.image do.
        self.cameras = nn.ModuleList(camera_network(shapes[key][2], channels, features) for key in self.images)
        width = obs_horizon * (features * len(self.images) + sum(shapes[key][0] for key in self.vectors))
        self.layers = final_mlp(width, hidden_size, obs_size, dropout)

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        """Embed observations scaled to [-1, 1].

        Args:
            observations: (B, obs_horizon, H, W, C) under each image's key, (B, obs_horizon, D) under each vector's.

        Returns:
            (B, obs_size).
        """
        parts = [self._see(camera, observations[key]) for key, camera in zip(self.images, self.cameras, strict=True)]
        if self.vectors:
            parts.append(join_vectors(observations, self.vectors, self.noise if self.training else 0.0))
        return self.layers(torch.cat(parts, dim=1))

    def _see(self, camera: nn.Module, images: Tensor) -> Tensor:
        """Map (B, obs_horizon, H, W, C) to (B, obs_horizon * features)."""
        if self.training and self.shift > 0:
            images = random_shift(images, self.shift)
        # This view has torch's channels_last layout, which the convolutions take without a copy.
        seen = camera(images.flatten(0, 1).permute(0, 3, 1, 2))
        return seen.unflatten(0, images.shape[:2]).flatten(1)
