"""Diffusion policies of real-stanford/diffusion_policy, from the checkpoints that its workspaces save."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policy.adapters.imported import Imported, affine, normalizer_prefix, prefixed, under
from policy.adapters.resnet_keys import backbone_weights, describe_backbone, head_weight
from policy.adapters.schedules import schedule_settings
from policy.adapters.settings import MOST_ACTIONS, Settings
from policy.adapters.torch_file import plain, read_torch_file
from policy.adapters.transformer_keys import count_layers, transformer_weights
from policy.adapters.unet_keys import unet_weights
from policy.diffusion.schedule import PREDICTION_TYPES
from policy.model.config import PolicyConfig

# What their policies observe: one vector, pictures through their own encoder, or through robomimic's.
POLICIES = {
    "DiffusionUnetLowdimPolicy": ("unet", "vector"),
    "DiffusionUnetImagePolicy": ("unet", "pictures"),
    "DiffusionUnetHybridImagePolicy": ("unet", "robomimic"),
    "DiffusionTransformerLowdimPolicy": ("transformer", "vector"),
    "DiffusionTransformerHybridImagePolicy": ("transformer", "robomimic"),
}
# The only observation of a policy that observes one vector.
VECTOR = "obs"
# The last convolution has this many groups whatever `n_groups` says.
LAST_GROUPS = 8
# A picture is in [0, 1] there, and in [0, 255] here.
PIXEL = 255.0
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HYBRID_CROP = (76, 76)
# The two numbers in "${eval:'8+0'}", the actions that are executed and those that latency takes.
SUM = re.compile(r"\$\{eval:\s*'?\s*(\d{1,6})\s*\+\s*(\d{1,6})\s*'?\s*\}")


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


def read_diffusion_policy(path: Path, *, average: bool = True) -> Imported:
    """Read a diffusion policy that diffusion_policy saved. Nothing in it is executed.

    Args:
        path: the checkpoint, such as `latest.ckpt`.
        average: whether to take the averaged weights, if there are any.

    Returns:
        The policy in our terms. Observations keep diffusion_policy's names; one vector is called `obs`.

    Raises:
        ValueError: the file is damaged or of another kind, the policy is of another class, or it has a setting that our
            parts do not have; the message says which.
    """
    content = read_torch_file(path)
    found, name = _policy_settings(path, content)
    kind, observed = POLICIES[name]
    _refuse(found, kind)
    weights_name, state = _state(path, content, average)
    network = under("model.", state)
    obs_horizon, horizon = found.count("n_obs_steps"), found.count("horizon", most=MOST_ACTIONS)
    with _reading_shapes(path):
        encoder = ENCODERS[observed](found, state, obs_horizon)
        denoiser, denoiser_weights = DENOISERS[kind](found, network, obs_horizon)
    # The action of the oldest observation comes first; without the convention, that of the one before it.
    past_actions = obs_horizon - 1
    if name == "DiffusionUnetLowdimPolicy" and not found.take("oa_step_convention", bool, False):
        past_actions += 1
    scheduler = found.within("noise_scheduler")
    action_dim = len(_weight(path, network, "final_conv.1.bias" if kind == "unet" else "head.bias"))
    config = PolicyConfig(
        observation_shapes=encoder.shapes,
        action_dim=action_dim,
        obs_horizon=obs_horizon,
        past_actions=past_actions,
        action_horizon=horizon - past_actions,
        obs_size=obs_horizon * encoder.features,
        prediction_type=_prediction_type(scheduler),
        normalizer="affine",
        action_bound=scheduler.take("clip_sample_range", float, 1.0) if _clips(scheduler) else None,
        encoder=encoder.settings,
        denoiser=denoiser,
        schedule=_schedule(scheduler),
    )
    executed, late = _executed(found)
    return Imported(
        project="diffusion_policy",
        config=config,
        weights={
            **_normalizers(path, state, encoder, action_dim),
            **prefixed("encoder.", encoder.weights),
            **prefixed("denoiser.", denoiser_weights),
        },
        execution_horizon=executed,
        found=_described(found, name, weights_name, f"horizon[{past_actions}:{past_actions + executed}] of {horizon}"),
        differences=(*_sampling(found), *_others(encoder, network, late)),
    )


def _policy_settings(path: Path, content: Any) -> tuple[Settings, str]:
    """The policy's settings and its class."""
    if not isinstance(content, dict) or not {"cfg", "state_dicts"} <= content.keys():
        raise ValueError(
            f"{path} is not a checkpoint of a workspace of diffusion_policy, which holds cfg and state_dicts: name its"
            " .ckpt file"
        )
    config = plain(content["cfg"])
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold its configuration as a mapping; got {type(config).__name__}")
    found = Settings(config, path, "cfg.").within("policy")
    name = found.take("_target_", str).rpartition(".")[2]
    if name not in POLICIES:
        raise ValueError(f"{path} holds a {name[:80]!r}; those that can be imported are {', '.join(POLICIES)}")
    return found, name


