"""Compiled sampling: eager sampling's actions, whatever runs it, and one sentence for what cannot run."""

import dataclasses
import importlib.util
import itertools
import pickle
import shutil

import numpy as np
import pytest
import torch

from policy import DiffusionPolicy, PolicyConfig, Sampler
from policy.diffusion.coefficients import ddim_coefficients
from policy.diffusion.ddim import SPACINGS, ddim_step, ddim_timesteps
from policy.diffusion.schedule import PREDICTION_TYPES, make_schedule
from policy.inference import backends as backends_module
from policy.inference import onnx_graph
from policy.inference.backends import BACKENDS, compile_sampler
from policy.inference.int8 import quantized
from policy.model.denoisers import DENOISERS
from tests.conftest import randomize

# In normalised units, where actions lie within -1..1; larger ones (no clipping) are compared relative to their size.
TOLERANCE = 1e-4

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs pip install 'ddim-policy[export]'",
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

VECTORS = {"state": (5,), "goal": (3,)}
IMAGES = {"state": (5,), "camera.front": (16, 20, 3)}


DENOISER_SIZES = {
    "modulated_mlp": {"hidden_size": 32, "num_layers": 2},
    "residual_mlp": {"hidden_size": 32, "num_layers": 2},
    "unet": {"widths": [16, 32], "timestep_size": 32},
    "transformer": {"hidden_size": 32, "num_layers": 2},
}


def make_policy(denoiser="modulated_mlp", prediction_type="sample", shapes=VECTORS, **sizes):
    config = PolicyConfig(
        observation_shapes=shapes,
        action_dim=2,
        obs_size=24,
        prediction_type=prediction_type,
        encoder={"name": "image"} if shapes is IMAGES else {"name": "state"},
        denoiser={"name": denoiser, "dropout": 0.1, **DENOISER_SIZES[denoiser], **sizes},
    )
    policy = DiffusionPolicy(config)
    randomize(policy)
    with torch.no_grad():
        for key, shape in shapes.items():
            if len(shape) == 1:
                policy.observation_normalizers[key].fit(np.full(shape, -2.0), np.linspace(1, 3, shape[0]))
    policy.action_normalizer.fit([-3, 10], [5, 11])
    return policy.eval().requires_grad_(False)


def inputs(policy, sampler, rows=3, seed=1):
    config = policy.config
    generator = torch.Generator().manual_seed(seed)
    observations = {
        key: torch.randint(0, 256, (rows, config.obs_horizon, *shape), generator=generator, dtype=torch.uint8)
        if len(shape) == 3
        else 2 * torch.randn(rows, config.obs_horizon, *shape, generator=generator)
        for key, shape in config.observation_shapes.items()
    }
    chunk = (rows, config.action_horizon, config.action_dim)
    noise = torch.randn(chunk, generator=generator)
    step_noise = torch.randn(sampler.ddim_steps, *chunk, generator=generator) if sampler.eta > 0 else None
    return observations, noise, step_noise


def difference(policy, actions, expected):
    """The largest one in normalised units, relative to the largest action where that is above 1."""
    a, b = policy.action_normalizer.normalize(actions), policy.action_normalizer.normalize(expected)
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_coefficients_are_ddim_steps_written_as_two_sums(prediction_type, eta, clip):
    schedule = make_schedule(num_steps=50, beta_schedule="linear")
    for spacing, ddim_steps in itertools.product(SPACINGS, (1, 3, 50)):
        timesteps = ddim_timesteps(50, ddim_steps, spacing)
        table = ddim_coefficients(schedule, timesteps, eta, prediction_type)
        timesteps = timesteps.tolist()
        x, predicted, z = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for row, t, previous in zip(table, timesteps, [*timesteps[1:], -1], strict=True):
            clean = row[0] * x + row[1] * predicted
            clean = clean if clip is None else clean.clamp(-clip, clip)
            ours = row[2] * x + row[3] * clean + row[4] * z
            theirs = ddim_step(
                x, predicted, t, previous, schedule, eta, prediction_type=prediction_type, clip=clip, noise=z
            )
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("each_row", [True, False])
def test_the_eager_program_is_sample_actions_bit_for_bit(eta, each_row):
    policy, sampler = make_policy(), Sampler(ddim_steps=3, eta=eta, spacing="leading")
    observations, *_ = inputs(policy, sampler)

    def generator():
        seeded = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return seeded if each_row else seeded[0]

    settings = {name: value for name, value in dataclasses.asdict(sampler).items() if name != "warm_start"}
    expected = policy.sample_actions(observations, generator=generator(), **settings)
    program = compile_sampler(policy, sampler)
    assert program.backend == "eager"
    assert torch.equal(program.sample_actions(observations, generator=generator()), expected)


