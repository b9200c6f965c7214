"""A residual network per camera, with the parameter names of torchvision (He et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from policy.common.arguments import check_choice
from policy.common.observations import is_image
from policy.model.encoders.image import GROUP_WIDTH, SpatialSoftmax
from policy.model.encoders.parts import join_steps, order_of, to_size
from policy.model.sizes import made_for_shapes

# Blocks in each of the four layers, and whether a block is a bottleneck of three convolutions instead of two.
DEPTHS = {18: ((2, 2, 2, 2), False), 34: ((3, 4, 6, 3), False), 50: ((3, 4, 6, 3), True)}
NORMS = ("group", "frozen_batch")
POOLINGS = ("spatial_softmax", "average")
BOTTLENECK_EXPANSION = 4
# Resizing is a matrix of this size a side at most; a file may ask for a billion pixels.
MOST_PIXELS = 8192


class FrozenBatchNorm(nn.Module):
    """Batch norm with stored statistics, in training too.

    A row's embedding must not depend on the rest of its batch, and averaged weights do not include batch statistics.
    Scale and shift are trained.

    Args:
        channels: number of channels.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, channels, H, W)."""
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def norm_layer(norm: str, channels: int) -> nn.Module:
    """Build a norm, (N, channels, H, W) to the same; group norm has groups of 16 channels (Chi et al. 2023)."""
    return nn.GroupNorm(channels // GROUP_WIDTH, channels) if norm == "group" else FrozenBatchNorm(channels)


class Residual(nn.Module):
    """A residual block: two 3x3 convolutions, or a bottleneck with a 1x1 convolution before and after a 3x3 one."""

    def __init__(self, inputs: int, width: int, stride: int, *, norm: str, bottleneck: bool) -> None:
        super().__init__()
        outputs = width * BOTTLENECK_EXPANSION if bottleneck else width
        convolution = partial(nn.Conv2d, bias=False)
        if bottleneck:
            self.conv1, self.bn1 = convolution(inputs, width, 1), norm_layer(norm, width)
            self.conv2, self.bn2 = convolution(width, width, 3, stride, 1), norm_layer(norm, width)
            self.conv3, self.bn3 = convolution(width, outputs, 1), norm_layer(norm, outputs)
        else:
            self.conv1, self.bn1 = convolution(inputs, width, 3, stride, 1), norm_layer(norm, width)
            self.conv2, self.bn2 = convolution(width, width, 3, 1, 1), norm_layer(norm, width)
        self.bottleneck, self.outputs = bottleneck, outputs
        changes = stride != 1 or inputs != outputs
        self.downsample = (
            nn.Sequential(convolution(inputs, outputs, 1, stride), norm_layer(norm, outputs)) if changes else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        h = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            h = self.bn3(self.conv3(torch.relu(h)))
        return torch.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """The convolutional part of a residual network, (N, C, H, W) to (N, outputs, about H / 32, about W / 32).

    Args:
        channels: number C of an image's channels.
        depth: 18, 34 or 50.
        width: number of feature maps of the first layer; 64 in the original.
        norm: one of `NORMS`.

    Attributes:
        outputs: number of feature maps of the last layer.
    """

    def __init__(self, channels: int, *, depth: int, width: int, norm: str) -> None:
        super().__init__()
        counts, bottleneck = DEPTHS[depth]
        self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(norm, width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = width
        for number, count in enumerate(counts):
            blocks = []
            for block in range(count):
                stride = 2 if number and not block else 1
                blocks.append(Residual(inputs, width * 2**number, stride, norm=norm, bottleneck=bottleneck))
                inputs = blocks[-1].outputs
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))
        self.outputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        """Map images to feature maps."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = self.get_submodule(name)(x)
        return x


