"""Write small checkpoints of diffusion_policy, and what its own code computes with them, as reference files.

It runs in an environment of its own that can import diffusion_policy, not in ours: torch, torchvision, diffusers, dill,
omegaconf, hydra-core, einops, zarr<3, six, h5py, tensorboardX, matplotlib, and robomimic 0.2 without its dependencies.
The networks are trained for a few steps on random data, so that averaged and plain weights differ:

    python scripts/bench/diffusion_policy_reference.py CHECKOUT OUTPUT [VARIANT ...]

For each variant, OUTPUT/VARIANT gets `latest.ckpt`, written by diffusion_policy's own workspace, and `reference.npz`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import hydra
import numpy as np
import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from omegaconf import OmegaConf
from torch import Tensor
from torchvision.models.resnet import BasicBlock, ResNet

ROWS = 4
OBSERVATIONS = 20
STEPS = (1, 2, 4, 8, 10)
ROLLOUT_STEPS = 8
TIMESTEPS = (0, 1, 50, 99)
POLICY, MODEL = "diffusion_policy.policy", "diffusion_policy.model"
UNET: dict[str, Any] = {"diffusion_step_embed_dim": 32, "down_dims": [16, 32], "kernel_size": 3, "n_groups": 8}
TINY_UNET = {**UNET, "diffusion_step_embed_dim": 16, "down_dims": [16, 16], "n_groups": 4}
TRANSFORMER: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_emb": 24, "p_drop_emb": 0.1, "p_drop_attn": 0.1}
STATE = {"agent_pos": {"shape": [2], "type": "low_dim"}, "a_speed": {"shape": [3], "type": "low_dim"}}
CAMERAS = {key: {"shape": [3, 40, 46], "type": "rgb"} for key in ("wrist", "front")}
SMALL_CAMERAS = {key: {"shape": [3, 26, 29], "type": "rgb"} for key in CAMERAS}


class NarrowResNet(ResNet):
    """ResNet18 of another width than 64 feature maps in the first layer."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.conv1 = torch.nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.fc = torch.nn.Identity()

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> Any:
        if planes == 64:
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)


def low_dim(name: str, model: dict[str, Any], *, n_obs: int = 2, horizon: int = 16, **settings: Any) -> dict[str, Any]:
    """A configuration in diffusion_policy's layout for a policy that observes one vector."""
    return {
        **{"obs_dim": 5, "action_dim": 2, "horizon": horizon, "n_obs_steps": n_obs, "n_action_steps": 8},
        "n_latency_steps": 0,
        "policy": {
            "_target_": f"{POLICY}.{name}",
            "model": {"input_dim": "${eval:'${action_dim}'}", **model},
            **{key: f"${{{key}}}" for key in ("obs_dim", "action_dim", "horizon", "n_obs_steps")},
            **settings,
        },
    }