SETTINGS = [
    Sampler(ddim_steps=k, eta=eta, clip=clip, spacing=spacing)
    for k, eta, clip, spacing in itertools.product((1, 2, 3, 8, 16), (0.0, 0.5, 1.0), (None, 1.0, 0.5), SPACINGS)
]


@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_conditioning_all_steps_at_once_changes_nothing(denoiser, prediction_type):
    policy = make_policy(denoiser, prediction_type)
    settings, moved = SETTINGS[:: 1 if denoiser.endswith("mlp") else 4], 0
    for sampler in settings:
        observations, noise, step_noise = inputs(policy, sampler)
        expected = compile_sampler(policy, sampler)(observations, noise, step_noise)
        actions = compile_sampler(policy, sampler, backend="fused")(observations, noise, step_noise)
        assert difference(policy, actions, expected) < TOLERANCE, sampler
        moved += difference(policy, actions, policy.action_normalizer.unnormalize(noise)) > 0.1
    assert moved > 0.9 * len(settings)  # almost everywhere: noise that the clipping leaves as it is is possible


def continuing(policy, rows=3):
    """A previous chunk in the data's units, and how much of it to keep: all of its beginning, some, nothing."""
    generator = torch.Generator().manual_seed(2)
    known = 2 * torch.rand(rows, policy.config.action_horizon, policy.config.action_dim, generator=generator) - 1
    keep = torch.tensor([1, 1, 1, 0.6, 0.2, 0, 0, 0]).expand(rows, -1)
    return {"previous": policy.action_normalizer.unnormalize(known), "keep": keep}


@pytest.mark.parametrize("backend", ["eager", "fused", pytest.param("onnx", marks=needs_onnx)])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("warm_start", [None, 0.4])
def test_every_backend_continues_a_chunk_as_ddim_step_does(backend, prediction_type, warm_start):
    policy = make_policy(prediction_type=prediction_type)
    sampler = Sampler(ddim_steps=4, eta=0.5, warm_start=warm_start)
    observations, noise, step_noise = inputs(policy, sampler)
    before = continuing(policy)
    # Said again with the parts that have tests of their own.
    known, keep = policy.action_normalizer.normalize(before["previous"]), before["keep"][..., None]
    timesteps = ddim_timesteps(100, 4) if warm_start is None else ddim_timesteps(40, 4)
    x = noise if warm_start is None else policy.schedule.add_noise(known, noise, timesteps[:1].expand(3))
    for k, (t, landing) in enumerate(zip(timesteps.tolist(), [*timesteps.tolist()[1:], -1], strict=True)):
        predicted = policy.denoiser(x, torch.full((3,), t), policy.embed(observations))
        clean = policy.schedule.to_sample(predicted, x, t, prediction_type).clamp(-1, 1)
        clean = torch.lerp(clean, known, keep)
        x = ddim_step(x, clean, t, landing, policy.schedule, 0.5, prediction_type="sample", noise=step_noise[k])
    program = compile_sampler(policy, sampler, backend=backend)
    actions = program(observations, noise, step_noise, **before)
    assert difference(policy, actions, policy.action_normalizer.unnormalize(x)) < TOLERANCE
    assert torch.allclose(actions[:, :3], before["previous"][:, :3], atol=1e-4)
    assert difference(policy, actions, program(observations, noise, step_noise)) > 0.05