class Resize(nn.Module):
    """Bilinear resizing with antialiasing, as two matrix products, which every back end has.

    Args:
        size: height and width that come in.
        to: height and width that go out.
    """

    down: Tensor
    across: Tensor

    def __init__(self, size: tuple[int, int], to: tuple[int, int]) -> None:
        super().__init__()
        for name, before, after in zip(("down", "across"), size, to, strict=True):
            self.register_buffer(name, _resizing(before, after), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., H, W) to (..., *to)."""
        return self.down @ x @ self.across.T


def _resizing(before: int, after: int) -> Tensor:
    """The (after, before) matrix that resizes a line of pixels."""
    if made_for_shapes():
        return torch.empty(after, before)
    lines = torch.eye(before)[None, None]
    sized = nn.functional.interpolate(lines, size=(after, before), mode="bilinear", antialias=True, align_corners=False)
    return sized[0, 0]


class Camera(nn.Module):
    """An image to its features: resize, crop, residual network, pooling, and for a spatial softmax a linear layer.

    Args:
        shape: (height, width, channels) of an image.
        resize: height and width to resize to, or None.
        crop: height and width of the crop, or None.
        corner: top and left of the crop in acting; None for the middle.
        keypoints: number of points of the spatial softmax; 0 for the average over all positions.
        network: builds the residual network from the number of channels.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        resize: tuple[int, int] | None,
        crop: tuple[int, int] | None,
        corner: tuple[int, int] | None,
        keypoints: int,
        network: partial[ResNet],
    ) -> None:
        super().__init__()
        size = resize or (shape[0], shape[1])
        if resize and max(*shape[:2], *resize) > MOST_PIXELS:
            raise ValueError(
                f"encoder.resize takes images of up to {MOST_PIXELS} pixels a side; got {shape[0]} x {shape[1]} to"
                f" {resize[0]} x {resize[1]}"
            )
        self.resize = Resize((shape[0], shape[1]), resize) if resize else nn.Identity()
        self.crop = crop or size
        self.free = (size[0] - self.crop[0], size[1] - self.crop[1])
        self.corner = corner or (self.free[0] // 2, self.free[1] // 2)
        _check_crop(size, self.crop, self.corner)
        self.backbone = network(shape[2])
        if keypoints:
            points = nn.Conv2d(self.backbone.outputs, keypoints, 1)
            self.pool: nn.Module = nn.Sequential(points, SpatialSoftmax(keypoints, sharpness=1.0))
            self.head: nn.Module = nn.Sequential(nn.Linear(2 * keypoints, 2 * keypoints), nn.ReLU())
            self.features = 2 * keypoints
        else:
            self.pool, self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Identity()
            self.features = self.backbone.outputs

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (B, obs_horizon, H, W, C) to (B, obs_horizon, features)."""
        cropped = self._cropped(self.resize(images.permute(0, 1, 4, 2, 3)))
        features: Tensor = self.head(self.pool(self.backbone(cropped.flatten(0, 1))))
        return features.unflatten(0, images.shape[:2])

    def _cropped(self, images: Tensor) -> Tensor:
        """Crop (B, obs_horizon, C, H, W): at random in training, all images of a row alike, else at the corner."""
        height, width = self.crop
        top, left = self.corner
        if not self.training or not any(self.free):
            return images[..., top : top + height, left : left + width]
        tops, lefts = (torch.randint(free + 1, (len(images),)).tolist() for free in self.free)
        rows = zip(images, tops, lefts, strict=True)
        return torch.stack([image[..., y : y + height, x : x + width] for image, y, x in rows])


def _check_crop(size: tuple[int, int], crop: tuple[int, int], corner: tuple[int, int]) -> None:
    fits = all(
        inner > 0 and at >= 0 and at + inner <= outer for outer, inner, at in zip(size, crop, corner, strict=True)
    )
    if not fits:
        raise ValueError(
            f"encoder.crop must fit into the image of {size[0]} x {size[1]} pixels; got {crop[0]} x {crop[1]} at"
            f" {corner[0]}, {corner[1]}"
        )


class ResNetEncoder(nn.Module):
    """A residual network per camera; its features and the state vectors of each step are concatenated.

    This is the encoder of the image policies of LeRobot and diffusion_policy (Chi et al. 2023, sec. III-B). A linear
    layer maps the steps to `obs_size` unless they have that width already.

    Args:
        shapes: shape of one observation under each key, without batch and time: (H, W, C) for an image, (D,) for a
            vector.
        obs_horizon: number of observations in the history.
        obs_size: width of the embedding.
        order: all keys, in the order within a step; by default sorted.
        depth: number of layers of the residual network: 18, 34 or 50.
        width: number of feature maps of its first layer; 64 in the original.
        norm: `group`, or `frozen_batch` for stored batch statistics, as pretrained weights need.
        shared: whether all cameras share one network; their images must have one shape.
        resize: height and width to which images are resized first.
        crop: height and width of the crop: at random in training, else at `crop_corner`.
        crop_corner: top and left of the crop; by default it is the middle.
        pooling: `spatial_softmax` with a linear layer, or `average`.
        keypoints: number of points of the spatial softmax; it gives twice as many features.
        pretrained: file with the weights of torchvision's or timm's network (`.pth` or `.safetensors`), from which
            training starts.

    Raises:
        ValueError: no image, an image that is not (H, W, C), images of several shapes for one network, or a setting
            out of range.
    """

    def __init__(
        self,
        *,
        shapes: Mapping[str, tuple[int, ...]],
        obs_horizon: int,
        obs_size: int,
        order: tuple[str, ...] = (),
        depth: int = 18,
        width: int = 64,
        norm: str = "group",
        shared: bool = False,
        resize: tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
        crop_corner: tuple[int, int] | None = None,
        pooling: str = "spatial_softmax",
        keypoints: int = 32,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        _check_choices(depth=(depth, DEPTHS), norm=(norm, NORMS), pooling=(pooling, POOLINGS))
        for name, size in (("width", width), ("keypoints", keypoints)):
            if size < 1:
                raise ValueError(f"encoder.{name} must be 1 or more; got {size}")
        if norm == "group" and width % GROUP_WIDTH:
            raise ValueError(f"encoder.width must be a multiple of {GROUP_WIDTH} with norm=group; got {width}")
        self.order = order_of(shapes, order)
        self.images = [key for key in self.order if is_image(shapes[key])]
        self.pretrained = pretrained
        if not self.images:
            raise ValueError(
                f"the resnet encoder needs an image; {sorted(shapes)} are vectors: choose encoder=concatenate"
            )
        if shared and len({tuple(shapes[key]) for key in self.images}) > 1:
            raise ValueError(
                f"encoder.shared needs images of one shape; got { {key: tuple(shapes[key]) for key in self.images} }"
            )
        camera = partial(
            Camera,
            resize=resize,
            crop=crop,
            corner=crop_corner,
            keypoints=keypoints if pooling == "spatial_softmax" else 0,
            network=partial(ResNet, depth=depth, width=width, norm=norm),
        )
        # A list, because names in a ModuleDict must not contain dots, and keys such as observation.image do.
        self.cameras = nn.ModuleList(camera(shapes[key]) for key in (self.images[:1] if shared else self.images))
        features = sum(self._camera(key).features if key in self.images else shapes[key][0] for key in self.order)
        self.resize = to_size(obs_horizon * features, obs_size)

    def _camera(self, key: str) -> Camera:
        camera = self.cameras[self.images.index(key) % len(self.cameras)]
        assert isinstance(camera, Camera)
        return camera

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        """Embed normalised observations.

        Args:
            observations: (B, obs_horizon, H, W, C) under each image's key, (B, obs_horizon, D) under each vector's.

        Returns:
            (B, obs_size).
        """
        parts = [
            self._camera(key)(observations[key]) if key in self.images else observations[key] for key in self.order
        ]
        embedded: Tensor = self.resize(join_steps(parts))
        return embedded

    def load_pretrained(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights with torchvision's names into every camera's network.

        Args:
            weights: the weights by name; those of other parts, such as a classifier, are left out.

        Raises:
            ValueError: they are those of another network.
        """
        for camera in self.cameras:
            assert isinstance(camera, Camera)
            wanted = camera.backbone.state_dict()
            for key, value in wanted.items():
                found = tuple(weights[key].shape) if key in weights else "nothing"
                if found != tuple(value.shape):
                    raise ValueError(
                        f"{self.pretrained} does not fit the encoder: {key} should have shape {tuple(value.shape)};"
                        f" it has {found}. Choose encoder.depth as in the file, and encoder.norm=frozen_batch"
                    )
            camera.backbone.load_state_dict({key: weights[key] for key in wanted})


def _check_choices(**settings: tuple[object, Iterable[object]]) -> None:
    for name, (value, choices) in settings.items():
        check_choice(f"value of encoder.{name}", value, choices)