def images(name: str, observations: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A configuration in diffusion_policy's layout for a policy that observes pictures."""
    return {
        "shape_meta": {"obs": observations, "action": {"shape": [2]}},
        **{"horizon": 16, "n_obs_steps": 2, "n_action_steps": 8, "n_latency_steps": 0},
        "policy": {
            "_target_": f"{POLICY}.{name}",
            **{key: f"${{{key}}}" for key in ("shape_meta", "horizon", "n_obs_steps")},
            **settings,
        },
    }


def multi_image(width: int, **settings: Any) -> dict[str, Any]:
    """The configuration of the encoder of several pictures."""
    return {
        "_target_": f"{MODEL}.vision.multi_image_obs_encoder.MultiImageObsEncoder",
        "shape_meta": "${shape_meta}",
        "rgb_model": {"_target_": f"{__name__}.NarrowResNet", "width": width},
        **settings,
    }


UNET_LOW_DIM = "diffusion_unet_lowdim_policy.DiffusionUnetLowdimPolicy"
UNET_IMAGE = "diffusion_unet_image_policy.DiffusionUnetImagePolicy"
UNET_HYBRID = "diffusion_unet_hybrid_image_policy.DiffusionUnetHybridImagePolicy"
TRANSFORMER_LOW_DIM = "diffusion_transformer_lowdim_policy.DiffusionTransformerLowdimPolicy"
TRANSFORMER_HYBRID = "diffusion_transformer_hybrid_image_policy.DiffusionTransformerHybridImagePolicy"


def unet_model(**settings: Any) -> dict[str, Any]:
    """The configuration of a U-Net for a policy that observes one vector."""
    target = f"{MODEL}.diffusion.conditional_unet1d.ConditionalUnet1D"
    return {"_target_": target, "global_cond_dim": "${eval:'${obs_dim}*${n_obs_steps}'}", **settings}


def transformer_model(**settings: Any) -> dict[str, Any]:
    """The configuration of a transformer for a policy that observes one vector."""
    target = f"{MODEL}.diffusion.transformer_for_diffusion.TransformerForDiffusion"
    sizes = {"output_dim": "${policy.model.input_dim}", "horizon": "${horizon}", "n_obs_steps": "${n_obs_steps}"}
    return {"_target_": target, **sizes, "cond_dim": "${eval:'${obs_dim}'}", **TRANSFORMER, **settings}


# Each variant: its configuration, and settings of the scheduler.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # The action for the newest observation is one place later, plain weights only, no scales, mean and deviation.
    "lowdim_odd": (
        low_dim(
            UNET_LOW_DIM,
            unet_model(**TINY_UNET, cond_predict_scale=False),
            n_obs=3,
            obs_as_global_cond=True,
            oa_step_convention=False,
        ),
        {"prediction_type": "sample", "clip_sample": False},
    ),
    "lowdim_transformer": (
        low_dim(TRANSFORMER_LOW_DIM, transformer_model(causal_attn=True), horizon=10, obs_as_cond=True),
        {},
    ),
    "lowdim_transformer_layers": (
        low_dim(TRANSFORMER_LOW_DIM, transformer_model(n_cond_layers=2, n_emb=32), n_obs=3, obs_as_cond=True),
        {"prediction_type": "sample", "clip_sample": False},
    ),
    "image_shared": (
        images(
            UNET_IMAGE,
            {**STATE, **SMALL_CAMERAS},
            **{**TINY_UNET, "down_dims": [8, 8]},
            obs_encoder=multi_image(2, share_rgb_model=True, imagenet_norm=True, crop_shape=[21, 24]),
        ),
        {},
    ),
    "image_separate": (
        images(
            UNET_IMAGE,
            {**CAMERAS, **STATE},
            **UNET,
            obs_encoder=multi_image(16, use_group_norm=True, resize_shape=[50, 60], crop_shape=[45, 48]),
        ),
        {},
    ),
    "image_fixed_size": (
        images(
            UNET_IMAGE,
            {**CAMERAS, **STATE},
            **UNET,
            obs_encoder=multi_image(
                16, resize_shape=[36, 40], crop_shape=[20, 20], random_crop=False, imagenet_norm=True
            ),
        ),
        {"prediction_type": "sample"},
    ),
    "hybrid": (
        images(
            UNET_HYBRID,
            {**STATE, **CAMERAS},
            **UNET,
            crop_shape=[35, 36],
            obs_encoder_group_norm=True,
            eval_fixed_crop=True,
        ),
        {},
    ),
    "hybrid_transformer": (
        images(
            TRANSFORMER_HYBRID,
            {"front": CAMERAS["front"], **STATE},
            **TRANSFORMER,
            crop_shape=[36, 40],
            obs_encoder_group_norm=False,
            eval_fixed_crop=True,
        ),
        {},
    ),
}
# These have no averaged weights, as with training.use_ema=False, and no optimizer: small files.
PLAIN = ("lowdim_odd", "image_shared")
SMALL = (*PLAIN, "lowdim_transformer")
SCHEDULER = {
    "_target_": "diffusers.schedulers.scheduling_ddpm.DDPMScheduler",
    "num_train_timesteps": 100,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
}


def configuration(name: str) -> Any:
    """The whole configuration of a variant."""
    config, scheduler = copy.deepcopy(VARIANTS[name])
    workspace = "diffusion_policy.workspace.train_diffusion_workspace.TrainDiffusionWorkspace"
    config = {"name": name, "_target_": workspace, **config}
    config["policy"] |= {
        "noise_scheduler": {**SCHEDULER, **scheduler},
        "n_action_steps": "${eval:'${n_action_steps}+${n_latency_steps}'}",
        "num_inference_steps": 100,
    }
    return OmegaConf.create(config)


def random_observations(config: Any, *lead: int) -> dict[str, Tensor]:
    """Observations (*lead, ...) in the data's units; pictures are uint8 (H, W, C)."""
    if "shape_meta" not in config:
        return {"obs": 3 * torch.randn(*lead, config.obs_dim) + torch.arange(config.obs_dim)}
    given = {}
    for key, value in config.shape_meta.obs.items():
        shape = tuple(value.shape)
        if value.type == "rgb":
            given[key] = torch.randint(0, 256, (*lead, *shape[1:], shape[0]), dtype=torch.uint8)
        else:
            given[key] = 3 * torch.randn(*lead, *shape) + 1
    return given