def test_what_is_kept_is_seen_by_the_network_as_data_under_its_own_noise():
    policy, sampler = make_policy(), Sampler(ddim_steps=5, warm_start=0.5)
    observations, noise, _ = inputs(policy, sampler)
    before, seen = continuing(policy), []
    program = compile_sampler(policy, sampler)
    known = policy.action_normalizer.normalize(before["previous"])
    denoiser = next(cell.cell_contents for cell in program.warm_run.__closure__ if hasattr(cell.cell_contents, "embed"))
    denoiser.denoiser.register_forward_pre_hook(lambda module, given: seen.append(given[:2]))
    program(observations, noise, **before)
    assert [timestep[0].item() for _, timestep in seen] == ddim_timesteps(50, 5).tolist()
    for x, timestep in seen:
        assert torch.allclose(x[:, :3], policy.schedule.add_noise(known, noise, timestep)[:, :3], atol=1e-5)


def test_a_previous_chunk_that_cannot_be_used_is_refused():
    policy, sampler = make_policy(), Sampler(ddim_steps=2)
    observations, noise, _ = inputs(policy, sampler)
    program, before = compile_sampler(policy, sampler), continuing(policy)
    with pytest.raises(ValueError, match=r"previous must have shape \(3, 8, 2\); got \(3, 7, 2\)"):
        program(observations, noise, previous=before["previous"][:, 1:])
    with pytest.raises(ValueError, match=r"keep must have shape \(3, 8\); got \(3, 8, 2\)"):
        program(observations, noise, previous=before["previous"], keep=torch.zeros(3, 8, 2))
    with pytest.raises(ValueError, match=r"keep says .* pass previous="):
        program(observations, noise, keep=before["keep"])
    with pytest.raises(ValueError, match=r"warm_start=0.05 leaves 5 of 100 timesteps, fewer than ddim_steps=8"):
        compile_sampler(policy, Sampler(warm_start=0.05))
    for wrong in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="warm_start must be above 0"):
            Sampler(warm_start=wrong)


ONNX_CASES = [
    ("modulated_mlp", "sample", VECTORS, Sampler(ddim_steps=8)),
    ("modulated_mlp", "epsilon", VECTORS, Sampler(ddim_steps=16, eta=0.5, spacing="leading")),
    ("residual_mlp", "v_prediction", VECTORS, Sampler(ddim_steps=2, clip=None, spacing="linspace")),
    ("modulated_mlp", "v_prediction", IMAGES, Sampler(ddim_steps=3, eta=1.0)),
    ("residual_mlp", "sample", VECTORS, Sampler(ddim_steps=1)),
    ("unet", "v_prediction", VECTORS, Sampler(ddim_steps=8)),
    ("transformer", "sample", VECTORS, Sampler(ddim_steps=3, eta=1.0)),
]


@needs_onnx
@pytest.mark.parametrize(("denoiser", "prediction_type", "shapes", "sampler"), ONNX_CASES)
def test_onnx_gives_the_eager_actions_at_any_batch_size(denoiser, prediction_type, shapes, sampler):
    policy = make_policy(denoiser, prediction_type, shapes)
    program, eager = compile_sampler(policy, sampler, backend="onnx"), compile_sampler(policy, sampler)
    for rows in (1, 7):
        observations, noise, step_noise = inputs(policy, sampler, rows)
        expected = eager(observations, noise, step_noise)
        assert difference(policy, program(observations, noise, step_noise), expected) < TOLERANCE
        other, _, _ = inputs(policy, sampler, rows, seed=2)
        assert difference(policy, eager(other, noise, step_noise), expected) > 100 * TOLERANCE


