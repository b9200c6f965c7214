"""Policies, inputs and checks that the tests of all back ends share."""

import functools

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler

from policy import DiffusionPolicy, PolicyConfig, Sampler
from policy.diffusion.ddim import ddim_step, ddim_timesteps
from policy.inference.backends import compile_sampler
from tests.conftest import randomize

# In normalised units, where actions lie within -1..1; larger ones (no clipping) are compared relative to their size.
TOLERANCE = 1e-4

VECTORS = {"state": (5,), "goal": (3,)}
IMAGES = {"state": (5,), "camera.front": (16, 20, 3)}

DENOISER_SIZES = {
    "modulated_mlp": {"hidden_size": 32, "num_layers": 2},
    "residual_mlp": {"hidden_size": 32, "num_layers": 2},
    "unet": {"widths": [16, 32], "timestep_size": 32},
    "transformer": {"hidden_size": 32, "num_layers": 2},
    "encoder_decoder": {"hidden_size": 32, "num_layers": 2, "obs_tokens": 2, "encoder_layers": 1},
}


def make_policy(
    denoiser="modulated_mlp", prediction_type="sample", images=False, objective="diffusion", sigma_data=None, **sizes
):
    shapes = IMAGES if images else VECTORS
    config = PolicyConfig(
        observation_shapes=shapes,
        action_dim=2,
        obs_size=24,
        objective=objective,
        prediction_type=prediction_type,
        sigma_data=sigma_data,
        encoder={"name": "image" if images else "state"},
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


# Exporting a program to ONNX takes seconds: tests share policies, and the programs made of them, and change neither.
shared_policy = functools.cache(make_policy)
shared_program = functools.cache(compile_sampler)


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
    """The largest difference in normalised units, relative to the largest action where that is above 1."""
    a, b = policy.action_normalizer.normalize(actions), policy.action_normalizer.normalize(expected)
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def continuing(policy, rows=3):
    """A previous chunk in the data's units, of which the beginning is kept, then a share, then nothing."""
    generator = torch.Generator().manual_seed(2)
    known = 2 * torch.rand(rows, policy.config.action_horizon, policy.config.action_dim, generator=generator) - 1
    keep = torch.tensor([1, 1, 1, 0.6, 0.2, 0, 0, 0]).expand(rows, -1)
    return {"previous": policy.action_normalizer.unnormalize(known), "keep": keep}


def estimated(policy, x, timestep):
    """What the network sees: the estimate of the clean chunk as the preconditioning of EDM computes it, or x itself."""
    if policy.config.sigma_data is None:
        return x
    signal, noise = policy.schedule.signal_and_noise(timestep, x)
    edm = EDMEulerScheduler(sigma_data=policy.config.sigma_data)
    return edm.precondition_outputs(x / signal, torch.zeros_like(x), noise / signal)


def continued_by_ddim_step(policy, sampler, observations, noise, step_noise, previous, keep):
    """Actions that continue a chunk, computed from parts that have tests of their own."""
    known, keep = policy.action_normalizer.normalize(previous), keep[..., None]
    share, spacing = sampler.warm_start, sampler.spacing
    noise = sampler.noise_scale * noise
    timesteps = ddim_timesteps(round(100 * (sampler.start if share is None else share)), sampler.ddim_steps, spacing)
    x = noise if share is None else policy.schedule.add_noise(known, noise, timesteps[:1].expand(len(noise)))
    for k, (t, landing) in enumerate(zip(timesteps.tolist(), [*timesteps.tolist()[1:], -1], strict=True)):
        predicted = policy.denoiser(estimated(policy, x, t), torch.full((len(noise),), t), policy.embed(observations))
        clean = policy.schedule.to_sample(predicted, x, t, policy.config.prediction_type)
        clean = clean if sampler.clip is None else clean.clamp(-sampler.clip, sampler.clip)
        clean = torch.lerp(clean, known, keep)
        added = None if step_noise is None else step_noise[k]
        settings = {"prediction_type": "sample", "clip": sampler.clip, "noise": added}
        x = ddim_step(x, clean, t, landing, policy.schedule, sampler.eta, **settings)
    return policy.action_normalizer.unnormalize(x)


def check_continuation(policy, sampler, backend):
    """A program continues a chunk as `ddim_step` does, and needs that chunk for what it keeps of it."""
    given, before = inputs(policy, sampler), continuing(policy)
    program = shared_program(policy, sampler, backend=backend)
    actions = program(*given, **before)
    expected = continued_by_ddim_step(policy, sampler, *given, **before)
    assert difference(policy, actions, expected) < TOLERANCE
    assert torch.allclose(actions[:, :3], before["previous"][:, :3], atol=1e-4)
    assert difference(policy, actions, program(*given)) > 0.05


def check_refusals(backend):
    """Inputs that do not fit are refused in a sentence."""
    policy = shared_policy(images=True)
    plain = shared_program(policy, Sampler(ddim_steps=2), backend=backend)
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