def theirs(observations: dict[str, Tensor]) -> dict[str, Tensor]:
    """Observations as diffusion_policy takes them: pictures in [0, 1], channels first."""
    return {
        key: value.movedim(-1, -3).float() / 255 if value.dtype == torch.uint8 else value
        for key, value in observations.items()
    }


def fitted_normalizer(config: Any, batch: dict[str, Any]) -> Any:
    """A normaliser as diffusion_policy's datasets fit it."""
    from diffusion_policy.common.normalize_util import get_image_range_normalizer
    from diffusion_policy.model.common.normalizer import LinearNormalizer

    normalizer = LinearNormalizer()
    vectors = {key: value for key, value in batch["obs"].items() if value.dtype != torch.uint8}
    mode = "gaussian" if config.name == "lowdim_odd" else "limits"
    normalizer.fit({**vectors, "action": batch["action"]}, last_n_dims=1, mode=mode)
    for key in batch["obs"].keys() - vectors.keys():
        normalizer[key] = get_image_range_normalizer()
    return normalizer


def trained_workspace(config: Any, steps: int) -> Any:
    """Train for some steps on random data; returns diffusion_policy's workspace with all weights."""
    from diffusion_policy.model.diffusion.ema_model import EMAModel
    from diffusion_policy.workspace.base_workspace import BaseWorkspace

    class Workspace(BaseWorkspace):
        include_keys = ("global_step", "epoch")

    workspace = Workspace(config, output_dir=".")
    workspace.model = hydra.utils.instantiate(config.policy)
    batch: dict[str, Any] = {
        "obs": random_observations(config, 32, config.horizon),
        "action": torch.randn(32, config.horizon, 2),
    }
    workspace.model.set_normalizer(fitted_normalizer(config, batch))
    data = {"obs": theirs(batch["obs"]), "action": batch["action"]}
    data = data if "shape_meta" in config else {"obs": data["obs"]["obs"], "action": data["action"]}
    workspace.ema_model = copy.deepcopy(workspace.model)
    workspace.global_step, workspace.epoch = steps, 1
    average = EMAModel(workspace.ema_model)
    trained = [parameter for parameter in workspace.model.parameters() if parameter.requires_grad]
    workspace.optimizer = torch.optim.AdamW(trained, lr=1e-3)
    workspace.model.train()
    for _ in range(steps):
        workspace.optimizer.zero_grad()
        workspace.model.compute_loss(data).backward()
        workspace.optimizer.step()
        average.step(workspace.model)
    if config.name in PLAIN:
        del workspace.ema_model
    return workspace


@contextlib.contextmanager
def given_noise(noise: Tensor, step_noise: Tensor | None) -> Iterator[None]:
    """Let the policy start from this noise, and DDPM add that noise at its steps."""
    added = [] if step_noise is None else list(step_noise)
    with (
        mock.patch.object(torch, "randn", return_value=noise.clone()),
        mock.patch.object(scheduling_ddpm, "randn_tensor", side_effect=added),
    ):
        yield


