"""Diffusion policies of LeRobot, in the layouts of its versions 0.3 to 0.6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policy.adapters.imported import PIXEL, Imported, affine, normalizer_prefix, prefixed, sampling_differences, under
from policy.adapters.resnet_keys import camera_weights, describe_backbone, image_cut
from policy.adapters.schedules import schedule_settings
from policy.adapters.settings import Settings
from policy.adapters.unet_keys import LAST_GROUPS, NO_SCALES, unet_weights
from policy.checkpoint.files import read_json, read_tensors
from policy.model.config import PolicyConfig

CONFIG, WEIGHTS, ADAPTER = "config.json", "model.safetensors", "adapter_config.json"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
LEROBOT_FILES = (CONFIG, WEIGHTS, ADAPTER, "policy_*.json", "policy_*.safetensors")
STATE, ENVIRONMENT_STATE, ACTION = "observation.state", "observation.environment_state", "action"
MODES = ("MIN_MAX", "MEAN_STD", "IDENTITY")
# The beginnings of the names of all weights and statistics.
PARTS = ("diffusion.unet.", "diffusion.rgb_encoder.", "normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
# What LeRobot adds to a standard deviation.
EPSILON = 1e-8
# Steps of a processor that change no values.
NEUTRAL_STEPS = ("rename_observations_processor", "to_batch_processor", "device_processor")
# Settings of our sampler by the name of a scheduler: DDPM is DDIM with all of its noise.
ETA = {"DDPM": 1, "DDIM": 0}


def read_lerobot(folder: Path) -> Imported:
    """Read a diffusion policy that LeRobot saved. Nothing in it is executed.

    Args:
        folder: holds config.json and model.safetensors; from version 0.4 on also the processors with the statistics.

    Returns:
        The policy in our terms. Observations keep LeRobot's names.

    Raises:
        ValueError: a file is missing or damaged, the policy is of another type, or our parts lack one of its settings.
    """
    found = Settings(read_json(folder / CONFIG), folder / CONFIG)
    _refuse(folder, found)
    inputs, tensors = _inputs(found), _weights(folder)
    statistics = _Statistics(folder, found, tensors)
    encoder, encoder_weights, features = _encoder(found, inputs, tensors)
    obs_horizon, horizon = found.count("n_obs_steps"), found.count("horizon")
    (action_dim,) = _features(found, "output_features")[ACTION][1]
    scales, timestep_size = found.take("use_film_scale_modulation", bool), found.take("diffusion_step_embed_dim", int)
    config = PolicyConfig(
        observation_shapes={key: _our_shape(kind, shape) for key, (kind, shape) in inputs.items()},
        action_dim=action_dim,
        obs_horizon=obs_horizon,
        # Their chunk begins with the action of the oldest observation.
        past_actions=obs_horizon - 1,
        action_horizon=horizon - obs_horizon + 1,
        obs_size=obs_horizon * features,
        prediction_type=found.take("prediction_type", str),
        normalizer="affine",
        action_bound=float(found.take("clip_sample_range", float)) if found.take("clip_sample", bool) else None,
        encoder=encoder,
        denoiser={
            "name": "unet",
            "widths": found.take("down_dims", list),
            "kernel_size": found.take("kernel_size", int),
            "groups": found.take("n_groups", int),
            "last_groups": LAST_GROUPS,
            "timestep_size": timestep_size,
            "endpoint": True,
        },
        schedule=_schedule(found),
    )
    unet = {key.removeprefix("_orig_mod."): value for key, value in under("diffusion.unet.", tensors).items()}
    weights = {
        **prefixed("action_normalizer.", statistics.normalizer(ACTION, "ACTION")),
        **prefixed("encoder.", encoder_weights),
        **prefixed("denoiser.", unet_weights(unet, timestep_size=timestep_size, scales=scales)),
    }
    for key, (kind, _) in inputs.items():
        weights |= prefixed(normalizer_prefix(key), statistics.normalizer(key, kind))
    return Imported(
        project="LeRobot",
        config=config,
        weights=weights,
        execution_horizon=found.take("n_action_steps", int),
        found={**_described(found, inputs), "normalisation": statistics.described([*inputs.items()])},
        sampler=_sampler(found),
        differences=_differences(found),
    )


def _features(found: Settings, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each feature."""
    described = {}
    for key, feature in found.take(name, dict).items():
        kind, shape = (feature.get(part) if isinstance(feature, dict) else None for part in ("type", "shape"))
        if not isinstance(kind, str) or not isinstance(shape, list) or not all(type(n) is int for n in shape):
            raise ValueError(f"{found.path} must hold {name} with type and shape; got {repr(feature)[:80]} for {key!r}")
        described[key] = (kind, tuple(shape))
    return described


