"""The objectives against closed forms, and against the few lines that their papers write."""

import itertools
import math

import pytest
import torch

from policy import PolicyConfig, Sampler
from policy.diffusion.coefficients import reverse_process
from policy.diffusion.objective import OBJECTIVES, SECOND_SIGNAL, euler_coefficients
from policy.diffusion.schedule import make_schedule
from policy.model.diffusion_policy import DiffusionPolicy
from tests.inference.cases import estimated, inputs, make_policy

OTHERS = [name for name in OBJECTIVES if name != "diffusion"]
CONTROLS = ["regression", "mip"]


def euler(velocity, noise, steps):
    """Sample a flow with an exact velocity (x, t) through the table and the loop of all solvers."""
    schedule = make_schedule(num_steps=steps * 2, beta_schedule="squaredcos_cap_v2")
    course = Sampler(ddim_steps=steps).settled("flow", schedule.num_steps).cold_course(schedule, "flow")
    times = (course.timesteps + 1) / schedule.num_steps
    table = euler_coefficients(schedule, course.timesteps, 0.0, "velocity")
    return reverse_process(
        lambda step, x: velocity(x, times[step].item()),
        course.noise * noise,
        table,
        predicts_clean=False,
        clip=None,
        step_noise=None,
    )


def gaussian_velocity(mean, deviation):
    """E[z - x_0 | x_t] for Gaussian data, where x_t = (1 - t) x_0 + t z."""

    def velocity(x, t):
        centred = x - (1 - t) * mean
        variance = (1 - t) ** 2 * deviation**2 + t**2
        return t / variance * centred - (mean + (1 - t) * deviation**2 / variance * centred)

    return velocity


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_flow_to_one_point_is_straight_so_that_any_number_of_steps_is_exact(steps):
    noise = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(euler(gaussian_velocity(0.3, 0.0), noise, steps), torch.full_like(noise, 0.3))


