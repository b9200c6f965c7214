"""The encoders of diffusion_policy's policies, in our terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from policy.adapters.imported import prefixed, under
from policy.adapters.resnet_keys import backbone_weights, camera_weights, describe_backbone, image_cut
from policy.adapters.settings import Settings, is_size

# The only observation of a policy that observes one vector.
VECTOR = "obs"
HYBRID_CROP = (76, 76)


@dataclass(frozen=True)
class Encoder:
    """How a policy embeds its observations.

    Attributes:
        shapes: shape of each observation, in our order of the axes.
        features: number of features of one step.
        settings: the settings of our encoder.
        weights: its weights.
        imagenet: whether pictures are normalised by ImageNet's statistics too.
    """

    shapes: dict[str, tuple[int, ...]]
    features: int
    settings: dict[str, Any]
    weights: dict[str, Tensor]
    imagenet: bool = False


def sizing_weight(path: Path, weights: Mapping[str, Tensor], key: str, dimensions: int = 1) -> Tensor:
    """A weight from whose shape a size follows."""
    value = weights.get(key)
    if value is None or value.ndim < dimensions:
        raise ValueError(f"{path} lacks the weight {key!r} of its network")
    return value


def _vector(found: Settings, state: Mapping[str, Tensor], obs_horizon: int) -> Encoder:
    network = under("model.", state)
    if "cond_obs_emb.weight" in network:
        size = sizing_weight(found.path, network, "cond_obs_emb.weight", 2).shape[1]
    else:
        condition = sizing_weight(found.path, network, "mid_modules.0.cond_encoder.1.weight", 2).shape[1]
        timestep = sizing_weight(found.path, network, "diffusion_step_encoder.1.weight", 2).shape[1]
        size = (condition - timestep) // obs_horizon
    return _vectors({VECTOR: (size,)})


def _vectors(shapes: dict[str, tuple[int, ...]]) -> Encoder:
    """The encoder of vectors alone, in the order of their shapes."""
    features = sum(shape[0] for shape in shapes.values())
    return Encoder(shapes, features, {"name": "concatenate", "order": list(shapes)}, {})


def _pictures(found: Settings, state: Mapping[str, Tensor], obs_horizon: int) -> Encoder:
    """The encoder of diffusion_policy: pictures in the order of their names, and then vectors."""
    settings = found.within("obs_encoder")
    name = settings.take("_target_", str).rpartition(".")[2]
    if name != "MultiImageObsEncoder":
        raise ValueError(f"{found.path} has the encoder {name[:80]!r}; MultiImageObsEncoder can be imported")
    shapes = _shapes(found)
    pictures = sorted(key for key, shape in shapes.items() if len(shape) == 3)
    order = pictures + sorted(shapes.keys() - set(pictures))
    if not pictures:
        return _vectors({key: shapes[key] for key in order})
    shared = settings.take("share_rgb_model", bool, False)
    weights: dict[str, Tensor] = {}
    for number, key in enumerate(["rgb"] if shared else pictures):
        backbone = backbone_weights(under(f"obs_encoder.key_model_map.{key}.", state))
        weights |= prefixed(f"cameras.{number}.backbone.", backbone)
    # Without random_crop they do not crop at all.
    crop = _pair_of_all(settings, "crop_shape") if settings.take("random_crop", bool, True) else None
    width = len(sizing_weight(found.path, weights, "cameras.0.backbone.conv1.weight", 4))
    # The last layer has eight times as many feature maps as the first one, and a bottleneck four times as many.
    features = width * (32 if "cameras.0.backbone.layer1.0.conv3.weight" in weights else 8)
    return Encoder(
        {key: shapes[key] for key in order},
        _features(shapes, features),
        {
            "name": "resnet",
            "order": order,
            "shared": shared,
            "pooling": "average",
            **describe_backbone(under("cameras.0.backbone.", weights)),
            **image_cut(shapes[pictures[0]][:2], _pair_of_all(settings, "resize_shape"), crop),
        },
        weights,
        settings.take("imagenet_norm", bool, False),
    )


def _robomimic(found: Settings, state: Mapping[str, Tensor], obs_horizon: int) -> Encoder:
    """The encoder of robomimic: observations in the order of the configuration."""
    shapes = _shapes(found)
    order = list(shapes)
    pictures = [key for key, shape in shapes.items() if len(shape) == 3]
    if not pictures:
        return _vectors(shapes)
    crop = found.pair("crop_shape", HYBRID_CROP)
    if crop and not found.take("eval_fixed_crop", bool, False):
        raise ValueError(
            f"{found.path} has eval_fixed_crop=False: it acts on random crops, which cannot be imported; train it with"
            " eval_fixed_crop=True, or set crop_shape to null"
        )
    weights: dict[str, Tensor] = {}
    for number, key in enumerate(pictures):
        prefix = f"obs_encoder.obs_nets.{key}."
        camera = camera_weights(found.path, state, prefix, backbone="backbone.nets.", head="nets.3.")
        weights |= prefixed(f"cameras.{number}.", camera)
    keypoints = len(weights["cameras.0.pool.0.weight"])
    return Encoder(
        shapes,
        _features(shapes, 2 * keypoints),
        {
            "name": "resnet",
            "order": order,
            "keypoints": keypoints,
            **describe_backbone(under("cameras.0.backbone.", weights)),
            **image_cut(shapes[pictures[0]][:2], None, crop),
        },
        weights,
    )


ENCODERS: dict[str, Callable[[Settings, Mapping[str, Tensor], int], Encoder]] = {
    "vector": _vector,
    "pictures": _pictures,
    "robomimic": _robomimic,
}


def _shapes(found: Settings) -> dict[str, tuple[int, ...]]:
    """The shape of each observation in our order of the axes."""
    observed = found.within("shape_meta").within("obs")
    shapes = {}
    for key in observed.data:
        feature = observed.within(key)
        shape, kind = feature.take("shape", list), feature.take("type", str, "low_dim")
        rank = {"rgb": 3, "low_dim": 1}.get(kind)
        if len(shape) != rank or not all(map(is_size, shape)):
            raise ValueError(
                f"{found.path} observes {key!r} of type {kind[:80]!r} with shape {str(shape)[:80]}; pictures (type rgb)"
                " of three sizes and vectors (type low_dim) of one can be imported"
            )
        shapes[key] = (*shape[1:], shape[0]) if rank == 3 else tuple(shape)
    return shapes


def _features(shapes: Mapping[str, tuple[int, ...]], of_picture: int) -> int:
    return sum(of_picture if len(shape) == 3 else shape[0] for shape in shapes.values())


def _pair_of_all(settings: Settings, name: str) -> tuple[int, int] | None:
    """A height and a width, which may be given for each picture as long as they are the same."""
    each = settings.data.get(name)
    if not isinstance(each, dict):
        return settings.pair(name)
    pairs = {settings.within(name).pair(key) for key in each}
    if len(pairs) != 1:
        raise ValueError(f"{settings.path} has several values of {name}; one for all pictures can be imported")
    return pairs.pop()