def adapter_weights(folder: Path) -> ValueError:
    """Build the error for a folder that holds changes of a policy's weights, and not the policy."""
    return ValueError(f"{folder} holds adapter weights (PEFT): merge them into the policy with LeRobot first")


def _refuse(folder: Path, found: Settings) -> None:
    """Reject what is not a diffusion policy, or one that our parts cannot hold."""
    kind = found.data.get("type")
    if kind != "diffusion":
        raise ValueError(
            f"{folder} holds a policy of the type {kind!r}; a LeRobot policy of the type 'diffusion' can be imported"
        )
    if found.data.get("use_peft"):
        raise adapter_weights(folder)
    kind, shape = _features(found, "output_features").get(ACTION, ("", ()))
    if len(shape) != 1:
        raise ValueError(f"{found.path} must hold the output feature 'action' as a vector; got the shape {list(shape)}")


def _inputs(found: Settings) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The observations in the order of LeRobot's condition: state, pictures, environment state."""
    given = _features(found, "input_features")
    pictures = [key for key, (kind, _) in given.items() if kind == "VISUAL"]
    order = [key for key in (STATE, *pictures, ENVIRONMENT_STATE) if key in given]
    if unknown := sorted(given.keys() - set(order)):
        raise ValueError(
            f"{found.path} has the input {unknown[0]!r}; LeRobot's diffusion policy observes {STATE!r},"
            f" {ENVIRONMENT_STATE!r} and pictures"
        )
    if not pictures and ENVIRONMENT_STATE not in given:
        raise ValueError(f"{found.path} must observe a picture or {ENVIRONMENT_STATE!r}; got {sorted(given)}")
    for key, (kind, shape) in given.items():
        if len(shape) != (3 if kind == "VISUAL" else 1):
            raise ValueError(f"{found.path} has the input {key!r} of type {kind} with the shape {list(shape)}")
    return {key: given[key] for key in order}


def _our_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[1:], shape[0]) if kind == "VISUAL" else shape


def _weights(folder: Path) -> dict[str, Tensor]:
    """The weights in float32; statistics that were never set are infinite, and are not refused here.

    Raises:
        ValueError: the file is missing or damaged, or holds a weight that LeRobot's diffusion policy does not have.
    """
    tensors = read_tensors(_file(folder, WEIGHTS), finite=lambda key: "normalize_" not in key)
    if unknown := sorted(key for key in tensors if not key.startswith(PARTS)):
        raise ValueError(
            f"{folder / WEIGHTS} holds {unknown[0][:80]!r}, which is not a part of LeRobot's diffusion policy"
        )
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def _file(folder: Path, name: str) -> Path:
    """A file of the folder; a pipe or a device in its place would block."""
    if not (folder / name).is_file():
        raise ValueError(f"{folder} lacks the file {name}: copy all files of the policy's folder")
    return folder / name


def _schedule(found: Settings) -> dict[str, Any]:
    name, num_steps = found.take("beta_schedule", str), found.take("num_train_timesteps", int)
    start, end = (float(found.take(name, float)) for name in ("beta_start", "beta_end"))
    return schedule_settings(found.path, name, num_steps, start, end)