@pytest.mark.slow  # minutes of tracing
@needs_onnx
@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_onnx_gives_the_eager_actions_under_many_settings(denoiser, prediction_type):
    policy = make_policy(denoiser, prediction_type)
    for sampler in SETTINGS[:: 7 if denoiser == "modulated_mlp" else 11]:
        observations, noise, step_noise = inputs(policy, sampler)
        expected = compile_sampler(policy, sampler)(observations, noise, step_noise)
        program = compile_sampler(policy, sampler, backend="onnx")
        assert difference(policy, program(observations, noise, step_noise), expected) < TOLERANCE, sampler


@needs_onnx
def test_the_size_of_an_onnx_program_does_not_grow_with_its_steps():
    policy = make_policy()
    small, large = (compile_sampler(policy, Sampler(ddim_steps=k), backend="onnx").run.model for k in (1, 100))
    assert len(large) - len(small) < 99 * 4 * (32 + 5 + 2)  # a timestep's embedding and coefficients for each step


@needs_onnx
def test_an_onnx_program_can_be_sent_to_another_process():
    policy, sampler = make_policy(), Sampler(ddim_steps=2)
    program = compile_sampler(policy, sampler, backend="onnx")
    again = pickle.loads(pickle.dumps(program))
    observations, noise, _ = inputs(policy, sampler)
    assert torch.equal(again(observations, noise), program(observations, noise))


@needs_onnx
@pytest.mark.parametrize("denoiser", ["modulated_mlp", "transformer"])  # networks of matrices alone
def test_int8_weights_are_smaller_and_come_close(denoiser):
    policy, sampler = make_policy(denoiser, hidden_size=128), Sampler(ddim_steps=4)
    observations, noise, _ = inputs(policy, sampler)
    exact = compile_sampler(policy, sampler, backend="onnx")
    narrow = compile_sampler(policy, sampler, backend="onnx", weights="int8")
    assert len(narrow.run.model) < 0.35 * len(exact.run.model)
    off = difference(policy, narrow(observations, noise), exact(observations, noise))
    assert 1e-6 < off < 0.1