def test_the_exact_velocity_of_a_gaussian_gives_its_samples_at_the_first_order():
    """The noise z leads to mean + deviation z, and half the step makes half the error."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None]
    errors = [(euler(gaussian_velocity(0.3, 0.5), noise, k) - (0.3 + 0.5 * noise)).abs().max() for k in (100, 200, 400)]
    assert errors[-1] < 5e-3
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.05)


def training_batch(policy, rows=5):
    observations, noise, _ = inputs(policy, Sampler(), rows)
    actions = policy.action_normalizer.unnormalize(0.5 * torch.tanh(noise))
    mask = torch.ones(noise.shape[:2], dtype=torch.bool)
    return {"observations": observations, "actions": actions, "mask": mask}, 0.5 * torch.tanh(noise)


def test_a_flow_learns_the_velocity_on_the_straight_line():
    policy = make_policy(objective="flow")
    batch, x_0 = training_batch(policy)
    embedding, timestep = policy.embed(batch["observations"]), torch.tensor([0, 24, 49, 74, 99])
    z = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(3))
    t = ((timestep + 1) / 100)[:, None, None]
    expected = (policy.denoiser((1 - t) * x_0 + t * z, timestep, embedding) - (z - x_0)).square().mean(2)
    assert torch.allclose(policy.squared_errors(batch, embedding, timestep, z), expected, atol=1e-5)


def test_with_sigma_data_the_network_learns_from_the_estimate_of_edm():
    policy = make_policy(sigma_data=0.4)
    batch, x_0 = training_batch(policy)
    embedding, timestep = policy.embed(batch["observations"]), torch.tensor([0, 24, 49, 74, 99])
    z = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(3))
    x_t = policy.schedule.add_noise(x_0, z, timestep)
    seen = torch.cat([estimated(policy, x[None], int(t)) for x, t in zip(x_t, timestep, strict=True)])
    assert seen[4].abs().max() < 0.01  # nothing but noise: nothing to see
    torch.testing.assert_close(seen[0], x_t[0], atol=0.02, rtol=0)
    expected = (policy.denoiser(seen, timestep, embedding) - x_0).square().mean(2)
    assert torch.allclose(policy.squared_errors(batch, embedding, timestep, z), expected, atol=1e-5)


def test_regression_learns_the_chunk_from_the_observation_alone():
    policy = make_policy(objective="regression")
    batch, x_0 = training_batch(policy)
    embedding, last = policy.embed(batch["observations"]), torch.full((5,), 99)
    expected = (policy.denoiser(torch.zeros_like(x_0), last, embedding) - x_0).square().mean()
    for times in (1, 4):  # no noise is drawn, so that more of it would change nothing
        assert torch.allclose(policy.loss(batch, torch.Generator().manual_seed(0), times), expected, atol=1e-6)


def test_mip_is_the_two_calls_of_its_paper():
    """Training: |f(o, 0, 0) - a|² + |f(o, t* a + (1 - t*) z, t*) - a|². Acting: f(o, t* f(o, 0, 0), t*)."""
    policy = make_policy(objective="mip")
    batch, a = training_batch(policy)
    o, first, second = policy.embed(batch["observations"]), torch.full((5,), 99), torch.full((5,), 9)
    z = torch.randn(10, *a.shape[1:], generator=torch.Generator().manual_seed(0))[1::2]
    before = policy.denoiser(torch.zeros_like(a), first, o)
    after = policy.denoiser(0.9 * a + 0.1 * z, second, o)
    expected = (before - a).square().mean() + (after - a).square().mean()
    assert torch.allclose(policy.loss(batch, torch.Generator().manual_seed(0)), expected, atol=1e-5)
    acted = policy.denoiser(0.9 * before, second, o)
    sampled = policy.sample_actions(batch["observations"], clip=None)
    assert torch.allclose(policy.action_normalizer.normalize(sampled), acted, atol=1e-5)
    assert SECOND_SIGNAL == 0.9


@pytest.mark.parametrize("objective", CONTROLS)
def test_a_control_learns_the_mean_where_demonstrations_disagree(objective):
    """Two chunks for one observation: the answer to a squared error is between them."""
    torch.manual_seed(0)
    config = PolicyConfig(
        observation_shapes={"state": (1,)},
        action_dim=1,
        action_horizon=2,
        obs_size=8,
        objective=objective,
        encoder={"name": "state", "hidden_size": 8},
        denoiser={"name": "modulated_mlp", "hidden_size": 32, "num_layers": 1},
    )
    policy, side = DiffusionPolicy(config), torch.tensor([-0.8, 0.8, 0.8, 0.8]).repeat(16)
    batch = {
        "observations": {"state": torch.zeros(64, 2, 1)},
        "actions": side[:, None, None].expand(64, 2, 1),
        "mask": torch.ones(64, 2, dtype=torch.bool),
    }
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for step in range(80):
        loss = policy.loss(batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first = policy.denoiser(torch.zeros(1, 2, 1), torch.tensor([99]), policy.embed({"state": torch.zeros(1, 2, 1)}))
    assert first.flatten().tolist() == pytest.approx([0.4, 0.4], abs=0.1)


@pytest.mark.parametrize("objective", OTHERS)
def test_a_policy_samples_in_the_calls_that_its_objective_has(objective):
    policy, calls = make_policy(objective=objective), []
    policy.denoiser.register_forward_pre_hook(lambda module, given: calls.append(given[1][0].item()))
    policy.sample_actions(inputs(policy, Sampler())[0], ddim_steps=8)
    assert calls == {"flow": [99, 87, 74, 61, 49, 37, 24, 11], "regression": [99], "mip": [99, 9]}[objective]


@pytest.mark.parametrize("objective", CONTROLS)
def test_a_control_draws_no_noise(objective):
    policy = make_policy(objective=objective)
    observations, noise, _ = inputs(policy, Sampler())
    assert torch.equal(
        policy.sample_actions(observations, noise=noise), policy.sample_actions(observations, noise=-noise)
    )


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        ("flow", {"eta": 0.5}, r"objective=flow has no sampler.eta; got 0.5.*it has sampler.ddim_steps"),
        ("flow", {"solver": "dpmpp_2m"}, "objective=flow has no sampler.solver=dpmpp_2m: .*use euler"),
        ("diffusion", {"solver": "euler"}, "objective=diffusion has no sampler.solver=euler: .*use ddim, dpmpp_2m"),
        ("regression", {"ddim_steps": 4}, "always takes 1 call of its network, which sampler.ddim_steps=4 cannot"),
        ("mip", {"ddim_steps": 4}, "always takes 2 calls of its network"),
        (
            "regression",
            {"eta": 1.0},
            r"no sampler.eta; got 1.0: leave it out \(sampler.eta=0.0 where a preset sets it\); "
            "it has sampler.clip, sampler.solver",
        ),
        ("regression", {"spacing": "leading"}, "no sampler.spacing"),
        ("mip", {"warm_start": 0.5}, "no sampler.warm_start"),
        ("mip", {"start": 0.5}, "no sampler.start"),
        ("regression", {"noise_scale": 0.5}, "no sampler.noise_scale"),
    ],
)
def test_settings_that_an_objective_does_not_have_are_refused_with_those_it_has(objective, settings, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**settings).settled(objective, 100)


def test_an_objective_fixes_what_it_knows_and_leaves_the_rest():
    assert Sampler(ddim_steps=4, start=0.5).settled("flow", 100) == Sampler(ddim_steps=4, start=0.5, solver="euler")
    for name in OBJECTIVES:
        settled = Sampler(clip=2.0).settled(name, 100)
        assert settled.settled(name, 100) == settled
    assert Sampler().settled("diffusion", 100) == Sampler()
    with pytest.raises(ValueError, match=r"2 calls need a timestep each: raise .* which is 1"):
        OBJECTIVES["mip"].fixed_timesteps(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "flows"}, "unknown objective 'flows' .did you mean 'flow'"),
        (
            {"objective": "flow", "prediction_type": "epsilon"},
            "objective=flow has no prediction_type.*leave prediction",
        ),
        ({"objective": "mip", "loss_weighting": "min_snr"}, "objective=mip has no loss_weighting"),
    ],
)
def test_settings_of_a_policy_that_do_not_fit_its_objective(settings, message):
    with pytest.raises(ValueError, match=message):
        PolicyConfig(observation_shapes={"state": (1,)}, action_dim=1, **settings)