class Reference:
    """What diffusion_policy computes with one policy."""

    def __init__(self, config: Any, policy: Any) -> None:
        self.config, self.policy = config, policy.eval()
        self.trained_with = policy.noise_scheduler.config
        self.sampled: list[Tensor] = []
        conditional_sample = policy.conditional_sample

        def kept(*args: Any, **kwargs: Any) -> Tensor:
            self.sampled.append(conditional_sample(*args, **kwargs))
            return self.sampled[-1]

        policy.conditional_sample = kept

    def predict(self, observations: dict[str, Tensor], noise: Tensor, step_noise: Tensor | None = None) -> Any:
        """The policy's own `predict_action`, and the raw sample in it."""
        with given_noise(noise, step_noise):
            result = self.policy.predict_action(theirs(observations))
        return {**result, "normalized": self.sampled[-1]}

    def use(self, kind: Any, steps: int, rederived: bool = False, **settings: Any) -> None:
        """Choose the scheduler."""
        options = {key: value for key, value in self.trained_with.items() if not key.startswith("_")}
        self.policy.noise_scheduler = kind.from_config({**options, **settings})
        self.policy.num_inference_steps = steps
        self.policy.kwargs = {"use_clipped_model_output": True} if rederived else {}

    def condition(self, observations: dict[str, Tensor]) -> Tensor:
        """The condition of the network, (B, n_obs * width)."""
        policy, given = self.policy, theirs(observations)
        if "shape_meta" not in self.config:
            return policy.normalizer["obs"].normalize(given["obs"]).flatten(1)
        normalized = policy.normalizer.normalize(given)
        features = policy.obs_encoder({key: value.flatten(0, 1) for key, value in normalized.items()})
        return features.reshape(len(next(iter(given.values()))), -1)

    def network(self, noise: Tensor, timestep: int, condition: Tensor) -> Tensor:
        """The network's output."""
        if hasattr(self.policy.model, "cond_obs_emb"):
            tokens = condition.unflatten(1, (self.config.n_obs_steps, -1))
            return self.policy.model(noise, torch.tensor(timestep), tokens)
        return self.policy.model(noise, torch.tensor(timestep), global_cond=condition)

    def samplers(self, observations: dict[str, Tensor], noise: Tensor) -> Iterator[tuple[str, Any]]:
        """What each sampler gives, by the names of the reference file."""
        runs: list[tuple[str, Any, int, dict[str, Any]]] = [(f"ddim{k}", DDIMScheduler, k, {}) for k in STEPS]
        runs += [(f"ddpm{k}", DDPMScheduler, k, {}) for k in (10, 100)]
        runs += [(f"rederived{k}", DDIMScheduler, k, {"rederived": True}) for k in STEPS]
        trailing = {"rederived": True, "timestep_spacing": "trailing"}
        runs += [(f"rederived_trailing{k}", DDIMScheduler, k, trailing) for k in STEPS]
        for name, kind, steps, settings in runs:
            self.use(kind, steps, **settings)
            added = torch.randn(steps, *noise.shape) if kind is DDPMScheduler else None
            result = self.predict(observations, noise, added)
            yield f"{name}/normalized", result["normalized"]
            yield f"{name}/timesteps", self.policy.noise_scheduler.timesteps
            if added is not None:
                yield f"{name}/step_noise", added
            if "rederived" not in name:
                yield f"{name}/horizon", result["action_pred"]
                yield f"{name}/executed", result["action"]

    def rollout(self) -> Iterator[tuple[str, Any]]:
        """Twenty control steps with DDIM 8; the first observation is repeated before it."""
        config = self.config
        given = random_observations(config, OBSERVATIONS)
        noise = torch.randn(-(-OBSERVATIONS // config.n_action_steps), 1, config.horizon, 2)
        self.use(DDIMScheduler, ROLLOUT_STEPS)
        actions: list[Tensor] = []
        for plan, start in enumerate(range(0, OBSERVATIONS, config.n_action_steps)):
            places = [max(start + place, 0) for place in range(1 - config.n_obs_steps, 1)]
            history = {key: value[places][None] for key, value in given.items()}
            actions += self.predict(history, noise[plan])["action"][0]
        yield from ((f"rollout/observation/{key}", value) for key, value in given.items())
        yield "rollout/noise", noise
        yield "rollout/actions", torch.stack(actions[:OBSERVATIONS])

    def everything(self) -> Iterator[tuple[str, Any]]:
        """All arrays of the reference file."""
        observations = random_observations(self.config, ROWS, self.config.n_obs_steps)
        noise = torch.randn(ROWS, self.config.horizon, 2)
        condition = self.condition(observations)
        yield from ((f"observation/{key}", value) for key, value in observations.items())
        yield "noise", noise
        yield "global_cond", condition
        yield from ((f"unet/t{t}", self.network(noise, t, condition)) for t in TIMESTEPS)
        yield from self.samplers(observations, noise)
        yield from self.rollout()


def write(name: str, folder: Path) -> None:
    """Write one variant."""
    torch.manual_seed(0)
    config = configuration(name)
    workspace = trained_workspace(config, steps=200 if "lowdim" in name else 12)
    folder.mkdir(parents=True, exist_ok=True)
    left_out = ("optimizer",) if name in SMALL else ()
    workspace.save_checkpoint(folder / "latest.ckpt", exclude_keys=left_out, use_thread=False)
    policy = getattr(workspace, "ema_model", workspace.model)
    with torch.no_grad():
        arrays: dict[str, Any] = {key: np.asarray(value) for key, value in Reference(config, policy).everything()}
    np.savez_compressed(folder / "reference.npz", **arrays)
    made = {"variant": name, "torch": torch.__version__, "diffusers": diffusers.__version__}
    (folder / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    sizes = [f"{file.name} {file.stat().st_size}" for file in sorted(folder.iterdir())]
    print(f"{name}: {', '.join(sizes)}", flush=True)


def main() -> None:
    """Write the variants that the command line names, or all of them."""
    checkout, output, *names = sys.argv[1:]
    sys.path.insert(0, checkout)
    torch.set_num_threads(1)
    OmegaConf.register_new_resolver("eval", eval)
    for name in names or VARIANTS:
        write(name, Path(output) / name)


if __name__ == "__main__":
    main()