def _refuse(found: Settings, kind: str) -> None:
    """Reject what our parts cannot hold."""
    if found.take("obs_as_local_cond", bool, False):
        raise ValueError(f"{found.path} has obs_as_local_cond=True: local conditioning cannot be imported")
    # The classes for pictures condition on observations unless they are told not to, the others only if they are.
    name, default = ("obs_as_global_cond" if kind == "unet" else "obs_as_cond"), "shape_meta" in found.data
    if not found.take(name, bool, default):
        raise ValueError(
            f"{found.path} has {name}=False: it paints its observations into the trajectory, and only policies that are"
            " conditioned on them can be imported"
        )
    if found.take("pred_action_steps_only", bool, False):
        raise ValueError(
            f"{found.path} has pred_action_steps_only=True: only policies that predict the whole horizon can be"
            " imported"
        )


def _state(path: Path, content: Mapping[str, Any], average: bool) -> tuple[str, dict[str, Tensor]]:
    """Which weights are taken, for people, and all tensors of the policy."""
    states = content["state_dicts"]
    given = [name for name in ("ema_model", "model") if isinstance(states, dict) and name in states]
    if not average:
        given = [name for name in given if name == "model"]
    if not given:
        held = sorted(map(str, states)) if isinstance(states, dict) else type(states).__name__
        raise ValueError(f"{path} holds no {'weights' if average else 'plain weights'}; its state_dicts are {held}")
    state = plain(states[given[0]])
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold its weights as a mapping; got {type(state).__name__}")
    tensors = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    for key, value in tensors.items():
        # The mask of causal attention is infinite.
        if value.is_floating_point() and not key.endswith("mask") and not value.isfinite().all():
            raise ValueError(f"{path} holds a NaN or an infinity in {key[:80]!r}")
    words = {"ema_model": "averaged (ema_model)", "model": "plain (model)"}
    return words[given[0]], {
        key: value.float() if value.is_floating_point() else value for key, value in tensors.items()
    }


@contextmanager
def _reading_shapes(path: Path) -> Iterator[None]:
    """Say in one sentence that a weight has another number of dimensions than the code that takes it apart expects."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"{path} holds weights of other shapes than diffusion_policy writes ({str(error).partition(chr(10))[0]})"
        ) from error


def _weight(path: Path, weights: Mapping[str, Tensor], key: str, dimensions: int = 1) -> Tensor:
    """A weight from whose shape a size follows."""
    value = weights.get(key)
    if value is None or value.ndim < dimensions:
        raise ValueError(f"{path} lacks the weight {key!r} of its network")
    return value


def _unet(found: Settings, network: dict[str, Tensor], obs_horizon: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of our U-Net; all sizes but the groups follow from the weights."""
    if any(key.startswith("local_cond_encoder.") for key in network):
        raise ValueError(f"{found.path} has a local condition, which cannot be imported")
    levels = len({key.split(".")[1] for key in network if key.startswith("down_modules.")})
    firsts = [
        _weight(found.path, network, f"down_modules.{level}.0.blocks.0.block.0.weight", 3) for level in range(levels)
    ]
    timestep_size = _weight(found.path, network, "diffusion_step_encoder.1.weight", 2).shape[1]
    settings = _network_settings(found)
    denoiser = {
        "name": "unet",
        "widths": [len(first) for first in firsts],
        "kernel_size": firsts[0].shape[2] if firsts else 1,
        "groups": settings.take("n_groups", int, 8),
        "last_groups": LAST_GROUPS,
        "timestep_size": timestep_size,
        "endpoint": True,
    }
    return denoiser, unet_weights(network, timestep_size=timestep_size, scales=_scales(network))