def _encoder(
    found: Settings, inputs: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """The encoder's settings, its weights, and the number of features of one step."""
    order = list(inputs)
    vectors = sum(shape[0] for kind, shape in inputs.values() if kind != "VISUAL")
    pictures = {key: shape for key, (kind, shape) in inputs.items() if kind == "VISUAL"}
    if not pictures:
        return {"name": "concatenate", "order": order}, {}, vectors
    separate = found.take("use_separate_rgb_encoder_per_camera", bool)
    cameras = [f"diffusion.rgb_encoder.{number}." for number in range(len(pictures))]
    weights: dict[str, Tensor] = {}
    for number, prefix in enumerate(cameras if separate else ["diffusion.rgb_encoder."]):
        camera = camera_weights(found.path.parent / WEIGHTS, tensors, prefix, backbone="backbone.", head="out.")
        weights |= prefixed(f"cameras.{number}.", camera)
    keypoints = found.take("spatial_softmax_num_keypoints", int)
    resize = found.pair("resize_shape")
    encoder = {
        "name": "resnet",
        "order": order,
        **describe_backbone(under("cameras.0.backbone.", weights)),
        "shared": not separate,
        **image_cut(next(iter(pictures.values()))[1:], resize, _crop(found, resize)),
        "keypoints": keypoints,
    }
    return encoder, weights, vectors + 2 * keypoints * len(pictures)


def _crop(found: Settings, resize: tuple[int, int] | None) -> tuple[int, int] | None:
    """The crop: with a resize it is a share of that size, otherwise `crop_shape`."""
    ratio = found.take("crop_ratio", float, 1.0)
    if resize is None or found.data.get("crop_ratio") is None:
        return found.pair("crop_shape")
    return (int(resize[0] * ratio), int(resize[1] * ratio)) if ratio < 1 else None


class _Statistics:
    """How each feature is normalised, and its statistics, from processors (0.4 and later) or from the weights."""

    def __init__(self, folder: Path, found: Settings, tensors: Mapping[str, Tensor]) -> None:
        self.folder = folder
        self.mapping = found.take("normalization_mapping", dict, {})
        self.features = {**_features(found, "input_features"), **_features(found, "output_features")}
        self.by_processor = {
            ACTION: _processor(folder, POSTPROCESSOR, "unnormalizer_processor"),
            "": _processor(folder, PREPROCESSOR, "normalizer_processor"),
        }
        self.tensors = tensors

    def mode(self, key: str, kind: str) -> str:
        step = self._step(key)
        mapping = step.get("config", {}).get("norm_map", self.mapping) if step else self.mapping
        mode = str(mapping.get(kind, "IDENTITY"))
        if mode not in MODES:
            raise ValueError(f"{self.folder} normalises {key!r} by {mode}; {', '.join(MODES)} can be imported")
        return mode

    def normalizer(self, key: str, kind: str) -> dict[str, Tensor]:
        """The buffers of our affine normaliser for a feature."""
        mode, unit = self.mode(key, kind), PIXEL if kind == "VISUAL" else 1.0
        if mode == "MIN_MAX":
            low, high = self._of(key, "min"), self._of(key, "max")
            spread = high - low
            gain = torch.where(spread == 0, 0.0, 2 / spread)
            return affine(low * unit, gain / unit, torch.full_like(gain, -1.0))
        if mode == "MEAN_STD":
            mean, std = self._of(key, "mean"), self._of(key, "std")
            return affine(mean * unit, 1 / ((std + EPSILON) * unit), torch.zeros_like(mean))
        size = self._size(key)
        return affine(torch.zeros(size), torch.full((size,), 1 / unit), torch.zeros(size))

    def described(self, inputs: Sequence[tuple[str, tuple[str, Any]]]) -> str:
        """The mode of each feature, for people."""
        return ", ".join(f"{key} {self.mode(key, kind)}" for key, (kind, _) in [*inputs, (ACTION, ("ACTION", ()))])

    def _step(self, key: str) -> dict[str, Any] | None:
        return self.by_processor[ACTION if key == ACTION else ""]

    def _size(self, key: str) -> int:
        return self.features[key][1][0]

    def _of(self, key: str, name: str) -> Tensor:
        """A statistic as a vector, float64."""
        step, part = self._step(key), "unnormalize_outputs" if key == ACTION else "normalize_inputs"
        if step is None:
            value = self.tensors.get(f"{part}.buffer_{key.replace('.', '_')}.{name}")
        else:
            value = step["tensors"].get(f"{key}.{name}")
        if value is None or not value.isfinite().all():
            raise ValueError(
                f"{self.folder} lacks the statistics of {key!r} ({name}), without which its actions mean nothing: copy"
                f" the files that {PREPROCESSOR} and {POSTPROCESSOR} name into the folder; up to LeRobot 0.3 they are"
                f" in {WEIGHTS}, and the dataset's meta/stats.json has them too"
            )
        if value.numel() != (size := self._size(key)):
            raise ValueError(
                f"{self.folder} has {value.numel()} numbers as {name} of {key!r}; it should have {size}, one for each"
                " dimension or channel"
            )
        return value.flatten().double()


def _processor(folder: Path, file: str, name: str) -> dict[str, Any] | None:
    """The step of a processor that normalises, with its tensors; None if there is no such file."""
    if not (folder / file).is_file():
        return None
    steps = read_json(folder / file).get("steps")
    named = steps if isinstance(steps, list) else []
    step = next((s for s in named if isinstance(s, dict) and s.get("registry_name") == name), None)
    if step is None or not isinstance(step.get("config", {}), dict):
        raise ValueError(f"{folder / file} must name a step {name!r}, which normalises")
    _refuse_processing(folder / file, named, step)
    state = step.get("state_file")
    tensors: dict[str, Tensor] = {}
    if state is not None:
        if not isinstance(state, str) or Path(state).name != state:
            raise ValueError(
                f"{folder / file} must name a file in its own folder as state_file; got {str(state)[:80]!r}"
            )
        tensors = read_tensors(_file(folder, state))
    return {**step, "tensors": tensors}


def _refuse_processing(file: Path, steps: Sequence[Any], normalizing: Mapping[str, Any]) -> None:
    """Reject a processor that changes values in other ways than LeRobot's diffusion policies do."""
    for step in steps:
        name = step.get("registry_name") or step.get("class") if isinstance(step, dict) else step
        if step is not normalizing and name not in NEUTRAL_STEPS:
            raise ValueError(
                f"{file} has the step {str(name)[:80]!r}: only processors that rename, move and normalise can be"
                " imported"
            )
    config = normalizing.get("config", {})
    if not isinstance(modes := config.get("norm_map", {}), dict):
        raise ValueError(f"{file} must hold norm_map as a mapping; got {repr(modes)[:80]}")
    for setting, usual in (("eps", EPSILON), ("normalize_observation_keys", None)):
        if (value := config.get(setting, usual)) != usual:
            raise ValueError(
                f"{file} normalises with {setting}={str(value)[:80]}: only {setting}={usual}, LeRobot's default, can be"
                " imported"
            )


def _sampler(found: Settings) -> dict[str, Any]:
    """How LeRobot samples, as settings of ours."""
    scheduler = found.take("noise_scheduler_type", str)
    if scheduler not in ETA:
        raise ValueError(f"{found.path} has noise_scheduler_type={scheduler[:80]!r}; {', '.join(ETA)} can be imported")
    steps = "num_inference_steps" if found.data.get("num_inference_steps") else "num_train_timesteps"
    return {"ddim_steps": found.take(steps, int), "spacing": "leading", "eta": ETA[scheduler]}


def _described(found: Settings, inputs: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, str]:
    first, steps = found.take("n_obs_steps", int) - 1, found.take("n_action_steps", int)
    return {
        "inputs": ", ".join(f"{key} {list(shape)}" for key, (_, shape) in inputs.items()),
        "scheduler": f"{found.take('noise_scheduler_type', str)}, {found.take('num_train_timesteps', int)} timesteps,"
        f" {found.take('beta_schedule', str)}, samples with {_sampler(found)['ddim_steps']} steps",
        "prediction": found.take("prediction_type", str),
        "executed": f"horizon[{first}:{first + steps}] of {found.take('horizon', int)}",
    }


def _differences(found: Settings) -> tuple[str, ...]:
    scheduler, clips = found.take("noise_scheduler_type", str), found.take("clip_sample", bool)
    told = sampling_differences("LeRobot", _sampler(found), scheduler, clips=clips)
    return (*told, *([] if found.take("use_film_scale_modulation", bool) else [NO_SCALES]))
