"""The image encoders of other projects under our names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

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


def head_weight(weight: Tensor) -> Tensor:
    """Reorder the columns of a linear layer on keypoints: theirs are x, y of each in turn; ours all x, then all y."""
    return torch.cat([weight[:, 0::2], weight[:, 1::2]], dim=1)