@pytest.mark.parametrize("block_size", [32, 64])
def test_quantized_weights_are_off_by_half_a_step_at_most(block_size):
    weight = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    weight[2] = 0
    values, scales = quantized(weight, block_size)
    assert values.shape == (6, 128 // block_size, block_size)
    restored = (values.astype(np.float32) - 128) * scales[..., None]
    assert (np.abs(restored.reshape(6, 128) - weight) <= 0.5001 * scales.repeat(block_size, axis=1)).all()
    assert values.min() == 1 or values.max() == 255


@pytest.mark.slow  # compiles for minutes
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("sampler", [Sampler(ddim_steps=2), Sampler(ddim_steps=3, eta=1.0, clip=None)])
@pytest.mark.parametrize("denoiser", DENOISERS)
def test_torch_compile_gives_the_eager_actions(denoiser, sampler):
    policy = make_policy(denoiser)
    program = compile_sampler(policy, sampler, backend="compile")
    for rows in (1, 7):
        given = inputs(policy, sampler, rows)
        assert difference(policy, program(*given), compile_sampler(policy, sampler)(*given)) < TOLERANCE


@needs_cuda
@pytest.mark.parametrize("sampler", [Sampler(ddim_steps=4), Sampler(ddim_steps=3, eta=1.0)])
def test_cuda_graphs_give_the_eager_actions_again_and_again(sampler):
    policy = make_policy().to("cuda")
    program, eager = compile_sampler(policy, sampler, backend="cuda_graph"), compile_sampler(policy, sampler)
    for rows, seed in ((1, 1), (7, 1), (1, 2)):
        given = inputs(policy, sampler, rows, seed)
        assert difference(policy, program(*given), eager(*given)) < 10 * TOLERANCE


def test_a_program_keeps_the_weights_it_was_made_with():
    policy, sampler = make_policy(), Sampler(ddim_steps=2)
    observations, noise, _ = inputs(policy, sampler)
    program = compile_sampler(policy, sampler)
    before = program(observations, noise)
    with torch.no_grad():
        policy.denoiser.leave.bias += 1
    assert torch.equal(program(observations, noise), before)
    assert not torch.equal(compile_sampler(policy, sampler)(observations, noise), before)


def test_a_policy_in_training_mode_is_sampled_without_dropout():
    policy, sampler = make_policy(), Sampler(ddim_steps=2)
    observations, noise, _ = inputs(policy, sampler)
    expected = compile_sampler(policy, sampler)(observations, noise)
    assert torch.equal(compile_sampler(policy.train(), sampler)(observations, noise), expected)
    assert policy.training


def test_arrays_of_any_float_type_do():
    policy, sampler = make_policy(), Sampler(ddim_steps=2)
    observations, noise, _ = inputs(policy, sampler)
    program = compile_sampler(policy, sampler)
    arrays = {key: value.numpy().astype(np.float64) for key, value in observations.items()}
    assert torch.equal(program(arrays, noise.numpy()), program(observations, noise))


@pytest.mark.parametrize("backend", ["eager", "fused", pytest.param("onnx", marks=needs_onnx)])
def test_inputs_that_do_not_fit_are_refused_in_a_sentence(backend):
    policy = make_policy(shapes=IMAGES)
    plain = compile_sampler(policy, Sampler(ddim_steps=2), backend=backend)
    observations, noise, _ = inputs(policy, plain.sampler)
    with pytest.raises(ValueError, match=r"observation 'state' must have shape \(3, 2, 5\); got \(3, 2, 4\)"):
        plain({**observations, "state": observations["state"][..., :4]}, noise)
    with pytest.raises(ValueError, match=r"must have the keys \['camera.front', 'state'\]; got \['state'\]"):
        plain({"state": observations["state"]}, noise)
    with pytest.raises(ValueError, match=r"'camera.front' is an image and must be uint8; got torch.float32"):
        plain({**observations, "camera.front": observations["camera.front"].float()}, noise)
    with pytest.raises(ValueError, match=r"noise must have shape \(3, 8, 2\); got \(3, 8, 1\)"):
        plain(observations, noise[..., :1])
    with pytest.raises(ValueError, match=r"eta=0.0 needs step_noise of shape None; got \(2, 3, 8, 2\)"):
        plain(observations, noise, torch.zeros(2, 3, 8, 2))


def test_missing_step_noise_is_refused():
    policy, sampler = make_policy(), Sampler(ddim_steps=2, eta=1.0)
    observations, noise, _ = inputs(policy, sampler)
    with pytest.raises(ValueError, match=r"eta=1.0 needs step_noise of shape \(2, 3, 8, 2\); got None"):
        compile_sampler(policy, sampler)(observations, noise)


def test_what_cannot_run_is_refused_before_it_does(monkeypatch):
    policy, sampler = make_policy(), Sampler()
    with pytest.raises(ValueError, match=r"unknown backend 'onxx' \(did you mean 'onnx'\?\); allowed: compile, cuda"):
        compile_sampler(policy, sampler, backend="onxx")
    with pytest.raises(ValueError, match="needs a policy on a GPU; this one is on cpu: use backend=onnx"):
        compile_sampler(policy, sampler, backend="cuda_graph")
    with pytest.raises(ValueError, match=r"unknown weights 'int9' \(did you mean 'int8'\?\)"):
        compile_sampler(policy, sampler, backend="onnx", weights="int9")
    with pytest.raises(ValueError, match="weights=int8 needs backend=onnx; got backend=eager"):
        compile_sampler(policy, sampler, weights="int8")
    with pytest.raises(ValueError, match=r"ddim_steps must be a whole number within 1..100"):
        compile_sampler(policy, Sampler(ddim_steps=101))
    monkeypatch.setattr(backends_module.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler .*: install one, or use backend=onnx"):
        compile_sampler(policy, sampler, backend="compile")
    assert set(BACKENDS) == {"eager", "fused", "compile", "onnx", "cuda_graph"}


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(onnx_graph.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"needs the package onnx: pip install 'ddim-policy\[export\]'"):
        compile_sampler(make_policy(), Sampler(), backend="onnx")
