"""LeRobot's policies: they compute what LeRobot computes, and what cannot be imported is refused in one sentence."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from policy.adapters.imported import build_policy, with_keys
from policy.adapters.lerobot import read_lerobot
from policy.adapters.parity import Comparison, compare, read_reference
from policy.adapters.reading import read_source
from policy.adapters.schedules import schedule_settings
from policy.diffusion.schedule import make_schedule
from tests.adapters.parity import check_parity

INTEROP = Path(__file__).parents[1] / "data" / "interop"
TINY, OLD, ODD, IMAGE = (
    INTEROP / name
    for name in (
        "lerobot-0.6.1/state_tiny",
        "lerobot-0.3.3/state_tiny",
        "lerobot-0.6.1/state_odd",
        "lerobot-0.6.1/image_tiny",
    )
)


SLOWLY = pytest.param("onnx", marks=pytest.mark.slow)


@pytest.mark.parametrize("backend", ["fused", SLOWLY])
@pytest.mark.parametrize("folder", [TINY, ODD, IMAGE], ids=lambda folder: folder.name)
def test_a_policy_computes_what_lerobot_computes(folder, backend):
    read = read_lerobot(folder)
    check_parity(read, folder, backend)


def test_the_comparison_sees_a_weight_that_is_a_little_off():
    read = read_lerobot(TINY)
    policy = build_policy(read, "tiny")
    policy.state_dict()["denoiser.leave.bias"] += 1e-4
    reference = read_reference(TINY / "reference.npz")
    few = {name: reference[name] for name in ("noise", "global_cond", "unet/t50") if name in reference}
    few |= {name: value for name, value in reference.items() if name.startswith("observation/")}
    found = compare(policy, few, keys={}, execution_horizon=8, backends=())
    assert [comparison.name for comparison in found if not comparison.holds] == ["network at t = 50"]
    assert Comparison(name="", difference=float("nan"), bound=1).holds is False


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise": np.zeros((2, 16, 2))}, r"must have the shape \(B, 16, 2\) with the rows of the observations"),
        ({"noise": np.full((4, 16, 2), np.nan)}, "holds a NaN or an infinity in 'noise'"),
        ({"noise": np.array(["x"])}, "which are not numbers"),
        ({"unet/t100": np.zeros((4, 16, 2))}, "holds 'unet/t100'; the timesteps are unet/t0 to unet/t99"),
        ({"ddim0/normalized": np.zeros((4, 16, 2))}, "K is 1 to 100"),
        ({"ddim1/normalized": np.zeros(2)}, "shapes in the reference do not fit"),
        ({"ddpm10/normalized": np.zeros((4, 16, 2))}, "lacks 'ddpm10/step_noise'"),
        ({"rollout/actions": np.zeros((0, 2))}, "must have the same steps"),
        ({}, "holds no output to compare"),
    ],
)
def test_an_odd_reference_is_refused_in_one_sentence(tmp_path, changes, said):
    inputs = {
        name: value
        for name, value in np.load(TINY / "reference.npz").items()
        if name.startswith(("noise", "observation/"))
    }
    np.savez(tmp_path / "odd.npz", **{**inputs, **changes})
    policy = build_policy(read_lerobot(TINY), "tiny")
    with pytest.raises(ValueError, match=said):
        compare(policy, read_reference(tmp_path / "odd.npz"), keys={}, execution_horizon=8, backends=())


def test_old_and_new_formats_give_the_same_policy():
    old, new = read_lerobot(OLD), read_lerobot(TINY)
    assert old.config == new.config
    assert old.weights.keys() == new.weights.keys()
    assert all(torch.equal(old.weights[key], new.weights[key]) for key in new.weights)


def test_what_it_says_of_a_policy():
    read = read_lerobot(ODD)
    assert read.found == {
        "inputs": "observation.state [2], observation.environment_state [16]",
        "scheduler": "DDIM, 100 timesteps, squaredcos_cap_v2, samples with 20 steps",
        "prediction": "sample",
        "executed": "horizon[2:7] of 12",
        "normalisation": "observation.state MEAN_STD, observation.environment_state IDENTITY, action MEAN_STD",
    }
    assert read.config.action_bound is None
    assert read.execution_horizon == 5
    assert (read.config.past_actions, read.config.action_horizon, read.config.denoised_horizon) == (2, 10, 12)
    assert "ddim_steps=20 sampler.spacing=leading here" in read.differences[0]
    assert read.sampler == {"ddim_steps": 20, "spacing": "leading", "eta": 0}


def test_a_linear_schedule_has_the_betas_of_diffusers():
    settings = schedule_settings("there", "linear", 500, 0.0002, 0.04)
    betas = DDPMScheduler(num_train_timesteps=500, beta_start=0.0002, beta_end=0.04, beta_schedule="linear").betas
    np.testing.assert_allclose(make_schedule(**settings).betas, betas.double(), rtol=1e-5)


def test_keys_rename_observations_and_change_nothing_else():
    read = read_lerobot(TINY)
    renamed = with_keys(read, {"agent": "observation.state"})
    assert list(renamed.config.observation_shapes) == ["agent", "observation.environment_state"]
    reference = read_reference(TINY / "reference.npz")
    seen = {
        name.removeprefix("observation/"): value for name, value in reference.items() if name.startswith("observation/")
    }
    seen["agent"] = seen.pop("observation.state")
    with torch.no_grad():
        embedded = build_policy(renamed, "tiny").embed({key: torch.from_numpy(value) for key, value in seen.items()})
    np.testing.assert_allclose(embedded, reference["global_cond"], atol=5e-6)
    with pytest.raises(ValueError, match=r"'observation.stat', which the policy does not observe; it observes"):
        with_keys(read, {"agent": "observation.stat"})
    with pytest.raises(ValueError, match="one name of its own"):
        with_keys(read, {"observation.environment_state": "observation.state"})


def test_a_constant_dimension_normalises_to_minus_one_and_back_to_its_constant(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "tiny")
    for file in folder.glob("policy_*.safetensors"):
        statistics = load_file(file)
        for key in ("action", "observation.state"):
            statistics[f"{key}.max"][0] = statistics[f"{key}.min"][0]
        save_file(statistics, file)
    policy = build_policy(read_lerobot(folder), "tiny")
    state, actions = policy.observation_normalizers["observation.state"], policy.action_normalizer
    assert state.normalize(torch.tensor([[123.0, 45.0]]))[0, 0] == -1
    assert actions.unnormalize(torch.tensor([[0.7, 0.0]]))[0, 0] == statistics["action.min"][0]
    assert actions.scale[0] == 1


def changed(folder, tmp_path, **settings):
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **settings}))
    return copy


@pytest.mark.parametrize(
    ("folder", "settings", "said"),
    [
        (TINY, {"type": "act"}, "holds a policy of the type 'act'; a LeRobot policy of the type 'diffusion' can be"),
        (TINY, {"use_peft": True}, "PEFT"),
        (TINY, {"beta_schedule": "linear"}, "linear steps, which leave 0.36 of the signal"),
        (TINY, {"beta_schedule": "scaled_linear"}, "'squaredcos_cap_v2' and 'linear' can be imported"),
        (TINY, {"horizon": None}, "must hold 'horizon' as int; got None"),
        (TINY, {"down_dims": [16, 64]}, "do not fit"),
        (TINY, {"kernel_size": 4}, "kernel_size must be odd"),
        (TINY, {"n_groups": 3}, "multiple of groups=3"),
        (TINY, {"prediction_type": "flow"}, "unknown prediction_type 'flow'"),
        (TINY, {"n_action_steps": 40}, "execution_horizon must be within 1..15"),
        (TINY, {"n_obs_steps": 1}, "do not fit"),
        (TINY, {"input_features": {"observation.state": {"type": "STATE", "shape": [2]}}}, "must observe a picture or"),
        (TINY, {"input_features": {"audio": {"type": "STATE", "shape": [2]}}}, "has the input 'audio'"),
        (TINY, {"output_features": {}}, "output feature 'action'"),
        (IMAGE, {"spatial_softmax_num_keypoints": 9}, "do not fit"),
        (IMAGE, {"crop_shape": [97, 80]}, "must fit into the image of 96 x 96"),
        (IMAGE, {"crop_shape": [0, 80]}, "a height and a width"),
        (IMAGE, {"resize_shape": [10**9, 10**9]}, "as a height and a width"),
        (IMAGE, {"spatial_softmax_num_keypoints": 10**9}, "is missing or damaged"),
        (TINY, {"down_dims": [10**9, 10**9]}, "is missing or damaged"),
        (TINY, {"noise_scheduler_type": "EDM"}, "noise_scheduler_type='EDM'; DDPM, DDIM can be imported"),
        (TINY, {"horizon": 10**9}, "'horizon' as a number from 1 to 10000"),
        (TINY, {"num_train_timesteps": 10**9}, "1 to 100000 can be imported"),
        (TINY, {"output_features": {"action": {"type": "ACTION", "shape": []}}}, "'action' as a vector"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_sentence(tmp_path, folder, settings, said):
    with pytest.raises(ValueError, match=r".") as refused:
        build_policy(read_source(str(changed(folder, tmp_path, **settings))), "copy")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("file", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_missing_statistics_are_never_guessed(tmp_path, file):
    folder = shutil.copytree(TINY, tmp_path / "copy")
    (folder / file).unlink()
    with pytest.raises(ValueError, match=r"lacks the statistics of '(observation.state|action)' .*copy the files that"):
        read_lerobot(folder)
    steps = json.loads((TINY / file).read_text())
    for step in steps["steps"]:
        step.pop("state_file", None)
    (folder / file).write_text(json.dumps(steps))
    with pytest.raises(ValueError, match="lacks the statistics"):
        read_lerobot(folder)


def test_a_file_of_statistics_that_was_not_copied_is_named(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "copy")
    (missing,) = folder.glob("policy_preprocessor_step*.safetensors")
    missing.unlink()
    os.mkfifo(missing)  # opening it would block
    with pytest.raises(ValueError, match=f"lacks the file {missing.name}: copy all files"):
        read_lerobot(folder)


@pytest.mark.parametrize("name", ["pool.nets.weight", "out.weight", "out.bias"])
def test_a_weight_that_the_image_encoder_lacks_is_named(tmp_path, name):
    folder = shutil.copytree(IMAGE, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights[f"diffusion.rgb_encoder.{name}"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"lacks the weight 'diffusion.rgb_encoder.{name}' of its image encoder"):
        read_lerobot(folder)


def test_a_range_too_small_for_float32_is_refused(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "copy")
    (file,) = folder.glob("policy_postprocessor_step*.safetensors")
    statistics = load_file(file)
    statistics["action.min"][:], statistics["action.max"][:] = 0.0, 1e-40
    save_file(statistics, file)
    with pytest.raises(ValueError, match=r"statistics in copy give action_normalizer.gain a NaN or an infinity"):
        build_policy(read_lerobot(folder), "copy")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(tmp_path, dtype):
    folder = shutil.copytree(TINY, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    save_file({key: value.to(dtype) for key, value in weights.items()}, folder / "model.safetensors")
    policy = build_policy(read_lerobot(folder), "copy")
    expected = weights["diffusion.unet.final_conv.1.weight"].to(dtype).float()
    assert torch.equal(policy.state_dict()["denoiser.leave.weight"], expected)


def test_weights_of_unknown_parts_are_not_dropped(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "language.head": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds 'language.head', which is not a part of LeRobot's diffusion policy"):
        read_lerobot(folder)


def test_a_processor_names_files_of_its_own_folder_only(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "copy")
    file = folder / "policy_preprocessor.json"
    file.write_text(file.read_text().replace('"policy_preprocessor_step', '"../policy_preprocessor_step'))
    with pytest.raises(ValueError, match="must name a file in its own folder"):
        read_lerobot(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"registry_name": "image_crop_resize_processor"}, "has the step 'image_crop_resize_processor': only"),
        ({"registry_name": None, "class": "mine.Scale"}, "has the step 'mine.Scale': only processors"),
        ({"registry_name": None}, "must name a step 'normalizer_processor'"),
        ({"config": {"eps": 0.01}}, "normalises with eps=0.01: only eps=1e-08"),
        ({"config": {"normalize_observation_keys": ["observation.state"]}}, "only normalize_observation_keys=None"),
        ({"config": {"norm_map": ["MIN_MAX"]}}, "must hold norm_map as a mapping"),
    ],
)
def test_a_processor_that_does_something_else_is_refused(tmp_path, changes, said):
    folder = shutil.copytree(TINY, tmp_path / "copy")
    file = folder / "policy_preprocessor.json"
    content = json.loads(file.read_text())
    *_, normalizing = content["steps"]
    if "class" in changes or "crop" in str(changes):
        content["steps"].append(changes)
    else:
        normalizing |= changes
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r".") as refused:
        read_source(str(folder))
    assert said in str(refused.value)


def test_statistics_of_the_old_format_that_were_never_set_are_missing(tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights["normalize_inputs.buffer_observation_state.min"][:] = float("inf")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks the statistics of 'observation.state' \(min\)"):
        read_lerobot(folder)
    weights["diffusion.unet.final_conv.1.bias"][:] = float("nan")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="holds a NaN or an infinity"):
        read_lerobot(folder)


def test_other_folders_are_named(tmp_path):
    (tmp_path / "set" / "meta").mkdir(parents=True)
    (tmp_path / "set" / "meta" / "info.json").write_text("{}")
    (tmp_path / "run" / "pretrained_model").mkdir(parents=True)
    (tmp_path / "older" / "checkpoints" / "020000" / "pretrained_model").mkdir(parents=True)
    (tmp_path / "older" / "checkpoints" / "010000" / "pretrained_model").mkdir(parents=True)
    (tmp_path / "theirs" / "checkpoints").mkdir(parents=True)
    (tmp_path / "theirs" / "checkpoints" / "epoch=0100.ckpt").touch()
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").touch()
    shutil.copytree(TINY, tmp_path / "cloned")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "cloned" / "model.safetensors").write_text(pointer)
    (tmp_path / "latest.ckpt").write_text(pointer)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "checksums.json").write_text("{}")
    for name, said in (
        ("set", "a LeRobot dataset and not a policy"),
        ("run", r"source=.*run/pretrained_model"),
        ("older", r"source=.*older/checkpoints/020000/pretrained_model"),
        ("theirs", r"source=.*theirs/checkpoints/epoch=0100.ckpt"),
        ("peft", r"adapter weights \(PEFT\): merge them"),
        ("cloned", r"model.safetensors is a pointer of Git LFS and not the file: run `git lfs pull` there"),
        ("cloned/config.json", r"a part of a LeRobot policy: name its folder, source=.*cloned"),
        ("latest.ckpt", r"latest.ckpt is a pointer of Git LFS"),
        ("ours", "a checkpoint of ddim-policy already"),
        ("nowhere", r"neither a file, nor a folder, nor a repository"),
    ):
        with pytest.raises(ValueError, match=said):
            read_source(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"average=false is for \.ckpt files"):
        read_source(str(TINY), average=False)
