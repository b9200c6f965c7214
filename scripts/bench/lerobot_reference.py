"""Write small diffusion policies of LeRobot, and what LeRobot's own code computes with them.

Each folder holds a real checkpoint, trained for a few steps on made-up data, and `reference.npz`, in the layout that
`ddim-import verify=` reads. It runs with the Python of an environment that holds `lerobot` (0.3.3 or 0.4.4).

    python -m scripts.bench.lerobot_reference OUTPUT_DIR [--only NAME]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from diffusers import DDIMScheduler, DDPMScheduler
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies import factory
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
from numpy.typing import NDArray
from torchvision.models.resnet import BasicBlock, ResNet

STATE, CORNERS, ACTION = "observation.state", "observation.environment_state", "action"
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
PICTURES = "observation.images"
SHAPES = {STATE: (2,), CORNERS: (16,), FRONT: (3, 96, 96), WRIST: (3, 96, 96), ACTION: (2,)}
TYPES = {STATE: "STATE", CORNERS: "ENV", FRONT: "VISUAL", WRIST: "VISUAL", ACTION: "ACTION"}

ROWS, BATCH, CONTROL_STEPS = 128, 4, 20
TIMESTEPS = (0, 1, 50, 99)
DDIM_STEPS, DDPM_STEPS, ROLLOUT_STEPS = (1, 2, 4, 8, 10), (10, 100), 8
DATA_SEED, NOISE_SEED, ROLLOUT_SEED = 0, 1, 1000

Tensors = dict[str, torch.Tensor]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A policy to write.

    Attributes:
        inputs: observations in the order of the configuration.
        modes: the normalisation of each type of feature.
        settings: further settings of LeRobot's configuration.
        scale: the data lie between 0 and this number.
        constant: a dimension of the state that never changes, or None.
        train_steps: optimiser steps.
    """

    inputs: tuple[str, ...] = (STATE, CORNERS)
    modes: Mapping[str, str] = field(
        default_factory=lambda: {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ENV": "MIN_MAX", "ACTION": "MIN_MAX"}
    )
    settings: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 512.0
    constant: int | None = None
    train_steps: int = 60


VARIANTS = {
    "state_tiny": Variant(),
    "state_mean_std": Variant(
        modes={"STATE": "IDENTITY", "ENV": "MEAN_STD", "ACTION": "MEAN_STD"},
        settings={"use_film_scale_modulation": False, "clip_sample_range": 2.5, "n_obs_steps": 3},
        scale=2.0,
    ),
    "state_constant": Variant(
        inputs=(CORNERS, STATE),
        modes={"STATE": "MIN_MAX", "ACTION": "IDENTITY"},
        settings={"prediction_type": "sample", "clip_sample": False, "noise_scheduler_type": "DDIM"},
        scale=1.0,
        constant=1,
    ),
    "image": Variant(inputs=(FRONT, STATE), settings={"crop_shape": (84, 84)}, train_steps=20),
    "image_state_corners": Variant(
        inputs=(CORNERS, FRONT, STATE),
        modes={"VISUAL": "MIN_MAX", "STATE": "MEAN_STD", "ENV": "MIN_MAX", "ACTION": "MIN_MAX"},
        settings={"use_group_norm": False, "vision_backbone": "resnet34_quarter", "crop_shape": None},
        train_steps=20,
    ),
    "cameras_shared": Variant(
        inputs=(FRONT, WRIST, STATE),
        modes={"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
        settings={"use_group_norm": False, "crop_shape": (83, 80), "crop_is_random": False},
        train_steps=20,
    ),
    "cameras_separate_resized": Variant(
        inputs=(STATE, WRIST, FRONT),
        settings={"use_separate_rgb_encoder_per_camera": True, "resize_shape": (60, 72), "crop_ratio": 0.9},
        train_steps=20,
    ),
    "image_resnet18": Variant(
        inputs=(FRONT, STATE),
        settings={"vision_backbone": "resnet18", "crop_shape": (84, 84), "spatial_softmax_num_keypoints": 32},
        train_steps=3,
    ),
}
# Settings that LeRobot hands from the configuration to the scheduler.
SCHEDULER_SETTINGS = (
    *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end"),
    *("clip_sample", "clip_sample_range", "prediction_type"),
)
# Settings of the configuration that LeRobot 0.3 does not have.
NEW_SETTINGS = {"resize_shape", "crop_ratio"}


def main() -> None:
    """Write all variants that the installed version of LeRobot has, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--only", choices=VARIANTS, help="write this variant only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for number, layers in {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}.items():
        setattr(torchvision.models, f"resnet{number}_quarter", _quarter(layers))
    for name in [arguments.only] if arguments.only else VARIANTS:
        if NEW_SETTINGS & VARIANTS[name].settings.keys() <= set(DiffusionConfig.__dataclass_fields__):
            write(VARIANTS[name], arguments.output_dir / f"lerobot-{version('lerobot')}" / name)


def write(variant: Variant, folder: Path) -> None:
    """Make the data, train a policy for a few steps, and write it with its reference."""
    rows = made_up(variant, np.random.default_rng(DATA_SEED))
    torch.manual_seed(DATA_SEED)
    theirs = Theirs(variant, statistics(rows))
    loss = theirs.train(rows, variant.train_steps)
    theirs.save(folder)
    reference: dict[str, Any] = dict(theirs.reference(rows))
    np.savez_compressed(folder / "reference.npz", **reference)
    made: dict[str, Any] = {name: version(name) for name in ("lerobot", "torch", "torchvision", "diffusers")}
    made |= {"python": sys.version.split()[0], "trained_steps": variant.train_steps, "last_loss": loss}
    (folder / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    print(f"{folder}: loss {loss:.3f}", flush=True)


def made_up(variant: Variant, generator: np.random.Generator) -> Arrays:
    """Smooth random walks within the data's bounds, and pictures of soft random colours, as the simulator has them."""
    rows: Arrays = {}
    for key in (*variant.inputs, ACTION):
        if TYPES[key] == "VISUAL":
            channels, height, width = SHAPES[key]
            coarse = generator.integers(0, 256, (ROWS, height // 12, width // 12, channels), dtype=np.uint8)
            rows[key] = coarse.repeat(12, axis=1).repeat(12, axis=2)
        else:
            walk = generator.normal(size=(ROWS, *SHAPES[key])).cumsum(axis=0)
            rows[key] = (variant.scale * (walk - walk.min(0)) / np.ptp(walk, axis=0)).astype(np.float32)
    if variant.constant is not None:
        rows[STATE][:, variant.constant] = 0.25
    return rows


def statistics(rows: Arrays) -> dict[str, Tensors]:
    """The statistics of each feature under LeRobot's names; those of a picture are by channel, in [0, 1]."""
    found = {}
    for key, values in rows.items():
        tensor = as_theirs(key, values)
        axes = (0, 2, 3) if TYPES[key] == "VISUAL" else (0,)
        keep = TYPES[key] == "VISUAL"
        found[key] = {
            "min": tensor.amin(axes, keepdim=keep),
            "max": tensor.amax(axes, keepdim=keep),
            "mean": tensor.mean(axes, keepdim=keep),
            "std": tensor.std(axes, keepdim=keep),
        }
        if keep:
            found[key] = {name: values[0] for name, values in found[key].items()}
    return found


def as_theirs(key: str, values: NDArray[Any]) -> torch.Tensor:
    """Rows as LeRobot takes them: a picture as (..., channels, height, width) in [0, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    return tensor.movedim(-1, -3) / 255 if TYPES[key] == "VISUAL" else tensor


class Theirs:
    """LeRobot's policy with its normalisation, which is a part of the policy up to version 0.3.

    Args:
        variant: which policy.
        stats: the statistics of its features.
    """

    def __init__(self, variant: Variant, stats: dict[str, Tensors]) -> None:
        self.config = _config(variant)
        if hasattr(factory, "make_pre_post_processors"):
            self.processors = factory.make_pre_post_processors(self.config, dataset_stats=stats)
            self.policy = DiffusionPolicy(self.config)
            self.normalize, self.unnormalize = self.processors
            self.act: Callable[[Tensors], torch.Tensor] = lambda batch: self.unnormalize(
                self.policy.select_action(self.normalize(batch))
            )
        else:
            self.processors = ()
            self.policy = DiffusionPolicy(self.config, dataset_stats=stats)
            self.normalize = self.policy.normalize_inputs
            self.unnormalize = lambda actions: self.policy.unnormalize_outputs({ACTION: actions})[ACTION]
            self.act = self.policy.select_action
        self.model = self.policy.diffusion

    def train(self, rows: Arrays, steps: int) -> float:
        """Train for a few steps, so that no weight and no running statistic is as it was made; return the last loss."""
        self.policy.train()
        optimizer = torch.optim.AdamW(self.policy.parameters(), 1e-3)
        generator = np.random.default_rng(DATA_SEED)
        for _ in range(steps):
            batch = {key: as_theirs(key, values) for key, values in self._windows(rows, generator, 8).items()}
            batch["action_is_pad"] = torch.zeros(batch[ACTION].shape[:2], dtype=torch.bool)
            loss, _ = self.policy.forward({**batch, **self.normalize(batch)} if self.processors else batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.policy.eval()
        return float(loss.detach())

    def _windows(self, rows: Arrays, generator: np.random.Generator, count: int) -> Arrays:
        longest = self.config.horizon
        starts = generator.integers(0, len(rows[ACTION]) - longest, (count, 1))
        lengths = {key: longest if key == ACTION else self.config.n_obs_steps for key in rows}
        return {key: values[starts + np.arange(lengths[key])] for key, values in rows.items()}

    def save(self, folder: Path) -> None:
        """Write the checkpoint with LeRobot's own functions."""
        self.policy.save_pretrained(folder)
        for processor in self.processors:
            processor.save_pretrained(folder)

    @torch.no_grad()
    def reference(self, rows: Arrays) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield inputs and outputs by name."""
        windows = self._windows(rows, np.random.default_rng(DATA_SEED + 1), BATCH)
        windows.pop(ACTION)
        normalized = self.normalize({key: as_theirs(key, values) for key, values in windows.items()})
        for key, values in windows.items():
            yield f"observation/{key}", values
            if TYPES[key] != "VISUAL":
                yield f"normalized/{key}", normalized[key].numpy()
        pictures = [normalized[key] for key in self.config.image_features]
        if pictures:
            normalized = {**normalized, PICTURES: torch.stack(pictures, dim=-4)}
        condition = self.model._prepare_global_conditioning(normalized)
        yield "global_cond", condition.numpy()
        torch.manual_seed(NOISE_SEED)
        noise = torch.randn(BATCH, self.config.horizon, SHAPES[ACTION][0])
        yield "noise", noise.numpy()
        for timestep in TIMESTEPS:
            predicted = self.model.unet(noise, torch.full((BATCH,), timestep), global_cond=condition)
            yield f"unet/t{timestep}", predicted.numpy()
        yield from self._samples(condition, noise)
        yield from self._rollout(rows)

    def _samples(self, condition: torch.Tensor, noise: torch.Tensor) -> Iterator[tuple[str, NDArray[Any]]]:
        for steps in DDIM_STEPS:
            yield from self._sampled(f"ddim{steps}", self._ddim(), steps, condition)
        for steps in DDPM_STEPS:
            name = f"ddpm{steps}"
            yield from self._sampled(name, self._scheduler(DDPMScheduler), steps, condition)
            # The sampler drew from the same generator: first the chunk's noise, then that of each step.
            torch.manual_seed(NOISE_SEED)
            torch.randn(noise.shape)
            yield f"{name}/step_noise", torch.stack([torch.randn(noise.shape) for _ in range(steps)]).numpy()
        for spacing, prefix in (("leading", "rederived"), ("trailing", "rederived_trailing")):
            for steps in DDIM_STEPS:
                sampled = self._sampled(f"{prefix}{steps}", self._ddim(spacing, derive_again=True), steps, condition)
                yield from ((name, values) for name, values in sampled if not name.endswith(("horizon", "executed")))

    def _sampled(
        self, name: str, scheduler: Any, steps: int, condition: torch.Tensor
    ) -> Iterator[tuple[str, NDArray[Any]]]:
        """Sample chunks with LeRobot's own loop, which draws the noise from torch's global generator."""
        self.model.noise_scheduler, self.model.num_inference_steps = scheduler, steps
        torch.manual_seed(NOISE_SEED)
        chunk = self.model.conditional_sample(BATCH, global_cond=condition)
        first = self.config.n_obs_steps - 1
        horizon = self.unnormalize(chunk).numpy()
        yield f"{name}/normalized", chunk.numpy()
        yield f"{name}/horizon", horizon
        yield f"{name}/executed", horizon[:, first : first + self.config.n_action_steps]
        yield f"{name}/timesteps", scheduler.timesteps.numpy()

    def _ddim(self, spacing: str = "leading", *, derive_again: bool = False) -> Any:
        scheduler = self._scheduler(DDIMScheduler, timestep_spacing=spacing)
        if derive_again:
            step = scheduler.step
            scheduler.step = lambda *given, **named: step(*given, use_clipped_model_output=True, **named)
        return scheduler

    def _scheduler(self, kind: Any, **settings: Any) -> Any:
        return kind(**{name: getattr(self.config, name) for name in SCHEDULER_SETTINGS}, **settings)

    def _rollout(self, rows: Arrays) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield observations one at a time, and the actions that LeRobot's own interface takes."""
        self.model.noise_scheduler, self.model.num_inference_steps = self._ddim(), ROLLOUT_STEPS
        self.policy.reset()
        actions, noises = [], []
        for step in range(CONTROL_STEPS):
            seed = ROLLOUT_SEED + step // self.config.n_action_steps
            if step % self.config.n_action_steps == 0:
                torch.manual_seed(seed)
                noises.append(torch.randn(1, self.config.horizon, SHAPES[ACTION][0]))
            torch.manual_seed(seed)
            seen = {key: as_theirs(key, values[step : step + 1]) for key, values in rows.items() if key != ACTION}
            actions.append(self.act(seen)[0])
        for key, values in rows.items():
            if key != ACTION:
                yield f"rollout/observation/{key}", values[:CONTROL_STEPS]
        yield "rollout/actions", torch.stack(actions).numpy()
        yield "rollout/noise", torch.stack(noises).numpy()


def _config(variant: Variant) -> DiffusionConfig:
    """Small networks, and the variant's own settings."""
    small: dict[str, Any] = {"down_dims": (16, 32), "kernel_size": 3, "diffusion_step_embed_dim": 32}
    if any(TYPES[key] == "VISUAL" for key in variant.inputs):
        small |= {"vision_backbone": "resnet18_quarter", "spatial_softmax_num_keypoints": 8}
    features = {key: PolicyFeature(getattr(FeatureType, TYPES[key]), SHAPES[key]) for key in (*variant.inputs, ACTION)}
    return DiffusionConfig(
        input_features={key: features[key] for key in variant.inputs},
        output_features={ACTION: features[ACTION]},
        normalization_mapping={kind: NormalizationMode[mode] for kind, mode in variant.modes.items()},
        device="cpu",
        push_to_hub=False,
        **(small | dict(variant.settings)),
    )


def _quarter(layers: tuple[int, ...]) -> Callable[..., ResNet]:
    """Return a function that makes a ResNet of a quarter of the width, as one of torchvision's makes a ResNet."""
    return lambda weights=None: _QuarterResNet(BasicBlock, list(layers))


class _QuarterResNet(ResNet):
    """torchvision's ResNet with a quarter of the channels everywhere."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.conv1 = torch.nn.Conv2d(3, 16, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16)

    def _make_layer(self, block: Any, planes: int, *given: Any, **named: Any) -> torch.nn.Sequential:
        if planes == 64:
            self.inplanes = 16
        return super()._make_layer(block, planes // 4, *given, **named)


if __name__ == "__main__":
    main()