def _scales(network: Mapping[str, Tensor]) -> bool:
    """Whether the blocks of a U-Net have a scale besides the shift."""
    condition, norm = (network.get(f"mid_modules.0.{key}") for key in ("cond_encoder.1.bias", "blocks.0.block.1.bias"))
    return condition is None or norm is None or condition.shape[:1] == (2 * norm.numel(),)


def _transformer(
    found: Settings, network: dict[str, Tensor], obs_horizon: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of our encoder-decoder."""
    settings = _network_settings(found)
    if not settings.take("time_as_cond", bool, True):
        raise ValueError(
            f"{found.path} has time_as_cond=False: of the transformers, only those with a decoder can be imported"
        )
    in_class = "shape_meta" in found.data
    denoiser = {
        "name": "encoder_decoder",
        "hidden_size": len(_weight(found.path, network, "input_emb.bias")),
        "num_layers": count_layers(network, "decoder"),
        "num_heads": settings.take("n_head", int, 4 if in_class else 12),
        "obs_tokens": obs_horizon,
        "encoder_layers": count_layers(network, "encoder"),
        "causal": "mask" in network,
        "dropout": float(settings.take("p_drop_attn", float, 0.3 if in_class else 0.1)),
    }
    return denoiser, transformer_weights(network, obs_tokens=obs_horizon)


DENOISERS = {"unet": _unet, "transformer": _transformer}


def _network_settings(found: Settings) -> Settings:
    """The network's own settings, which the classes for pictures have among their own."""
    return found if "shape_meta" in found.data else found.within("model")


def _vector(found: Settings, state: Mapping[str, Tensor], obs_horizon: int) -> Encoder:
    network = under("model.", state)
    if "cond_obs_emb.weight" in network:
        size = _weight(found.path, network, "cond_obs_emb.weight", 2).shape[1]
    else:
        whole = _weight(found.path, network, "mid_modules.0.cond_encoder.1.weight", 2).shape[1]
        size = (whole - _weight(found.path, network, "diffusion_step_encoder.1.weight", 2).shape[1]) // obs_horizon
    return Encoder({VECTOR: (size,)}, size, {"name": "concatenate", "order": [VECTOR]}, {})


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
        vectors = sum(shape[0] for shape in shapes.values())
        return Encoder({key: shapes[key] for key in order}, vectors, {"name": "concatenate", "order": order}, {})
    shared = settings.take("share_rgb_model", bool, False)
    weights: dict[str, Tensor] = {}
    for number, key in enumerate(["rgb"] if shared else pictures):
        backbone = backbone_weights(under(f"obs_encoder.key_model_map.{key}.", state))
        weights |= prefixed(f"cameras.{number}.backbone.", backbone)
    # Without random_crop they do not crop at all.
    crop = _pair_of_all(settings, "crop_shape") if settings.take("random_crop", bool, True) else None
    size = _weight(found.path, weights, "cameras.0.backbone.conv1.weight", 4)
    features = len(size) * (32 if "cameras.0.backbone.layer1.0.conv3.weight" in weights else 8)
    return Encoder(
        {key: shapes[key] for key in order},
        _features(shapes, features),
        {
            "name": "resnet",
            "order": order,
            "shared": shared,
            "pooling": "average",
            **describe_backbone(under("cameras.0.backbone.", weights)),
            **_cut(shapes[pictures[0]], _pair_of_all(settings, "resize_shape"), crop),
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
        vectors = sum(shape[0] for shape in shapes.values())
        return Encoder(shapes, vectors, {"name": "concatenate", "order": order}, {})
    crop = found.pair("crop_shape", HYBRID_CROP)
    if crop and not found.take("eval_fixed_crop", bool, False):
        raise ValueError(
            f"{found.path} has eval_fixed_crop=False: it acts on random crops, which cannot be imported; train it with"
            " eval_fixed_crop=True, or set crop_shape to null"
        )
    weights: dict[str, Tensor] = {}
    for number, key in enumerate(pictures):
        camera = _camera(found.path, key, under(f"obs_encoder.obs_nets.{key}.", state))
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
            **_cut(shapes[pictures[0]], None, crop),
        },
        weights,
    )


def _camera(path: Path, key: str, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a camera: residual network, spatial softmax and linear layer."""
    if missing := {"pool.nets.weight", "nets.3.weight", "nets.3.bias"} - theirs.keys():
        raise ValueError(f"{path} lacks {sorted(missing)[0]!r} of the encoder of {key!r}")
    points = prefixed("pool.0.", under("pool.nets.", theirs))
    temperature = theirs.get("pool.temperature", torch.ones(1))
    return {
        **prefixed("backbone.", backbone_weights(under("backbone.nets.", theirs))),
        **points,
        "pool.1.sharpness": (1 / temperature).expand(len(points["pool.0.weight"]), 1).clone(),
        "head.0.weight": head_weight(theirs["nets.3.weight"]),
        "head.0.bias": theirs["nets.3.bias"],
    }


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
        if len(shape) != rank or not all(type(size) is int and size > 0 for size in shape):
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


def _cut(
    shape: tuple[int, ...], resize: tuple[int, int] | None, crop: tuple[int, int] | None
) -> dict[str, tuple[int, int]]:
    """The settings that resize and crop; torchvision rounds the corner of a middle crop to even numbers."""
    settings = {} if resize is None else {"resize": resize}
    if crop is not None:
        free = [(whole - part) / 2 for whole, part in zip(resize or shape[:2], crop, strict=True)]
        settings |= {"crop": crop, "crop_corner": (round(free[0]), round(free[1]))}
    return settings


def _normalizers(path: Path, state: Mapping[str, Tensor], encoder: Encoder, action_dim: int) -> dict[str, Tensor]:
    """The buffers of all normalisers; theirs is x * scale + offset."""
    ours: dict[str, Tensor] = {}
    for key, shape in {**encoder.shapes, "action": (action_dim,)}.items():
        scale, offset = (state.get(f"normalizer.params_dict.{key}.{name}") for name in ("scale", "offset"))
        if scale is None or offset is None:
            raise ValueError(
                f"{path} lacks the normaliser of {key!r}, without which its actions mean nothing: it is set from the"
                " dataset when their training starts (set_normalizer)"
            )
        if any(value.numel() not in (1, shape[-1]) for value in (scale, offset)) or not scale.all():
            raise ValueError(
                f"{path} has {scale.numel()} numbers in the normaliser of {key!r}; it should have 1 or {shape[-1]}, and"
                " none of its scales may be 0"
            )
        gain, shift = (value.double().flatten().expand(shape[-1]) for value in (scale, offset))
        if len(shape) == 3:
            if encoder.imagenet and shape[2] == 3:
                mean, std = (torch.tensor(numbers).double() for numbers in (IMAGENET_MEAN, IMAGENET_STD))
                gain, shift = gain / std, (shift - mean) / std
            gain = gain / PIXEL
        prefix = "action_normalizer." if key == "action" else normalizer_prefix(key)
        ours |= prefixed(prefix, affine(torch.zeros_like(gain), gain, shift))
    return ours


def _prediction_type(scheduler: Settings) -> str:
    name = scheduler.take("prediction_type", str, "epsilon")
    if name not in PREDICTION_TYPES:
        raise ValueError(
            f"{scheduler.path} has prediction_type={name[:80]!r}; {', '.join(PREDICTION_TYPES)} can be imported"
        )
    return name


def _clips(scheduler: Settings) -> bool:
    return scheduler.take("clip_sample", bool, True)


def _schedule(scheduler: Settings) -> dict[str, Any]:
    """The settings of our schedule; the defaults are those of diffusers."""
    for name in ("thresholding", "rescale_betas_zero_snr", "trained_betas"):
        if scheduler.data.get(name):
            raise ValueError(f"{scheduler.path} has a noise scheduler with {name}, which cannot be imported")
    return schedule_settings(
        scheduler.path,
        scheduler.take("beta_schedule", str, "linear"),
        scheduler.take("num_train_timesteps", int, 1000),
        scheduler.take("beta_start", float, 0.0001),
        scheduler.take("beta_end", float, 0.02),
    )


def _executed(found: Settings) -> tuple[int, int]:
    """The number of actions that are given out, and how many of them latency takes."""
    value = found.data.get("n_action_steps")
    if isinstance(value, str) and (match := SUM.fullmatch(value)):
        return int(match[1]) + int(match[2]), int(match[2])
    return found.take("n_action_steps", int), 0


def _scheduler_of(found: Settings) -> tuple[str, int]:
    """The class of the scheduler, and the number of steps that it samples with."""
    scheduler = found.within("noise_scheduler")
    steps = found.data.get("num_inference_steps")
    own = scheduler.take("num_train_timesteps", int, 1000) if steps is None else found.take("num_inference_steps", int)
    return scheduler.take("_target_", str, "DDPMScheduler").rpartition(".")[2], own


def _described(found: Settings, name: str, weights: str, executed: str) -> dict[str, str]:
    scheduler, own = _scheduler_of(found)
    settings = found.within("noise_scheduler")
    inputs = {VECTOR: ""}
    if "shape_meta" in found.data:
        observed = found.within("shape_meta").within("obs")
        inputs = {key: str(observed.within(key).data["shape"]) for key in observed.data}
    return {
        "class": name,
        "weights": weights,
        "inputs": ", ".join(f"{key} {shape}".strip() for key, shape in inputs.items()),
        "scheduler": f"{scheduler}, {settings.take('num_train_timesteps', int, 1000)} timesteps,"
        f" {settings.take('beta_schedule', str, 'linear')}, samples with {own} steps",
        "prediction": _prediction_type(settings),
        "executed": executed,
        "normalisation": "scale and offset of each dimension",
    }


def _sampling(found: Settings) -> list[str]:
    """How they sample, and what we do otherwise."""
    (scheduler, own), settings = _scheduler_of(found), found.within("noise_scheduler")
    eta = "" if "DDIM" in scheduler else " sampler.eta=1"
    told = [
        f"diffusion_policy samples with {own} steps of {scheduler} at leading timesteps, which is ddim_steps={own}"
        f" sampler.spacing=leading{eta} here; our default is DDIM at trailing timesteps"
    ]
    if _clips(settings):
        told.append(
            "we derive the noise again after clipping; diffusion_policy does not, so DDIM samples differ where it clips"
        )
    else:
        told.append("the actions have no bound, so that sampler.clip has no effect")
    if (variance := settings.take("variance_type", str, "fixed_small")) != "fixed_small":
        told.append(f"its DDPM adds noise of variance {variance}; ours is that of fixed_small")
    if not settings.take("set_alpha_to_one", bool, True) or settings.take("steps_offset", int, 0):
        told.append("its DDIM ends at the noise level of the first timestep; ours ends without noise")
    return told


def _others(encoder: Encoder, network: Mapping[str, Tensor], late: int) -> list[str]:
    told = []
    if late:
        told.append(f"its environments drop the first {late} of the executed actions, to simulate latency")
    if "resize" in encoder.settings:
        told.append(
            "pictures are resized with antialiasing, as torchvision has done since 0.17; older ones shrank without it"
        )
    if not _scales(network):
        told.append("its blocks have no scale; ours have one, which is 0 and would be trained")
    return told
