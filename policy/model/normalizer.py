"""Affine maps between the units of a dataset and those of the network."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

# A dimension whose range is at most this share of its largest magnitude counts as constant: its variation is noise.
CONSTANT_RANGE = 1e-4
# Bound of normalised values, in half ranges from the middle; training data lies within 1. A value beyond 10 (from a
# broken sensor, or in another unit) only tells the network that it is far out, and must not drive it to infinity.
FARTHEST = 10.0


class Normalizer(nn.Module):
    """Map each dimension's fitted range onto [-1, 1], and back.

    Clipping in the sampler relies on this bounded range. A constant or near-constant dimension (its range is at most
    1e-4 of its largest magnitude) always normalises to 0 and un-normalises to its constant: it carries no information,
    and dividing by its range would turn rounding errors into full-scale signals. A dataset of a single episode or a
    single transition needs no special treatment: the dimensions that do not vary in it are constant.

    Values outside the fitted range are mapped linearly up to 10 half ranges from its middle. Values farther away,
    infinity included, normalise to 10 or -10. A policy's actions are therefore finite for every observation without
    NaN, and within the demonstrated range as long as its sampler clips, as it does by default. NaN stays NaN, except in
    a constant dimension.

    The statistics are buffers: they are saved with the weights, and a checkpoint without them does not load.

    Args:
        shape: shape of one observation or action, without batch and time.
    """

    center: Tensor
    half_range: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(shape))
        self.register_buffer("half_range", torch.ones(shape))

    def fit(self, low: ArrayLike, high: ArrayLike) -> None:
        """Set the range from the smallest and largest training values.

        Args:
            low: smallest value of each dimension, in the data's units.
            high: largest value of each dimension.

        Raises:
            ValueError: wrong shapes, low > high, or a value that is not finite in float32.
        """
        center, half_range = _ranges(low, high, tuple(self.center.shape))
        self.center.copy_(torch.as_tensor(center))
        self.half_range.copy_(torch.as_tensor(half_range))

    @property
    def scale(self) -> Tensor:
        """(*shape) divisor of `normalize`: half the fitted range, or 1 where a dimension is constant."""
        return torch.where(self.half_range == 0, 1.0, self.half_range)

    def normalize(self, x: Tensor) -> Tensor:
        """Map (..., *shape) from the data's units to [-1, 1] inside the fitted range, and to [-10, 10] outside it."""
        scaled = (x - self.center) / self.scale
        return torch.where(self.half_range == 0, 0.0, scaled.clamp(-FARTHEST, FARTHEST))

    def unnormalize(self, x: Tensor) -> Tensor:
        """Map (..., *shape) back to the data's units: the inverse of `normalize` within [-10, 10]."""
        return x * self.half_range + self.center

    def inverse(self) -> tuple[Tensor, Tensor]:
        """Return factor and shift of `unnormalize`, each (*shape)."""
        return self.half_range, self.center


class AffineNormalizer(nn.Module):
    """The map (x - center) * gain + offset of each dimension, without a bound, and its inverse.

    Other projects' policies are normalised in this way, to a range or by mean and standard deviation. A dimension whose
    gain is 0 always normalises to its offset and un-normalises to its centre.

    Args:
        shape: shape of one observation or action, without batch and time; (channels,) for an image.
        center: initial centre of all dimensions.
        gain: initial gain of all dimensions.
    """

    center: Tensor
    gain: Tensor
    offset: Tensor

    def __init__(self, shape: tuple[int, ...], *, center: float = 0.0, gain: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("center", torch.full(shape, center))
        self.register_buffer("gain", torch.full(shape, gain))
        self.register_buffer("offset", torch.zeros(shape))

    def fit(self, low: ArrayLike, high: ArrayLike) -> None:
        """Map the range of the training values onto [-1, 1], and a constant dimension to 0.

        Args:
            low: smallest value of each dimension, in the data's units.
            high: largest value of each dimension.

        Raises:
            ValueError: see `Normalizer.fit`.
        """
        center, half_range = _ranges(low, high, tuple(self.center.shape))
        gain = np.divide(1, half_range, out=np.zeros_like(half_range), where=half_range > 0)
        for buffer, values in ((self.center, center), (self.gain, gain), (self.offset, np.zeros_like(gain))):
            buffer.copy_(torch.as_tensor(values))

    @property
    def scale(self) -> Tensor:
        """(*shape) size of one normalised unit in the data's units, or 1 where the gain is 0."""
        return torch.where(self.gain == 0, 1.0, 1 / self.gain)

    def normalize(self, x: Tensor) -> Tensor:
        """Map (..., *shape) from the data's units."""
        return (x - self.center) * self.gain + self.offset

    def unnormalize(self, x: Tensor) -> Tensor:
        """Map (..., *shape) back to the data's units: the inverse of `normalize`."""
        return torch.where(self.gain == 0, 0.0, (x - self.offset) / self.gain) + self.center

    def inverse(self) -> tuple[Tensor, Tensor]:
        """Return factor and shift of `unnormalize`, each (*shape)."""
        factor = torch.where(self.gain == 0, 0.0, 1 / self.gain)
        return factor, self.center - factor * self.offset


NORMALIZERS: dict[str, type[Normalizer] | type[AffineNormalizer]] = {"limits": Normalizer, "affine": AffineNormalizer}


def _ranges(low: ArrayLike, high: ArrayLike, shape: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Check limits, and return the middle and half of each dimension's range; a constant dimension has 0."""
    low_, high_ = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    if low_.shape != shape or high_.shape != shape:
        raise ValueError(f"limits must have shape {shape}; got {low_.shape} and {high_.shape}")
    largest = np.finfo(np.float32).max
    if not ((-largest <= low_) & (low_ <= high_) & (high_ <= largest)).all():
        raise ValueError(
            "limits must be finite with low <= high in every dimension; the data holds a NaN or infinity, or a"
            " number too large for float32"
        )
    half_range = (high_ - low_) / 2
    constant = 2 * half_range <= CONSTANT_RANGE * np.maximum(np.abs(low_), np.abs(high_))
    return (low_ + high_) / 2, np.where(constant, 0.0, half_range)


class Limits:
    """The smallest and largest value of each dimension of data that arrives in blocks.

    Example:
        >>> import numpy as np
        >>> limits = Limits()
        >>> limits.update(np.array([[1.0, 5.0], [3.0, 4.0]]))
        >>> low, high = limits
        >>> low.tolist(), high.tolist()
        ([1.0, 4.0], [3.0, 5.0])
    """

    def __init__(self) -> None:
        self._low: NDArray[np.float64] | float = np.inf
        self._high: NDArray[np.float64] | float = -np.inf

    def update(self, values: NDArray[np.generic]) -> None:
        """Update the limits with a block (N, ...)."""
        self._low = np.minimum(self._low, values.min(axis=0).astype(np.float64))
        self._high = np.maximum(self._high, values.max(axis=0).astype(np.float64))

    def __iter__(self) -> Iterator[NDArray[np.float64]]:
        yield np.asarray(self._low)
        yield np.asarray(self._high)
