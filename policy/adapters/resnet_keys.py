"""The image encoders of other projects under our names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from policy.adapters.imported import prefixed, under
from policy.model.encoders.resnet import DEPTHS

# Places of a residual network's parts where it is a plain sequence without the last two.
PLACES = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def backbone_weights(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a residual network that is stored as a sequence: `4.0.conv1.weight` is `layer1.0.conv1.weight`.

    A network under torchvision's names stays as it is. The number of batches that batch norm has seen is left out.
    """
    renamed = {}
    for key, value in theirs.items():
        first, _, rest = key.partition(".")
        if not key.endswith("num_batches_tracked"):
            renamed[f"{PLACES.get(first, first)}.{rest}"] = value
    return renamed


def describe_backbone(weights: Mapping[str, Tensor]) -> dict[str, int | str]:
    """Tell depth, width and norm of a residual network from its weights, as settings of our encoder.

    Args:
        weights: the weights under torchvision's names.

    Returns:
        The settings `depth`, `width` and `norm`.

    Raises:
        ValueError: a network of another depth.
    """
    counts = tuple(
        len({key.split(".")[1] for key in weights if key.startswith(f"layer{number}.")}) for number in range(1, 5)
    )
    kind = (counts, "layer1.0.conv3.weight" in weights)
    depth = next((depth for depth, known in DEPTHS.items() if known == kind), None)
    if depth is None or "conv1.weight" not in weights:
        raise ValueError(
            f"its image encoder is a residual network with {counts} blocks; those with 18, 34 and 50 layers are read"
        )
    norm = "frozen_batch" if "bn1.running_mean" in weights else "group"
    return {"depth": depth, "width": len(weights["conv1.weight"]), "norm": norm}


def camera_weights(
    path: Path, tensors: Mapping[str, Tensor], prefix: str, *, backbone: str, head: str
) -> dict[str, Tensor]:
    """Rename the weights of a camera with keypoints: a residual network, a spatial softmax and a linear layer.

    Args:
        path: the checkpoint, for messages.
        tensors: its weights.
        prefix: the start of the names of this camera's weights.
        backbone: the start of the names of the residual network, after the prefix.
        head: the start of the names of the linear layer, after the prefix.

    Returns:
        The weights of `policy.model.encoders.resnet.Camera`.

    Raises:
        ValueError: the spatial softmax or the linear layer is missing.
    """
    theirs = under(prefix, tensors)
    names = ("pool.nets.weight", f"{head}weight", f"{head}bias")
    if missing := [name for name in names if name not in theirs]:
        raise ValueError(f"{path} lacks the weight {prefix + missing[0]!r} of its image encoder")
    points = under("pool.nets.", theirs)
    temperature = theirs.get("pool.temperature", torch.ones(1))  # of robomimic alone
    # The columns of their linear layer are x, y of each keypoint in turn; ours are all x, then all y.
    columns = theirs[f"{head}weight"]
    return {
        **prefixed("backbone.", backbone_weights(under(backbone, theirs))),
        **prefixed("pool.0.", points),
        "pool.1.sharpness": (1 / temperature).expand(len(points["weight"]), 1).clone(),
        "head.0.weight": torch.cat([columns[:, 0::2], columns[:, 1::2]], dim=1),
        "head.0.bias": theirs[f"{head}bias"],
    }


def image_cut(
    size: tuple[int, ...], resize: tuple[int, int] | None, crop: tuple[int, int] | None
) -> dict[str, tuple[int, int]]:
    """The settings that resize and crop; torchvision rounds the corner of a middle crop to even numbers.

    Args:
        size: height and width of the pictures.
        resize: height and width that they are resized to, if they are.
        crop: height and width of the middle crop, if there is one.
    """
    settings = {} if resize is None else {"resize": resize}
    if crop is not None:
        free = [(whole - part) / 2 for whole, part in zip(resize or size, crop, strict=True)]
        settings |= {"crop": crop, "crop_corner": (round(free[0]), round(free[1]))}
    return settings
