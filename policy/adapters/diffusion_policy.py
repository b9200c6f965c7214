"""Diffusion policies of real-stanford/diffusion_policy, from the checkpoints that its workspaces save."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policy.adapters.diffusion_policy_encoders import ENCODERS, Encoder, sizing_weight
from policy.adapters.imported import PIXEL, Imported, affine, normalizer_prefix, prefixed, sampling_differences, under
from policy.adapters.schedules import schedule_settings
from policy.adapters.settings import Settings
from policy.adapters.torch_file import plain, read_torch_file
from policy.adapters.transformer_keys import count_layers, transformer_weights
from policy.adapters.unet_keys import LAST_GROUPS, NO_SCALES, unet_weights
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
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The two numbers in "${eval:'8+0'}", the actions that are executed and those that latency takes.
SUM = re.compile(r"\$\{eval:\s*'?\s*(\d{1,6})\s*\+\s*(\d{1,6})\s*'?\s*\}")


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
    obs_horizon, horizon = found.count("n_obs_steps"), found.count("horizon")
    with _reading_shapes(path):
        encoder = ENCODERS[observed](found, state, obs_horizon)
        denoiser, denoiser_weights = DENOISERS[kind](found, network, obs_horizon)
    # The action of the oldest observation comes first; without the convention, that of the one before it.
    past_actions = obs_horizon - 1
    if name == "DiffusionUnetLowdimPolicy" and not found.take("oa_step_convention", bool, False):
        past_actions += 1
    scheduler = found.within("noise_scheduler")
    action_dim = len(sizing_weight(path, network, "final_conv.1.bias" if kind == "unet" else "head.bias"))
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
        found=_described(
            found, encoder, name, weights_name, f"horizon[{past_actions}:{past_actions + executed}] of {horizon}"
        ),
        sampler=_sampler(found),
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
    tensors = {
        key: value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, Tensor) and not value.is_complex()
    }
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
    except (IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path} holds weights of other shapes than diffusion_policy writes ({str(error).partition(chr(10))[0]})"
        ) from error


def _unet(found: Settings, network: dict[str, Tensor], obs_horizon: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of our U-Net; all sizes but the groups follow from the weights."""
    if any(key.startswith("local_cond_encoder.") for key in network):
        raise ValueError(f"{found.path} has a local condition, which cannot be imported")
    levels = len({key.split(".")[1] for key in network if key.startswith("down_modules.")})
    firsts = [
        sizing_weight(found.path, network, f"down_modules.{level}.0.blocks.0.block.0.weight", 3)
        for level in range(levels)
    ]
    timestep_size = sizing_weight(found.path, network, "diffusion_step_encoder.1.weight", 2).shape[1]
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
        "hidden_size": len(sizing_weight(found.path, network, "input_emb.bias")),
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


def _sampler(found: Settings) -> dict[str, Any]:
    """How they sample, as settings of ours."""
    scheduler, own = _scheduler_of(found)
    return {"ddim_steps": own, "spacing": "leading", "eta": 0 if "DDIM" in scheduler else 1}


def _their_shape(shape: tuple[int, ...]) -> list[int]:
    return [shape[-1], *shape[:-1]]


def _described(found: Settings, encoder: Encoder, name: str, weights: str, executed: str) -> dict[str, str]:
    scheduler, own = _scheduler_of(found)
    settings = found.within("noise_scheduler")
    return {
        "class": name,
        "weights": weights,
        "inputs": ", ".join(f"{key} {_their_shape(shape)}" for key, shape in encoder.shapes.items()),
        "scheduler": f"{scheduler}, {settings.take('num_train_timesteps', int, 1000)} timesteps,"
        f" {settings.take('beta_schedule', str, 'linear')}, samples with {own} steps",
        "prediction": _prediction_type(settings),
        "executed": executed,
        "normalisation": "scale and offset of each dimension",
    }


def _sampling(found: Settings) -> list[str]:
    """How they sample, and what we do otherwise."""
    (scheduler, _), settings = _scheduler_of(found), found.within("noise_scheduler")
    told = sampling_differences("diffusion_policy", _sampler(found), scheduler, clips=_clips(settings))
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
        told.append(NO_SCALES)
    return told
